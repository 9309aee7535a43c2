"""The launcher with real workers: exit codes, signals, restarts, hangs, first causes, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launches import Launched, listening, until

from packtrain.distributed.launch import start_workers


class Workers(Launched):
    """`start_workers` over launch_worker.py."""

    def __init__(self, case: str, folder: Path, nproc: int = 2, **options: Any) -> None:
        super().__init__(folder, _launch, case, folder, nproc, options)
        self.nproc = nproc

    def wait_ready(self) -> None:
        """Until every worker has said that it is ready."""
        until(lambda: len(list(self.folder.glob("ready-*"))) == self.nproc, 40, "the workers did not get ready")
        self.workers()

    def go(self, text: str = "") -> None:
        """Let the waiting workers go on."""
        (self.folder / "go.new").write_text(text)
        (self.folder / "go.new").rename(self.folder / "go")

    def told(self, rank: int, attempt: int = 0) -> dict[str, Any]:
        """A worker's process id and environment."""
        found: dict[str, Any] = json.loads((self.folder / f"worker-{rank}-{attempt}").read_text())
        return found


def _launch(case: str, folder: Path, nproc: int, options: dict[str, Any]) -> int:
    return start_workers([case, str(folder)], nproc, **options, entry="launch_worker:main", modules=()).exit_code


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    """`launch(case, nproc, **options)`; whatever happens, no worker outlives its launcher."""
    launched: list[Workers] = []

    def start(case: str, nproc: int = 2, **options: Any) -> Workers:
        launched.append(Workers(case, tmp_path, nproc, **options))
        return launched[-1]

    yield start
    for one in launched:
        one.close()


Launch = Callable[..., Workers]


def test_workers_know_their_place(launch: Launch) -> None:
    run = launch("done", 3)
    assert (run.end(), run.said) == (0, "")
    for rank in range(3):
        env = run.told(rank)["env"]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["PACKTRAIN_WORKER"]) == ("3", "3", "1")
        assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
        assert env["PACKTRAIN_STORE"].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("case", "code", "says"),
    [
        ("wrong_input", 2, ""),
        ("fault", 1, "ended with exit code 3 and without a word"),
        ("killed", 1, "was ended by SIGKILL; the kernel does that when memory runs out"),
    ],
)
def test_the_first_failure_decides(launch: Launch, case: str, code: int, says: str) -> None:
    run = launch(case)  # the other worker would sleep for 60 s
    assert run.end() == code
    assert run.said.count("\n") == bool(says)
    assert run.said.startswith("packtrain: rank 1 (process ") == bool(says)
    assert says in run.said
    assert not run.alive()


def test_a_crash_is_told_with_the_place_in_python(launch: Launch) -> None:
    run = launch("crashes")
    assert run.end() == 1
    assert "Fatal Python error: Segmentation fault" in run.said
    assert "launch_worker.py" in run.said
    assert "at the start was ended by SIGSEGV" in run.said.splitlines()[-1]


def test_a_worker_that_ignores_sigterm_is_gone_within_five_seconds(launch: Launch) -> None:
    run = launch("ignores_sigterm")
    run.wait_ready()
    run.go()
    began = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - began < 5
    assert not run.alive()


# signals


@pytest.mark.parametrize(
    ("case", "number", "code"),
    [
        ("stops_at_sigterm", signal.SIGTERM, 75),
        ("stops_at_sigusr1", signal.SIGUSR1, 75),
        ("has_no_handler_yet", signal.SIGINT, 75),
        ("ignores_sigterm", signal.SIGTERM, 1),
    ],
)
def test_signals_reach_every_worker(launch: Launch, case: str, number: signal.Signals, code: int) -> None:
    run = launch(case, grace=0.5)
    run.wait_ready()
    run.send(number)
    assert run.end() == code
    assert ("had not ended 0.5 s after a signal to stop" in run.said) == (code == 1)
    assert run.said.count("\n") == (code == 1)
    assert not run.alive()


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(launch: Launch) -> None:
    run = launch("ignores_sigterm")
    run.wait_ready()
    for _ in range(3):  # as from a terminal and srun
        run.send(signal.SIGTERM)
        time.sleep(0.05)
    time.sleep(0.6)
    assert len(run.workers()) == 2
    run.send(signal.SIGINT)
    began = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - began < 2
    assert "stopped at once by a second signal" in run.said
    assert not run.alive()


def test_the_same_order_told_twice_counts_once(launch: Launch) -> None:
    run = launch("stops_at_sigterm")
    run.wait_ready()
    for worker in run.workers():  # Slurm tells every process of a step
        os.kill(worker, signal.SIGTERM)
    run.send(signal.SIGTERM)
    assert (run.end(), run.said) == (75, "")


def test_one_that_was_stopped_alone_does_not_leave_the_others_waiting(launch: Launch) -> None:
    run = launch("stopped_alone", grace=5)
    assert (run.end(4), run.said) == (75, "")
    assert not run.alive()


def test_workers_end_with_a_killed_launcher(launch: Launch) -> None:
    run = launch("with_place")
    run.wait_ready()
    assert len(run.workers()) == 2
    run.send(signal.SIGKILL)
    until(lambda: not run.alive(), 5, "orphans")


# first causes


@pytest.mark.parametrize(
    ("then", "says"), [("die", "packtrain: rank 1 (process "), ("raise", "error: rank 1: bad row")]
)
def test_only_the_first_cause_is_told_and_nothing_listens_outside(launch: Launch, then: str, says: str) -> None:
    run = launch("with_place")
    run.wait_ready()
    assert {path.read_text() for path in run.folder.glob("ready-*")} == {"3.0"}
    found = [address for pid in (run.process.pid, *run.workers()) for address in listening(pid or 0)]
    assert len(found) >= 3  # the store, and gloo in each worker
    assert all(address.startswith("127.") for address in found), found
    run.go(then)
    assert run.end() == 1
    assert run.said.startswith(says), run.said
    assert run.said.count("\n") == 1, run.said


def test_a_wildcard_listener_would_be_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert any(address.startswith("0.0.0.0:") for address in listening(os.getpid()))


# restarts


def test_a_worker_that_dies_is_replaced_after_all_of_its_try_are_gone(launch: Launch) -> None:
    run = launch("killed_once", max_restarts=1)
    assert run.end() == 0, run.said
    assert "packtrain: started again (1 of 1), from the newest checkpoint" in run.said
    assert [run.told(rank, 1)["others"] for rank in range(2)] == [[], []]
    assert [run.told(rank, 1)["env"]["PACKTRAIN_ATTEMPT"] for rank in range(2)] == ["1", "1"]
    assert run.told(0, 0)["env"]["PACKTRAIN_LAUNCH"] == run.told(0, 1)["env"]["PACKTRAIN_LAUNCH"]


def test_what_workers_come_from_is_replaced_too(launch: Launch) -> None:
    run = launch("has_no_handler_yet", max_restarts=1)
    run.wait_ready()
    workers = run.workers()
    os.kill(run.zygote(), signal.SIGKILL)
    until(lambda: run.folder.joinpath("worker-1-1").exists(), 10, "no second try")
    assert not set(workers) & set(run.alive())
    run.send(signal.SIGTERM)
    assert run.end() == 75


@pytest.mark.parametrize(
    ("case", "tries", "says"),
    [
        ("wrong_input", 1, None),
        ("fails_at_step_3", 2, "not started again: the same failure came at step 3 before"),
        ("killed", 3, "not started again: 3 tries in a row ended at the start or before"),
    ],
)
def test_what_would_come_again_is_not_tried_again(launch: Launch, case: str, tries: int, says: str | None) -> None:
    run = launch(case, max_restarts=10)
    assert run.end() == (2 if case == "wrong_input" else 1)
    assert len(list(run.folder.glob("worker-0-*"))) == tries
    assert says is None or run.said.splitlines()[-1] == f"packtrain: {says}"


def test_progress_is_a_reason_to_go_on(launch: Launch) -> None:
    run = launch("fails_a_step_further_each_time", max_restarts=4)
    assert run.end() == 0, run.said
    assert run.said.count("started again") == 4


def test_want_of_memory_is_not_tried_again(launch: Launch) -> None:
    run = launch("with_place", max_restarts=3)
    run.wait_ready()
    run.go("memory")
    assert run.end() == 1
    assert run.said.splitlines()[0] == "error: rank 1: no more"
    assert "not started again: memory would run out again" in run.said


# hangs


@pytest.mark.parametrize("case", ["sleeps", "holds_the_lock", "stop"])
def test_a_rank_that_stands_still_is_named_with_its_stack(launch: Launch, case: str) -> None:
    run = launch("rests" if case == "stop" else case, hang_timeout=1.5)
    run.wait_ready()
    began = time.monotonic()
    if case == "stop":
        os.kill(run.workers()[1], signal.SIGSTOP)
    until(lambda: "has not moved" in run.said, 10, "no verdict")
    assert time.monotonic() - began < 1.5 + 1 + (0.4 if case != "stop" else 0)
    assert run.end(5) == 1
    lines = run.said.splitlines()
    assert sum("has not moved" in line for line in lines) == 1, run.said
    assert lines[0].startswith(f"packtrain: rank 1 (process {run.told(1)['pid']}")
    assert ("stopped by a signal" in lines[0]) == (case == "stop")
    assert ("it was at step 2" in lines[0]) == (case != "stop")
    assert lines[1].startswith("    File ")
    assert any("launch_worker.py" in line for line in lines[1:])
    assert not run.alive()


def test_ranks_that_wait_for_one_another_are_all_named(launch: Launch) -> None:
    run = launch("both_wait", hang_timeout=1.0)
    assert run.end() == 1
    named = [line for line in run.said.splitlines() if "has not moved" in line]
    assert ["rank 0 " in named[0], "rank 1 " in named[1], len(named)] == [True, True, 2], run.said


def test_a_run_goes_on_after_a_hang(launch: Launch) -> None:
    run = launch("sleeps", nproc=3, hang_timeout=1.0, max_restarts=1)
    assert run.end() == 0, run.said
    assert "rank 1 (process " in run.said
    assert "rank 0" not in run.said
    assert "started again (1 of 1)" in run.said
