"""Layers that live on the host: the same bits as layers that stay, few copies, each made ahead, and none read early."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_fast import CPU, FLOAT8, FP32, QV, adapters, bare, batch, filled, run
from torch import Tensor

import tiny
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import load_model, save_model
from packtrain.distributed.parallelize import materialise
from packtrain.kernels.rows import Form
from packtrain.model import fast, streaming
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.model.shared import linears
from packtrain.peft.settings import LoraSettings
from packtrain.peft.trainable import freeze

LAYERS = 7


class Late(streaming._Lane):
    """Copies come at the last moment, and until then there is no number in their place: as bad as a GPU may be."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(self, slot: int, to: Tensor, home: Tensor) -> None:
        to.fill_(255)
        self.pending[slot] = to, home

    def wait(self, slot: int) -> None:
        if slot in self.pending:
            to, home = self.pending.pop(slot)
            to.copy_(home)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_Lane", Late)


def made(form: Form, recompute: fast.Recompute, settings: LoraSettings, hosted: Sequence[int]) -> LlamaForCausalLM:
    model = bare(settings, num_hidden_layers=LAYERS)
    fast.install(model, form, recompute)
    assert streaming.streamable(model) == list(range(LAYERS))
    if hosted:
        streaming.install(model, hosted, CPU)
    fast.allocate(model, CPU)
    return filled(model)


def steps(model: LlamaForCausalLM) -> list[Tensor]:
    """Losses and gradients of micro-batches, of one after an evaluation, and of one after a forward alone."""
    found = [*everything(run(model, batch())), *everything(run(model, batch((9, 30), seed=1)))]
    model.eval()
    with torch.no_grad():
        found += [model(batch()), model(batch(seed=2))]
    model.train()
    found += everything(run(model, batch(seed=3)))
    found.append(model(batch()).detach())
    return [*found, *everything(run(model, batch(seed=4)))]


def everything(found: tuple[Tensor, dict[str, Tensor]]) -> Iterator[Tensor]:
    yield found[0]
    yield from (gradient.clone() for gradient in found[1].values())


SOME = adapters(r"model\.layers\.[0136]\.self_attn\.[qo]_proj")


@pytest.mark.parametrize(
    ("form", "recompute", "settings", "hosted"),
    [
        (FP32, "none", adapters(), range(LAYERS)),
        (FP32, "selective", adapters(QV, r=5, lora_dropout=0.2), (0, 2, 3, 6)),
        (FP32, "full", SOME, (0, 1, 2, 4, 6)),
        (FP32, "selective", adapters(), (1, 5)),
        (FLOAT8, "none", SOME, (0, 1, 2, 4, 6)),
        (FLOAT8, "selective", adapters(), range(LAYERS)),
        (FLOAT8, "full", adapters(QV, r=5, lora_dropout=0.2), (0, 2, 3, 6)),
    ],
)
def test_the_bits_are_those_of_layers_that_stay(
    form: Form, recompute: fast.Recompute, settings: LoraSettings, hosted: Sequence[int], late: None
) -> None:
    ours, theirs = made(form, recompute, settings, hosted), made(form, recompute, settings, ())
    for found, expected in zip(steps(ours), steps(theirs), strict=True):
        assert torch.equal(found, expected)


def test_a_copy_that_is_read_too_early_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(streaming, "_Lane", Late)
    monkeypatch.setattr(Late, "wait", lambda self, slot: None)
    model = made(FP32, "none", adapters(), range(LAYERS))
    assert run(model, batch())[0].isnan()


def conveyor(count: int) -> tuple[streaming.Conveyor, list[int]]:
    """Of homes that hold their number, and a list of what it copies."""
    copied: list[int] = []
    made = streaming.Conveyor([torch.full((8,), number, dtype=torch.uint8) for number in range(count)], CPU)
    copy = made._lane.copy

    def counted(slot: int, to: Tensor, home: Tensor) -> None:
        copied.append(int(home[0]))
        copy(slot, to, home)

    made._lane.copy = counted  # type: ignore[method-assign]
    return made, copied


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_step_copies_no_layer_that_is_still_there(count: int) -> None:
    made, copied = conveyor(count)
    for step in range(3):
        for way in (range(count), range(count - 1, -1, -1)):
            for number in way:
                before = len(copied)
                assert made.take(number, returns=True).unique().tolist() == [number]
                assert step == 0 or number not in copied[before:]  # it came ahead
        ups = max(0, count - streaming.SLOTS)
        first = list(range(count)) if step == 0 else list(range(count - ups, count))
        assert copied == [*first, *range(ups - 1, -1, -1)]
        copied.clear()


def test_evaluations_follow_one_another() -> None:
    made, copied = conveyor(9)
    for number in [*range(9), *range(8, -1, -1)]:
        made.take(number, returns=True)
    copied.clear()
    for _ in range(3):
        for number in range(9):
            before = len(copied)
            assert made.take(number, returns=False).unique().tolist() == [number]
            assert number not in copied[before:]
    assert len(copied) == 3 * 9 - 1  # 0, 1 and 2 were there, and 0 and 1 are again


@pytest.mark.parametrize("count", range(1, 33))
def test_layers_are_spread(count: int) -> None:
    found = streaming.spread(range(32), count)
    assert len(set(found)) == count
    assert count == 1 or (found[0], found[-1]) == (0, 31)
    gaps = {b - a for a, b in pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (512, 512), (513, 1024), (3 * 2**27, 2**29)])
def test_what_is_pinned_is_a_power_of_two(size: int, taken: int) -> None:
    assert streaming.pinned_bytes(size) == taken


def test_what_a_layer_takes() -> None:
    model = made(FP32, "none", adapters(), (1, 4))
    layer = blocks(model)[4]
    home = layer.self_attn.qkv_proj.weight.untyped_storage()
    assert streaming.layer_bytes(layer, FP32) == home.nbytes()
    assert all(linear.weight.untyped_storage().data_ptr() == home.data_ptr() for linear in linears(layer))
    assert home.nbytes() >= sum(linear.weight.nbytes for linear in linears(layer))


def test_frozen_layers_of_a_model_that_trains_whole(tmp_path: Path) -> None:
    """Read into the host's memory, and written from there with what has been trained."""
    source = HfFolder(tiny.model(tmp_path / "base", num_hidden_layers=LAYERS))
    config = LlamaConfig.from_dict(json.loads((source.path / "config.json").read_text(encoding="utf-8")))
    models = []
    for streams in (True, False):
        model = LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("meta"))
        for block in blocks(model)[:5]:
            freeze(block)
        fast.install(model, FP32, "selective")
        assert streaming.streamable(model) == [0, 1, 2, 3, 4]
        if streams:
            streaming.install(model, [0, 1, 2, 3, 4], CPU)
        fast.allocate(model, CPU)
        materialise(model, CPU)
        load_model(model, source)
        models.append(model.train())
    found, expected = (run(model, batch()) for model in models)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    save_model(models[0], tmp_path / "out", {})
    saved = HfFolder(tmp_path / "out")
    for name, slot in source.slots.items():
        assert torch.equal(saved.rows(name, 0, slot.shape[0]).float(), source.rows(name, 0, slot.shape[0]).float())


def test_random_weights_are_those_of_layers_that_stay() -> None:
    ours, theirs = made(FP32, "none", adapters(), (0, 3)), made(FP32, "none", adapters(), ())
    for model in (ours, theirs):
        draw(model, 7)
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, expected), name
