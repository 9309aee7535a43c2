"""When a failed run is tried again, and the sentence when it is not."""

from __future__ import annotations

import signal

import pytest

from packtrain.distributed.restarts import Failure, Restarts, is_outside, oom_kills
from packtrain.errors import EXIT_FAULT, EXIT_USER


def failures(*found: tuple[str, int], outside: bool = False) -> list[Failure]:
    return [Failure(0, text, EXIT_FAULT, step, outside=outside) for text, step in found]


def verdicts(limit: int, found: list[Failure]) -> list[str | None]:
    restarts = Restarts(limit)
    return [restarts.refuse(failure) for failure in found]


def test_nobody_asked() -> None:
    assert verdicts(0, failures(("x", 1))) == [""]


def test_the_users_error_is_theirs() -> None:
    assert verdicts(5, [Failure(0, "no such file", EXIT_USER, 0)]) == [""]


def test_as_often_as_asked() -> None:
    found = verdicts(2, failures(("a", 1), ("b", 2), ("c", 3)))
    assert found == [None, None, "not started again: --max_restarts 2 is used up"]


def test_the_same_failure_twice() -> None:
    found = verdicts(9, failures(("a", 7), ("a", 7)))
    assert found == [None, "not started again: the same failure came at step 7 before"]
    assert verdicts(9, failures(("a", 7), ("b", 7), ("c", 8), ("a", 9))) == [None] * 4


def test_kills_from_outside_say_nothing_until_they_come_thrice_without_progress() -> None:
    kills = failures(("SIGKILL", 7), ("SIGKILL", 7), ("SIGKILL", 6), outside=True)
    assert verdicts(9, kills) == [None, None, "not started again: 3 tries in a row ended at step 6 or before"]
    assert verdicts(9, failures(*[("SIGKILL", step) for step in (3, 3, 4, 4, 5, 5)], outside=True)) == [None] * 6


def test_memory_is_as_short_the_next_time() -> None:
    (found,) = verdicts(9, [Failure(0, "x", EXIT_FAULT, 3, out_of_memory=True)])
    assert found is not None
    assert found.startswith("not started again: memory would run out again")


@pytest.mark.parametrize(("number", "outside"), [(signal.SIGKILL, True), (signal.SIGSEGV, False), (-3, False)])
def test_what_comes_from_outside(number: int, outside: bool) -> None:
    assert is_outside(number) == outside


def test_the_kernels_count_does_not_fall() -> None:
    assert 0 <= oom_kills() <= oom_kills()
