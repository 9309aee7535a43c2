"""The compiled attention kernels on a CUDA device: SDPA's numbers, for any lengths, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_attention import batch_of, qkv, reference
from torch import Tensor

from packtrain.batch import Batch
from packtrain.kernels import flash
from packtrain.kernels.attention import Kernel, attention, prepared
from packtrain.kernels.attention_choice import choose, problems

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
LENGTHS = [(700, 300, 24), (512, 512), (1, 40, 900, 59, 24), (333,), (100, 28, 37)]
"""Whole blocks, parts of blocks, one document."""


@pytest.fixture
def strict() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def run(kernel: Kernel, lengths: tuple[int, ...], dtype: torch.dtype, places: int) -> tuple[list[Tensor], Batch]:
    """Output, and gradients of q, k, v and of a prefix if there is one."""
    batch = prepared(batch_of(lengths * 2, 2).to(CUDA), kernel, places, dtype, 64)
    inputs = [x.to(CUDA, dtype).requires_grad_() for x in qkv(2 * sum(lengths), 6, 2, 64)]
    generator = torch.Generator().manual_seed(places)
    shared = [torch.randn(places, 2, 64, generator=generator).to(CUDA, dtype).requires_grad_() for _ in range(2)]
    out = attention(*inputs, batch, prefix=(shared[0], shared[1]) if places else None)
    weights = torch.randn(out.shape, generator=generator).to(CUDA, dtype)
    leaves = inputs + (shared if places else [])
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)], batch


@pytest.mark.parametrize("places", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["flex", "eager", "flash"])
def test_numbers_of_sdpa(kernel: Kernel, dtype: torch.dtype, places: int) -> None:
    wrong = problems(kernel, CUDA, dtype, 64)
    if wrong:
        pytest.skip(wrong[0])
    for lengths in LENGTHS:
        found, _ = run(kernel, lengths, dtype, places)
        expected, _ = run("sdpa", lengths, dtype, places)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            distance = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            assert distance < (1e-5 if dtype == torch.float32 else 1e-2), (lengths, distance)


def test_against_float64() -> None:
    lengths = (300, 20, 130)
    inputs = qkv(450, 6, 2, 64)
    found = attention(*(x.to(CUDA) for x in inputs), prepared(batch_of(lengths).to(CUDA), "flex", 0, torch.float32, 64))
    torch.testing.assert_close(found.double().cpu(), reference(*inputs, lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_no_layer_waits_for_the_device(kernel: Kernel) -> None:
    with torch.cuda.device(CUDA):
        torch.cuda.set_sync_debug_mode("default")
        run(kernel, LENGTHS[0], torch.bfloat16, 0)  # compiles
        inputs = [x.to(CUDA, torch.bfloat16).requires_grad_() for x in qkv(2048, 6, 2, 64)]
        batch = batch_of(LENGTHS[0] * 2, 2).to(CUDA)
        torch.cuda.set_sync_debug_mode("error")
        out = attention(*inputs, prepared(batch, kernel, 0, torch.bfloat16, 64))
        torch.autograd.backward(out.sum())


def test_auto_is_the_fastest_for_the_batch() -> None:
    flash_runs = flash.obstacle(CUDA, torch.bfloat16, 64) is None
    choice = choose("auto", CUDA, torch.bfloat16, 64)
    assert choice.kernel == ("flash" if flash_runs else "auto")
    for lengths, expected in (((64,) * 20, "flex"), ((2048, 2048), "sdpa")):
        batch = prepared(batch_of(lengths).to(CUDA), choice.kernel, 0, torch.bfloat16, 64)
        assert batch.kernel == ("flash" if flash_runs else expected)
