"""Layers' inputs on the host: a step's bits are the same, nothing stays on the device, memory is taken once."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from test_fast import CPU, FLOAT8, FP32, batch, made, run, whole

from packtrain.errors import Fault
from packtrain.model import fast, long_rows, offload
from packtrain.model.llama import blocks

LAYERS, WIDTH = 3, 64


def plain(model: Any) -> Any:
    for block in blocks(model):
        block.recompute = True
    return model


MODELS: dict[str, Callable[[fast.Recompute], Any]] = {
    "plain": lambda how: plain(made(None)),
    "plain, full": lambda how: plain(whole(None)),
    "fused": lambda how: made(FP32, how),
    "fused, full": lambda how: whole(FP32, how),
    "float8": lambda how: made(FLOAT8, how),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts a layer, the last one shorter."""
    monkeypatch.setattr(offload, "PART", 5 * WIDTH * 4)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name: str, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "LONG", 20 if long else 1000)
    monkeypatch.setattr(long_rows, "PIECE", 16)
    exact, ours = MODELS[name]("full"), MODELS[name]("offload")
    away = offload.install(blocks(ours), CPU)
    for data in (batch(), batch((9, 9), seed=3), batch((50, 7), seed=4)):
        expected, found = run(exact, data), run(ours, data)
        assert torch.equal(expected[0], found[0])
        assert expected[1].keys() == found[1].keys()
        assert all(torch.equal(expected[1][key], found[1][key]) for key in found[1])
    assert away.host_bytes == LAYERS * (50 + 7 + 5) * WIDTH * 4  # of the longest


def test_what_comes_back_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other numbers on the host the gradients are others."""
    exact, ours = run(made(FP32, "full"), batch()), made(FP32, "offload")
    offload.install(blocks(ours), CPU)
    right = offload._copy

    def other(tensor: Tensor, room: list[Tensor], *, out: bool) -> None:
        right(tensor, room, out=out)
        if not out:
            tensor.mul_(2)

    monkeypatch.setattr(offload, "_copy", other)
    assert any(not torch.equal(exact[1][key], made_) for key, made_ in run(ours, batch())[1].items())


def test_only_the_last_stays_and_each_comes_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[weakref.ref[Tensor]] = []
    fetched: list[int] = []
    leave, fetch = offload.Away._leave, offload.Away._fetch

    def leaving(self: offload.Away, place: int, tensor: Tensor) -> Any:
        left.append(weakref.ref(tensor))
        return leave(self, place, tensor)

    def fetching(self: offload.Away, kept: Any) -> Any:
        fetched.append(kept.place)
        return fetch(self, kept)

    monkeypatch.setattr(offload.Away, "_leave", leaving)
    monkeypatch.setattr(offload.Away, "_fetch", fetching)
    model = made(FP32, "offload")
    offload.install(blocks(model), CPU)
    loss = model(batch())
    assert [reference() is not None for reference in left] == [False, False, True]
    assert fetched == []
    loss.backward()
    assert fetched == [1, 0]  # the last was still there


def test_memory_is_taken_once_and_left_alone_by_evaluation() -> None:
    model = made(FP32, "offload")
    away = offload.install(blocks(model), CPU)
    with torch.no_grad():
        model.eval()(batch())
    assert away.host_bytes == 0
    model.train()
    run(model, batch())
    places = [part.data_ptr() for parts in away._host for part in parts]
    model(batch())  # no backward follows
    exact, again = made(FP32, "full"), model
    run(exact, batch())
    expected, found = run(exact, batch()), run(again, batch())
    assert all(torch.equal(expected[1][key], found[1][key]) for key in found[1])
    assert [part.data_ptr() for parts in away._host for part in parts] == places


def test_a_host_without_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(FP32, "offload")
    away = offload.install(blocks(model), CPU)
    right = torch.empty

    def empty(*shape: Any, **settings: Any) -> Tensor:
        if "pin_memory" in settings and away.host_bytes > 0:
            raise RuntimeError("CUDA error: out of memory\nCompile with ...")
        return right(*shape, **settings)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(Fault, match=r"offload: the host gave no more pinned memory .* \(CUDA error: out of memory\)"):
        model(batch())
