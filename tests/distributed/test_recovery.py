"""Whole runs of two ranks through deaths, hangs and signals: nothing is lost, nobody is left, one reason is told.

A fault is a function that patches the launcher before the workers are forked from it, so they have it too.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from launches import Launched, listening, result_of, until
from recovery import (
    CLOCK,
    STEPS,
    Fault,
    Property,
    Run,
    before_step,
    first_error,
    mark,
    same,
    saved,
    step_of,
    told,
    words,
    work,
)
from runs import column, lines

from packtrain import finetuning, preflight
from packtrain.checkpoint.dcp_folder import complete
from packtrain.checkpoint.dcp_run import Checkpoints
from packtrain.distributed import parent
from packtrain.train import evaluate
from packtrain.train.loop import Loop

# ---- deaths


def kills_each_rank_in_turn(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if (parent.attempt(), step, self.place.rank) in {(0, 4, 0), (1, 7, 1)}:
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(action)


def test_ranks_that_are_killed_are_replaced_and_the_run_is_the_same_to_the_last_bit(
    run: Run, tmp_path: Path, whole: Path, record_property: Property
) -> None:
    one = run(kills_each_rank_in_turn, max_restarts=2)
    assert one.end(60) == 0, one.said
    found, expected = (
        [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(out)] for out in (tmp_path / "out", whole)
    )
    assert len(expected) > STEPS  # evaluations have lines too
    equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=False))
    record_property("M4", f"{equal} of {max(len(found), len(expected))}")
    same(tmp_path / "out", whole)
    result = result_of(tmp_path / "out")
    assert (result["status"], result["restarts"]) == ("done", 2)
    assert one.said.count("started again") == 2
    told(one.said, "packtrain: rank 0 (process", record_property)
    assert "was ended by SIGKILL" in first_error(one.said)


def kills_two_of_four(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if (parent.attempt(), step, self.place.rank) in {(0, 4, 3), (1, 7, 2)}:
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(action)


@pytest.mark.slow
def test_four_ranks_as_well(home: Path, run: Run, tmp_path: Path) -> None:
    four = {"nproc_per_node": 4, "batch_size_training": 1}
    (tmp_path / "whole").mkdir()
    unbroken = Launched(tmp_path / "whole", work, None, tmp_path, words(home, tmp_path / "whole/out", **four))
    assert unbroken.end(90) == 0, unbroken.said
    one = run(kills_two_of_four, max_restarts=2, **four)
    assert one.end(90) == 0, one.said
    same(tmp_path / "out", tmp_path / "whole/out")
    assert result_of(tmp_path / "out")["restarts"] == 2


def test_kills_at_any_time_are_recovered_from_within_seconds(run: Run, tmp_path: Path) -> None:
    """The short form of bench/restarts.py."""
    one = run(max_restarts=5, num_epochs=1000, run_validation=False, save_steps=10)
    out, seconds, twice = tmp_path / "out", [], []
    until(lambda: step_of(out) > 10, 60, "no step")
    for number in range(5):
        time.sleep(0.13 * (number + 1))
        os.kill(one.workers()[number % 2], signal.SIGKILL)
        began, seen = time.monotonic(), [step_of(out)]

        def gone_on(times: int = number + 1, seen: list[int] = seen) -> bool:
            """The worker that is left may still write down the step in which the other died."""
            seen.append(step_of(out))
            return one.said.count(", after step ") == times

        until(gone_on, 20, "it does not go on")
        before = max(seen)
        until(lambda before=before: step_of(out) > before, 20, "no new step")
        seconds.append(time.monotonic() - began)
        twice.append(before - int(one.said.rpartition(", after step ")[2].split()[0]))
        until(lambda before=before: step_of(out) > before + 12, 20, "no progress")
    one.send(signal.SIGTERM)
    assert one.end() == 75
    numbers = column(lines(out), "step")
    assert numbers == list(range(1, len(numbers) + 1))
    assert max(twice) <= 10 + 1
    assert sorted(seconds)[2] < 5  # under a second where nothing else runs
    assert not one.alive()


def raises_on_rank_1(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if step == 3 and self.place.rank == 1:
            raise ValueError("bad row")

    before_step(action)


def test_the_first_cause_is_told_first_once_and_with_its_rank(
    run: Run, tmp_path: Path, record_property: Property
) -> None:
    one = run(raises_on_rank_1)
    until(lambda: "bad row" in one.said, 60, "nothing was said")
    began = time.monotonic()
    assert one.end() == 1
    assert time.monotonic() - began < 5
    assert not one.alive()
    told(one.said, "packtrain: rank 1: ValueError: bad row", record_property)
    errors = one.said[one.said.index("packtrain: rank 1") :].splitlines()
    assert errors[0] == "packtrain: rank 1: ValueError: bad row"
    assert errors[1].endswith("Traceback (most recent call last):")
    assert errors[-1].endswith("ValueError: bad row")
    assert one.said.count("Traceback") == 1, one.said
    result = result_of(tmp_path / "out")
    assert (result["status"], result["reason"]) == ("failed", "ValueError: bad row")


def test_an_error_that_comes_again_is_not_tried_a_third_time(run: Run) -> None:
    one = run(raises_on_rank_1, max_restarts=9)
    assert one.end() == 1
    assert one.said.count("packtrain: rank 1: ValueError: bad row") == 2
    assert one.said.splitlines()[-1] == "packtrain: not started again: the same failure came at step 2 before"


def hangs_once(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if step == 5 and self.place.rank == 1 and parent.attempt() == 0:
            mark(folder, "hangs")
            time.sleep(60)

    before_step(action)


def test_a_run_that_hangs_is_told_where_and_goes_on(
    run: Run, tmp_path: Path, whole: Path, record_property: Property
) -> None:
    one = run(hangs_once, max_restarts=1, hang_timeout=2)
    until((tmp_path / "hangs").exists, 60, "did not come to it")
    began = time.monotonic()
    until(lambda: "has not moved" in one.said, 20, "no verdict")
    beyond = time.monotonic() - began - 2
    assert beyond < 1
    assert one.end() == 0, one.said
    same(tmp_path / "out", whole)
    assert "rank 0" not in one.said
    assert "in action" in one.said
    told(one.said, "packtrain: rank 1 (process", record_property)
    assert "it was at " in first_error(one.said)


def killed_when_it_has_begun(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if step == 4 and parent.attempt() == 0:
            saved(folder / "out", 2)
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(action)


def test_a_second_try_overwrites_nothing(run: Run, tmp_path: Path, whole: Path) -> None:
    """The earlier run's checkpoints go out of the way once; the first try's are gone on with."""
    assert run(num_epochs=1).end(60) == 0
    one = run(killed_when_it_has_begun, max_restarts=1, overwrite_output_dir=True)
    assert one.end(60) == 0, one.said
    assert "after step 2\n" in one.said
    same(tmp_path / "out", whole)
    assert (tmp_path / "out/run.old-1").exists()
    assert not (tmp_path / "out/run.old-2").exists()


def test_a_killed_launcher_leaves_nobody_and_the_same_command_goes_on(run: Run, tmp_path: Path, whole: Path) -> None:
    one = run(slow_steps)
    saved(tmp_path / "out", 2)
    assert len(one.workers()) == 2
    one.send(signal.SIGKILL)
    until(lambda: not one.alive(), 5, "orphans")
    again = run()
    assert again.end(60) == 0, again.said
    assert "after step 2\n" in again.said
    same(tmp_path / "out", whole)


def slow_steps(folder: Path) -> None:
    before_step(lambda self, step: time.sleep(0.3))


def test_while_it_runs_it_listens_on_loopback_alone_and_owns_its_folder(
    run: Run, home: Path, tmp_path: Path, record_property: Property
) -> None:
    one = run(slow_steps)
    until(lambda: step_of(tmp_path / "out") >= 1, 60, "no step")
    workers = one.workers()
    found = [address for pid in (one.process.pid, one.zygote(), *workers) for address in listening(pid or 0)]
    assert len(found) >= 3
    assert all(address.startswith("127.") for address in found), found
    folder = tmp_path / "second"
    folder.mkdir()
    flags = words(home, tmp_path / "out")
    second = Launched(folder, work, None, folder, flags)
    assert second.end(60) == 2
    owner = f"in use by process {workers[0]} on {socket.gethostname()}"
    told(second.said, owner, record_property)
    one.send(signal.SIGTERM)
    assert one.end() == 75


def test_code_of_the_user_that_ends_the_process_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.py"
    file.write_text("import sys\n\n\ndef get_custom_dataset(config, tokenizer, split):\n    sys.exit(3)\n")
    one = run(dataset="custom_dataset", custom_dataset__file=file, train_split=None, test_split=None, max_restarts=3)
    assert one.end(60) == 2
    errors = [line for line in one.said.splitlines() if line.startswith("packtrain:")]
    assert len(errors) == 1, one.said
    assert f"{file}, line 5: the process was ended there (sys.exit, code 3)" in errors[0]


# ---- signals


def while_tokenising(folder: Path) -> None:
    tokenize = preflight.tokenize
    preflight.tokenize = lambda *a, **k: (mark(folder, "there"), tokenize(*a, **k))[1]  # type: ignore[attr-defined]


def while_loading(folder: Path) -> None:
    build = finetuning.build
    finetuning.build = lambda *a, **k: (mark(folder, "there"), build(*a, **k))[1]  # type: ignore[attr-defined]


def in_the_first_step(folder: Path) -> None:
    before_step(lambda self, step: mark(folder, "there") if step == 1 else None)


def in_a_step(folder: Path) -> None:
    before_step(lambda self, step: mark(folder, "there") if step == 7 and self.place.rank == 1 else None)


def while_evaluating(folder: Path) -> None:
    """Every batch of a hundred takes a while."""
    sum_ = evaluate.sum_
    evaluate.sum_ = lambda *a: ((folder / "there").touch(), time.sleep(0.1), sum_(*a))[2]  # type: ignore[attr-defined]


def while_saving(folder: Path) -> None:
    save = Checkpoints.save

    def slowly(self: Checkpoints, state: Any, **how: Any) -> float:
        if state["step"] == 4:
            mark(folder, "there")
        return save(self, state, **how)

    Checkpoints.save = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "number", "steps"),
    [
        (while_tokenising, signal.SIGUSR1, None),
        (while_loading, signal.SIGINT, None),
        (in_the_first_step, signal.SIGTERM, {1}),
        (in_a_step, signal.SIGTERM, {7}),
        (in_a_step, signal.SIGUSR1, {7}),
        (while_evaluating, signal.SIGTERM, {4}),
        (while_saving, signal.SIGINT, {4, 5}),
    ],
)
def test_a_signal_at_any_time_ends_within_seconds_and_nothing_is_lost(
    fault: Fault, number: signal.Signals, steps: set[int] | None, run: Run, tmp_path: Path, whole: Path
) -> None:
    one, out = run(fault), tmp_path / "out"
    until((tmp_path / "there").exists, 60, f"never came to it: {one.said}")
    one.workers()
    one.send(number)
    began = time.monotonic()
    assert one.end() == 75, one.said
    seconds = time.monotonic() - began
    assert not one.alive()
    assert "Traceback" not in one.said
    assert number.name in one.said
    if steps is not None:
        result = result_of(out)
        assert (result["status"], number.name in result["reason"]) == ("stopped", True)
        assert max(complete(out / "checkpoints")) == result["step"] == max(column(lines(out), "step"))
        assert result["step"] in steps
    assert seconds < 6  # M10 of the scorecard is 2, where nothing else runs
    if steps is not None and number is not signal.SIGUSR1:
        again = run()
        assert again.end(60) == 0, again.said
        same(out, whole)


def test_from_sigterm_to_the_end_of_a_run_in_full_swing(run: Run, tmp_path: Path) -> None:
    one, out = run(num_epochs=1000, run_validation=False, save_steps=1000), tmp_path / "out"
    until(lambda: step_of(out) > 10, 60, "no step")
    one.send(signal.SIGTERM)
    began = time.monotonic()
    assert one.end() == 75
    assert time.monotonic() - began < 10  # M10 of the scorecard is 2
    assert step_of(out) == max(complete(out / "checkpoints"))


def saves_for_ever(folder: Path) -> None:
    save = Checkpoints.save

    def slowly(self: Checkpoints, state: Any, **how: Any) -> float:
        if state["step"] > 2:
            (folder / "there").touch()
            time.sleep(60)
        return save(self, state, **how)

    Checkpoints.save = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["second signal", "grace"])
def test_what_has_not_ended_is_ended_and_what_was_saved_before_stands(
    how: str, run: Run, tmp_path: Path, whole: Path
) -> None:
    one, out = run(saves_for_ever, grace_seconds=1 if how == "grace" else 30), tmp_path / "out"
    until((tmp_path / "there").exists, 60, "never came to it")
    one.workers()
    one.send(signal.SIGINT)
    if how == "second signal":
        time.sleep(0.7)
        one.send(signal.SIGINT)
    began = time.monotonic()
    assert one.end() == 1
    assert time.monotonic() - began < 3
    assert not one.alive()
    result = result_of(out)
    told = "stopped at once by a second signal" if how == "second signal" else "had not ended 1 s after a signal"
    assert (result["status"], told in result["reason"]) == ("failed", True)
    assert max(complete(out / "checkpoints")) == 2
    again = run()
    assert again.end(60) == 0, again.said
    same(out, whole)


@pytest.mark.parametrize("how", ["one", "two", "grace"])
def test_one_process_alone_keeps_the_same_times(how: str, run: Run, tmp_path: Path) -> None:
    """Without a launcher the process itself does so, whatever its main thread is stuck in."""
    fault, grace = {"one": (in_a_step_of_rank_0, 30), "two": (saves_for_ever, 30), "grace": (saves_for_ever, 1)}[how]
    one, out = run(fault, nproc_per_node=1, batch_size_training=4, grace_seconds=grace), tmp_path / "out"
    until((tmp_path / "there").exists, 60, "never came to it")
    one.send(signal.SIGTERM)
    if how == "two":
        time.sleep(0.7)
        one.send(signal.SIGTERM)
    began = time.monotonic()
    assert one.end() == (75 if how == "one" else 1)
    assert time.monotonic() - began < 4
    assert result_of(out)["status"] == ("stopped" if how == "one" else "failed")
    assert max(complete(out / "checkpoints")) == (7 if how == "one" else 2)


def in_a_step_of_rank_0(folder: Path) -> None:
    before_step(lambda self, step: mark(folder, "there") if step == 7 else None)
