"""Sums and agreements over real ranks, and the harness's own promises."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from ranks import run_ranks

from packtrain.distributed.collectives import same_on_all, sum_
from packtrain.distributed.place import Place
from packtrain.errors import Fault


def sums(place: Place, x: float) -> float:
    return sum_(torch.tensor(x), place).item()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sum_over_all_ranks(world: int) -> None:
    assert run_ranks(sums, world, 3.0) == [3.0 * world] * world


def digests(place: Place, odd: tuple[int, ...]) -> str:
    same_on_all(place, "settings", "abc")
    try:
        same_on_all(place, "data", "odd" if place.rank in odd else "abc")
    except Fault as fault:
        return str(fault)
    return ""


def test_a_digest_at_odds_is_named_on_every_rank() -> None:
    assert run_ranks(digests, 3, ()) == [""] * 3
    texts = run_ranks(digests, 3, (1, 2))
    assert len(set(texts)) == 1
    assert "data of rank 1, 2 differs from rank 0's" in texts[0]


def returns_a_tensor(place: Place) -> Any:
    return torch.full((2,), place.rank), os.getpid()


def test_harness_returns_tensors_and_leaves_no_process() -> None:
    results = run_ranks(returns_a_tensor, 2)
    assert [value.tolist() for value, _ in results] == [[0, 0], [1, 1]]
    assert not any(os.path.exists(f"/proc/{pid}/status") for _, pid in results)


def fails(place: Place) -> None:
    if place.rank == 1:
        raise ValueError("bad row")
    sum_(torch.ones(1), place)


def test_harness_tells_the_cause_before_its_echo() -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        run_ranks(fails, 2)
    text = str(caught.value)
    assert text.startswith("rank 1: Traceback")
    assert "ValueError: bad row" in text
    assert "rank 0: Traceback" in text


def hangs(place: Place) -> None:
    if place.rank == 1:
        time.sleep(60)
    sum_(torch.ones(1), place)


def test_harness_ends_a_hang_and_says_where_it_was() -> None:
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[0, 1\] of 2 did not answer within 1 s") as caught:
        run_ranks(hangs, 2, timeout=1)
    assert "in hangs" in str(caught.value)
    assert time.monotonic() - began < 10
