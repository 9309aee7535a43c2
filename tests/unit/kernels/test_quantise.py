"""Rows in 4 and 8 bits: against float64 arithmetic, against bitsandbytes where it is installed, and bit by bit."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from packtrain.kernels.quantise import BLOCK, CODES, Quantisation, dequantiser

CPU = torch.device("cpu")
FORMS = [
    Quantisation(kind, double, storage)
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False))
    for storage in (torch.bfloat16, torch.float32)
]
COLUMNS = (256, 96, 35)


def weight(columns: int, rows: int = 12) -> Tensor:
    """Normal, with an outlier, a row of zeros, and rows of very different sizes."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    values[1], values[2, 3] = 0.0, 40.0
    return values * torch.logspace(-6, 1, rows)[:, None]


def packed(form: Quantisation, values: Tensor) -> tuple[Tensor, Tensor]:
    numbers, scales = form.widths(values.shape[1])
    held = torch.empty(len(values), numbers, dtype=form.storage), torch.empty(len(values), scales)
    form.pack(values, *held)
    return held


def unpacked(form: Quantisation, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return form.unpack(*packed(form, values), values.shape[1], dtype)


def nearest(values: Tensor, code: Tensor) -> Tensor:
    """In float64, by looking at all of the code."""
    return code[(values[..., None] - code).abs().argmin(-1)]


def ideal(form: Quantisation, values: Tensor) -> Tensor:
    """What quantising is, in float64, without double quantisation."""
    values = values.double()
    if form.bits == 8:
        step = values.abs().amax(1, keepdim=True).clamp(min=1e-38) / 127
        return (values / step).round() * step
    found = []
    for block in values.split(BLOCK, 1):
        absmax = block.abs().amax(1, keepdim=True)
        code = torch.tensor(CODES[form.kind], dtype=torch.float64)
        found.append(nearest(block / absmax.clamp(min=1e-300), code) * absmax)
    return torch.cat(found, 1)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", [form for form in FORMS if not form.double], ids=str)
def test_values_are_the_nearest_that_the_format_has(form: Quantisation, columns: int) -> None:
    values = weight(columns)
    torch.testing.assert_close(unpacked(form, values).double(), ideal(form, values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("form", [form for form in FORMS if form.double], ids=str)
def test_quantised_scales_are_within_the_8_bit_codes_error(form: Quantisation, columns: int) -> None:
    """The code's widest step is 0.9 / 64: a scale is off by half of that, of the row's largest difference, at most."""
    values = weight(columns)
    exact = unpacked(Quantisation(form.kind), values).double()
    blocks = [block.abs().amax(1) for block in values.double().split(BLOCK, 1)]
    absmax = torch.stack(blocks, 1)
    largest = (absmax - absmax.mean(1, keepdim=True)).abs().amax(1, keepdim=True)
    allowed = largest * 0.9 / 64 / 2 * 1.01 + absmax.amax(1, keepdim=True) * 1e-6
    error = (unpacked(form, values).double() - exact).abs()
    assert (error <= allowed).all()
    assert columns < BLOCK or error.max() > 0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_row_is_its_own(form: Quantisation) -> None:
    """Any split by rows has the same bytes: what a rank holds does not depend on the number of ranks."""
    values = weight(192)
    whole = [part.view(torch.uint8) for part in packed(form, values)]
    for edges in ((0, 1, 12), (0, 5, 6, 12), tuple(range(13))):
        parts = [packed(form, values[a:b]) for a, b in itertools.pairwise(edges)]
        for ours, theirs in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs).view(torch.uint8))


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (Quantisation("nf4"), 4 + 32 / 64),
        (Quantisation("fp4", storage=torch.float16), 4 + 32 / 64),
        (Quantisation("nf4", True), 4 + 8 / 64 + 2 * 32 / 4096),
        (Quantisation("int8"), 8 + 32 / 4096),
    ],
    ids=str,
)
def test_bits_of_a_weight(form: Quantisation, bits: float) -> None:
    numbers, scales = form.widths(4096)
    assert 8 * (numbers * form.storage.itemsize + 4 * scales) / 4096 == bits


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_result_is_rounded_once(form: Quantisation) -> None:
    values = weight(96)
    assert torch.equal(unpacked(form, values, torch.bfloat16), unpacked(form, values).bfloat16())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_is_not_hidden(form: Quantisation) -> None:
    values = weight(64)
    values[5, 7] = torch.nan
    assert not unpacked(form, values)[5].isfinite().all()


def test_codes() -> None:
    """fp4's are e2m1's but for the smallest; nf4's are quantiles of the normal distribution, normalised (QLoRA)."""
    thirds = [0, Fraction(1, 192), Fraction(2, 3), 1, Fraction(1, 3), Fraction(1, 2), Fraction(1, 6), Fraction(1, 4)]
    assert torch.equal(torch.tensor(CODES["fp4"][:8]), torch.tensor([float(value) for value in thirds]))
    offset = 0.9677083
    tails = (torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8))
    upper, lower = (torch.special.ndtri(tail) for tail in tails)
    normal = torch.cat([upper, -lower, torch.zeros(1)]).sort().values / upper.max()
    torch.testing.assert_close(torch.tensor(CODES["nf4"]).double(), normal, rtol=0, atol=2e-6)


def test_a_cpu_has_pytorchs_operations() -> None:
    assert dequantiser(CPU) == (False, "PyTorch's operations")


def functional() -> Any:
    return pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_has_the_same_bytes(kind: Any) -> None:
    theirs, values, form = functional(), weight(256), Quantisation(kind)
    numbers, scales = packed(form, values)
    expected, state = theirs.quantize_4bit(values, quant_type=kind)
    torch.testing.assert_close(scales.flatten(), state.absmax, rtol=0, atol=0)
    if kind == "nf4":  # fp4 has two zeros
        assert torch.equal(numbers.view(torch.uint8).flatten(), expected.flatten())
    state = theirs.QuantState(scales.flatten(), values.shape, blocksize=BLOCK, quant_type=kind, dtype=torch.float32)
    found = theirs.dequantize_4bit(numbers.view(torch.uint8).view(-1, 1), state)
    torch.testing.assert_close(found, unpacked(form, values), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, theirs.dequantize_4bit(expected, state), rtol=1e-6, atol=0)


def test_bitsandbytes_reads_our_quantised_scales() -> None:
    """Of one row, whose scales are one group of theirs too; and ours are no further from the exact ones."""
    theirs, values = functional(), weight(256 * BLOCK, rows=3)[2:]
    form = Quantisation("nf4", True)
    numbers, scales = packed(form, values)
    octets = scales.view(torch.uint8)[0, 8 : 8 + 256]
    state = theirs.QuantState(scales[0, :1], blocksize=256, code=theirs.create_dynamic_map(), dtype=torch.float32)
    absmax = theirs.dequantize_blockwise(octets, state) + scales[0, 1]
    state = theirs.QuantState(absmax, values.shape, blocksize=BLOCK, quant_type="nf4", dtype=torch.float32)
    found = theirs.dequantize_4bit(numbers.view(torch.uint8).view(-1, 1), state)
    torch.testing.assert_close(found, form.unpack(numbers, scales, values.shape[1], torch.float32), rtol=1e-5, atol=0)

    _, state = theirs.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    other = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
    exact = values.view(-1, BLOCK).abs().amax(1)
    assert ((absmax - exact).abs() <= (other - exact).abs() + 1e-5 * exact).all()


def test_bitsandbytes_has_the_same_int8() -> None:
    theirs, values = functional(), weight(256)[2:]
    numbers, _ = packed(Quantisation("int8"), values)
    expected, absmax, _ = theirs.int8_vectorwise_quant(values)
    assert torch.equal(numbers.view(torch.int8), expected)
    dequantised = theirs.int8_vectorwise_dequant(expected, absmax)
    torch.testing.assert_close(unpacked(Quantisation("int8"), values), dequantised, rtol=1e-5, atol=0)
