"""Layers that live on the host, on a CUDA device: the bits of layers that stay, their memory, and no waiting."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import adapters, batch, filled, run

from packtrain import recompute
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.kernels.rows import Form
from packtrain.model import fast, streaming
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks
from packtrain.model.shared import linears
from packtrain.optim import Optimizer
from packtrain.peft import lora
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
PLACE = cast(Place, SimpleNamespace(world_size=1, local_world_size=1, rank=0, device=CUDA))
LAYERS = 8
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
WIDE = SMALL | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "initializer_range": 0.02}
"""A layer is copied in some 2 ms and computed in much less: whoever does not wait reads too early."""
LENGTHS = (70, 200, 3, 130, 300)


def made(
    shape: dict[str, Any], form: Form, how: fast.Recompute, hosted: Sequence[int], rank: int = 16
) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape), dtype=form.dtype, device=torch.device("meta"))
    lora.install(model, adapters(r=rank))
    fast.install(model, form, how)
    if hosted:
        streaming.install(model, hosted, CUDA)
    fast.allocate(model, CUDA)
    model.model.kernel = "eager"  # others add up in any order
    return filled(model, CUDA)


def steps(model: LlamaForCausalLM, lengths: tuple[int, ...]) -> list[Tensor]:
    """Losses, and gradients summed over three micro-batches, an evaluation in their midst."""
    found: list[Tensor] = []
    for seed in range(3):
        loss, gradients = run(model, batch(lengths, seed).to(CUDA))
        found.append(loss)
        model.eval()
        with torch.no_grad():
            found.append(model(batch(lengths, seed + 9).to(CUDA)))
        model.train()
    return [*found, *gradients.values()]


@pytest.mark.parametrize(
    ("shape", "lengths"), [(SMALL, LENGTHS), (WIDE, (40, 30))], ids=["copies are short", "copies are long"]
)
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "float8"])
def test_the_bits_are_those_of_layers_that_stay(
    shape: dict[str, Any], lengths: tuple[int, ...], how: fast.Recompute, eight: bool
) -> None:
    form = Form(torch.bfloat16, eight)
    once, again = (steps(made(shape, form, how, ()), lengths) for _ in range(2))
    assert all(map(torch.equal, once, again)), "two runs of the same are not the same: nothing to compare with"
    for hosted in (range(LAYERS), (0, 2, 3, 5, 7)):
        found = steps(made(shape, form, how, hosted), lengths)
        assert len(found) == len(once)
        assert all(map(torch.equal, found, once))


def test_a_copy_that_nobody_waits_for_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(torch.bfloat16, float8=False)
    expected = steps(made(WIDE, form, "none", ()), (40, 30))
    copy = streaming._Lane.copy

    def slowly(lane: streaming._Lane, slot: int, to: Tensor, home: Tensor) -> None:
        with torch.cuda.stream(lane._stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms: the device is never so far behind the host here
        copy(lane, slot, to, home)

    monkeypatch.setattr(streaming._Lane, "copy", slowly)
    assert all(map(torch.equal, steps(made(WIDE, form, "none", range(LAYERS)), (40, 30)), expected))
    monkeypatch.setattr(streaming._Lane, "wait", lambda self, slot: None)
    found = steps(made(WIDE, form, "none", range(LAYERS)), (40, 30))
    assert not all(map(torch.equal, found, expected))


@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "float8"])
def test_what_is_on_the_device(eight: bool) -> None:
    """The places of SLOTS layers instead of those that stream, from the beginning on."""
    form = Form(torch.bfloat16, eight)
    peaks, held = [], []
    for hosted in ((), range(LAYERS)):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = made(WIDE, form, "full", hosted)
        held.append(torch.cuda.memory_allocated() - before)
        run(model, batch(LENGTHS).to(CUDA))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        one = streaming.layer_bytes(blocks(model)[0], form)
        for linear in linears(blocks(model)[0]):
            assert linear.weight.is_pinned() == bool(hosted)
            assert linear.weight.is_cuda != bool(hosted)
        del model
    saved = (LAYERS - streaming.SLOTS) * one
    assert held[0] - held[1] == pytest.approx(saved, rel=0.02)
    assert peaks[0] - peaks[1] > 0.9 * saved


@pytest.mark.parametrize("how", ["none", "selective"])
@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "float8"])
def test_a_step_does_not_wait_for_the_device(eight: bool, how: fast.Recompute) -> None:
    model = made(SMALL, Form(torch.bfloat16, eight), how, range(LAYERS))
    model.model.kernel = "auto"
    optimizer, data = Optimizer(trainable(model), lr=1e-3), batch(LENGTHS)

    def step() -> None:
        batches = [data.to(CUDA)]
        train_step(model, batches, step_vector(batches, False, CUDA), optimizer, PLACE, clip=1.0, memory=lambda: 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_limit_after() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def test_a_limit_holds(no_limit_after: None) -> None:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() / 2**30
    cfg = build(random_init="x", dataset="synthetic_dataset", gpu_memory_limit=held + 1)
    recompute.limit(cfg, PLACE)
    torch.empty(2**29, dtype=torch.uint8, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * 2**30, dtype=torch.uint8, device=CUDA)
