"""A base in 4 and 8 bits on a CUDA device: bitsandbytes' kernel beside PyTorch's, gradients, memory, nothing waits."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kernels"))

from test_fast import adapters, batch, run
from test_quantise import packed, weight
from test_quantised import FORMS, dequantise_into, moved

from packtrain.distributed.parallelize import materialise
from packtrain.kernels.quantise import Quantisation, dequantiser
from packtrain.kernels.rows import Form
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw
from packtrain.model.quantised import held, quantise
from packtrain.peft import lora
from packtrain.peft.tensors import all_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
LENGTHS = (70, 200, 3, 130, 300)


def made(
    form: Quantisation | None,
    dtype: torch.dtype,
    device: torch.device,
    fused: fast.Recompute | None = None,
    **shape: Any,
) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE | shape), dtype=dtype, device=torch.device("meta"))
    lora.install(model, adapters(r=16))
    if form is not None:
        quantise(model, form, dtype)
    if fused is not None:
        assert fast.obstacle(model, device, Form(dtype, float8=False)) is None
        fast.install(model, Form(dtype, float8=False), fused)
        if form is None:
            fast.allocate(model, device)
    materialise(model, device)
    draw(model, 0)
    lora.initialise(model, 0)
    return model.train()


def by(form: Quantisation, bitsandbytes: bool) -> Quantisation:
    return Quantisation(form.kind, form.double, form.storage, bitsandbytes)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_bytes_are_those_of_a_cpu(form: Quantisation) -> None:
    """Also of double quantisation, whose mean is a sum: a checkpoint of a CPU's run and a GPU's have one base."""
    values = weight(4096, rows=300)
    here = [part.cuda() for part in packed(form, torch.zeros_like(values))]
    form.pack(values.cuda(), here[0], here[1])
    for ours, theirs in zip(here, packed(form, values), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [form for form in FORMS.values() if form.bits == 4], ids=str)
def test_bitsandbytes_kernel_gives_pytorchs_values(form: Quantisation, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    assert dequantiser(CUDA)[0], dequantiser(CUDA)[1]
    for columns, rows in ((64, 3), (4096, 5), (14336, 130)):
        held = [part.cuda() for part in packed(form, weight(columns, rows=rows))]
        theirs = by(form, True).unpack(*held, columns, dtype)
        ours = by(form, False).unpack(*held, columns, dtype)
        assert theirs.shape == ours.shape == (rows, columns)
        assert theirs.dtype == ours.dtype == dtype
        torch.testing.assert_close(theirs, ours, rtol=torch.finfo(dtype).eps, atol=0)


def test_columns_that_are_no_whole_blocks_go_without_it() -> None:
    form = Quantisation("nf4", by_bitsandbytes=True)
    numbers, scales = packed(form, weight(96))
    values = form.unpack(numbers.cuda(), scales.cuda(), 96, torch.float32)
    torch.testing.assert_close(values.cpu(), form.unpack(numbers, scales, 96, torch.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [None, "none", "selective", "full"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_are_near_those_of_fp32_on_the_dequantised_weights(
    form: Quantisation, fused: fast.Recompute | None
) -> None:
    form = by(form, dequantiser(CUDA)[0])
    ours = made(form, torch.bfloat16, CUDA, fused)
    exact = made(None, torch.float32, CPU)
    dequantise_into(exact, made(by(form, False), torch.float32, CPU))
    for model in (ours, exact):
        moved_on(model)
    expected, found = run(exact, batch(LENGTHS)), run(ours, batch(LENGTHS).to(CUDA))
    assert found[0].item() == pytest.approx(expected[0].item(), rel=3e-3)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        cosine = torch.cosine_similarity(found[1][name].flatten().cpu(), gradient.flatten(), 0)
        assert cosine > 0.99, (name, cosine)


def moved_on(model: LlamaForCausalLM) -> None:
    """Adapters away from zero, by the same numbers on any device."""
    home = model.model.norm.weight.device
    materialise(model, CPU)
    moved(model, adapters(r=16))
    materialise(model, home)


@pytest.mark.parametrize(("form", "fused"), itertools.product(FORMS.values(), [None, "none"]), ids=str)
def test_a_step_does_not_wait_for_the_device(form: Quantisation, fused: fast.Recompute | None) -> None:
    model, data = made(by(form, dequantiser(CUDA)[0]), torch.bfloat16, CUDA, fused), batch(LENGTHS).to(CUDA)
    run(model, data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(data).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [None, "none", "full"])
def test_memory_is_the_numbers_and_a_layer(fused: fast.Recompute | None) -> None:
    """Twelve layers of 43 M weights, 1,044 MB in bf16, are 272 MB, and one or two at a time are whole."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 32}
    peaks, sizes = [], (0, 0)
    for form in (None, by(FORMS["nf4 twice"], dequantiser(CUDA)[0])):
        before = torch.cuda.memory_allocated()
        model, data = made(form, torch.bfloat16, CUDA, fused, **shape), batch(LENGTHS).to(CUDA)
        sizes = held(model, all_rows)
        run(model, data)
        torch.cuda.reset_peak_memory_stats()
        run(model, data)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    numbers, plain = sizes
    assert numbers < plain / 3.8
    assert peaks[0] - peaks[1] > 0.6 * (plain - numbers)
