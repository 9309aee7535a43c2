"""Faults of whole runs that the other files do not have, and what the faults do where their guard is off.

The scorecard (tests/faults.py) says which test belongs to which fault, and runs the slow ones too.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import result_of, until
from recovery import Property, Run, before_step, first_error, mark, same, saved, step_of, told
from runs import column, lines
from torch.distributed import TCPStore

import tiny
from packtrain.checkpoint import store
from packtrain.checkpoint.dcp_folder import complete, verify
from packtrain.checkpoint.owner import NAME
from packtrain.distributed import heartbeat, launch, parent, place
from packtrain.model.llama import LlamaForCausalLM
from packtrain.train.interrupt import Interrupt
from packtrain.train.loop import Loop

GIB = 2**30

# ---- kills


def kills_rank_1(folder: Path) -> None:
    """Three steps after the begin of every try."""

    def action(self: Loop, step: int) -> None:
        if step == self.began + 4 and self.place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(action)


@pytest.mark.slow
def test_without_restarts_a_killed_rank_is_the_end(run: Run, tmp_path: Path) -> None:
    one = run(kills_rank_1)
    assert one.end(60) == 1
    assert "started again" not in one.said
    assert step_of(tmp_path / "out") == 3


@pytest.mark.slow
def test_without_checkpoints_a_loop_of_kills_gets_nowhere(run: Run, tmp_path: Path) -> None:
    one = run(kills_rank_1, max_restarts=9, save_steps=1000, run_validation=False)
    assert one.end(60) == 1
    assert one.said.splitlines()[-1].startswith("packtrain: not started again: 3 tries in a row ended at ")


@pytest.mark.slow
def test_with_them_it_comes_to_its_end(run: Run, tmp_path: Path, whole: Path) -> None:
    one = run(kills_rank_1, max_restarts=9, save_steps=1)
    assert one.end(90) == 0, one.said
    assert result_of(tmp_path / "out")["restarts"] >= 3
    assert column(lines(tmp_path / "out"), "loss") == column(lines(whole), "loss")


# ---- first causes


def raises_on_rank_1(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if step == 3 and self.place.rank == 1:
            raise ValueError("bad row")

    before_step(action)


def speaks_for_itself(folder: Path) -> None:
    place.Place.report = lambda self, error: True  # type: ignore[method-assign]
    place.is_echo = lambda error: False
    raises_on_rank_1(folder)


@pytest.mark.slow
def test_without_first_causes_the_echo_is_printed_too(run: Run) -> None:
    one = run(speaks_for_itself)
    assert one.end(60) == 1
    assert one.said.count("Traceback (most recent call last)") >= 2, one.said
    assert "Connection closed by peer" in one.said or "Connection reset by peer" in one.said


# ---- memory


def memory_of_rank_1_ends(folder: Path) -> None:
    """From step 3 on its address space may grow by a GiB, room for threads, and the forward asks for sixteen."""

    def action(self: Loop, step: int) -> None:
        if step == 3 and self.place.rank == 1:
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            whole = LlamaForCausalLM.forward

            def forward(*args: Any, **how: Any) -> Any:
                torch.empty(4 * GIB, dtype=torch.float32).fill_(1)
                return whole(*args, **how)

            LlamaForCausalLM.forward = forward  # type: ignore[method-assign]

    before_step(action)


def test_out_of_memory_on_one_rank_is_told_and_not_tried_again(
    run: Run, tmp_path: Path, record_property: Property
) -> None:
    one = run(memory_of_rank_1_ends, max_restarts=3)
    until(lambda: "out of memory" in one.said, 60, "nothing was said")
    began = time.monotonic()
    assert one.end(20) == 1
    assert time.monotonic() - began < 5
    assert not one.alive()
    told(one.said, "step 3: rank 1 is out of memory, in a micro-batch of 2 rows x ", record_property)
    assert "alloc" in first_error(one.said)
    assert "What needs less: " in first_error(one.said)
    assert "packtrain: started again" not in one.said
    assert "not started again: memory would run out again" in one.said


def forgets_what_it_was(folder: Path) -> None:
    place.is_out_of_memory = lambda error: False
    memory_of_rank_1_ends(folder)


@pytest.mark.slow
def test_without_that_word_it_is_tried_again(run: Run) -> None:
    one = run(forgets_what_it_was, max_restarts=3)
    assert one.end(60) == 1
    assert "packtrain: started again" in one.said


# ---- hangs


def stands_still(folder: Path) -> None:
    def action(self: Loop, step: int) -> None:
        if step == 5 and self.place.rank == 1:
            mark(folder, "hangs")
            time.sleep(60)

    before_step(action)


@pytest.mark.slow
def test_without_the_watch_a_hang_is_silent(run: Run, tmp_path: Path) -> None:
    one = run(stands_still, hang_timeout=0)
    until((tmp_path / "hangs").exists, 60, "did not come to it")
    time.sleep(2 + 1 + 1)  # with --hang_timeout 2 it is named within 3 s
    assert "has not moved" not in one.said
    assert one.process.is_alive()
    assert step_of(tmp_path / "out") == 4


# ---- disks


def files_may_not_grow(folder: Path) -> None:
    """RLIMIT_FSIZE below a checkpoint's size, from step 3 on, as a quota would."""

    def action(self: Loop, step: int) -> None:
        if step == 3:
            size = max(path.stat().st_size for path in (folder / "out/checkpoints/step-2").iterdir())
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))

    before_step(action)
    before_step(lambda self, step: saved(folder / "out", 2) if step == 3 else None)


def test_a_full_disk_is_told_and_the_old_checkpoint_is_kept(
    run: Run, tmp_path: Path, whole: Path, record_property: Property
) -> None:
    one, out = run(files_may_not_grow, max_restarts=0), tmp_path / "out"
    assert one.end(60) == 1
    told(one.said, "the checkpoint of step 4 could not be saved", record_property)
    assert "make room (quotas and `ulimit -f` count too)" in first_error(one.said)
    assert not one.alive()
    assert list(complete(out / "checkpoints")) == [2]
    assert verify(out / "checkpoints/step-2") == []
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert run().end(60) == 0
    same(out, whole)


def lies_on_rank_1(folder: Path) -> None:
    """Its file system shows nothing new for a second, and knows files by what they were; then rank 0 is killed."""
    exists, opened, first = Path.exists, Path.open, {}
    stale = {"left": 3}

    def lies() -> bool:
        return os.environ.get("RANK") == "1"

    def sees(path: Path, **how: Any) -> bool:
        if lies() and path.is_relative_to(folder / "out/checkpoints"):
            first.setdefault(path, time.monotonic())
            if time.monotonic() - first[path] < 1:
                return False
        return exists(path, **how)

    def opens(path: Path, *how: Any, **more: Any) -> Any:
        if lies() and path.suffix in {".json", ".safetensors"} and "checkpoints" in path.parts and stale["left"] > 0:
            stale["left"] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, *how, **more)

    def action(self: Loop, step: int) -> None:
        if step == 7 and self.place.rank == 0 and parent.attempt() == 0:
            saved(folder / "out", 4)
            os.kill(os.getpid(), signal.SIGKILL)

    Path.exists = sees  # type: ignore[assignment,method-assign]
    Path.open = opens  # type: ignore[assignment,method-assign]
    before_step(action)


@pytest.mark.slow
def test_ranks_that_disagree_on_what_is_there_wait_for_one_another(run: Run, tmp_path: Path, whole: Path) -> None:
    one = run(lies_on_rank_1, max_restarts=1)
    assert one.end(60) == 0, one.said
    assert "goes on from" in one.said
    same(tmp_path / "out", whole)


# ---- signals


def hears_nothing(folder: Path) -> None:
    Interrupt.__enter__ = lambda self: self  # type: ignore[method-assign]
    before_step(lambda self, step: mark(folder, "there") if step == 7 and self.place.rank == 1 else None)


@pytest.mark.slow
def test_without_handlers_a_signal_costs_the_steps_since_the_last_checkpoint(run: Run, tmp_path: Path) -> None:
    one, out = run(hears_nothing, save_steps=5, run_validation=False), tmp_path / "out"
    until((tmp_path / "there").exists, 60, "never came to it")
    one.send(signal.SIGTERM)
    one.end()
    assert step_of(out) - max(complete(out / "checkpoints")) >= 1


# ---- folders


def ends_after_a_checkpoint(folder: Path) -> None:
    before_step(lambda self, step: os._exit(1) if step == 4 else None)
    before_step(lambda self, step: saved(folder / "out", 2) if step == 3 else None)


@pytest.fixture
def unfinished(run: Run, tmp_path: Path) -> Path:
    """A run that ended after step 3, with a checkpoint of step 2."""
    assert run(ends_after_a_checkpoint).end(60) == 1
    assert list(complete(tmp_path / "out/checkpoints")) == [2]
    (tmp_path / "said").unlink()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("settings", "(--lr: 0.01 then, 0.5 now; --seed: 42 then, 7 now)"),
        ("data", "; train data: "),
        ("rows of a step", "rows of a step: 4 then, 8 now"),
    ],
)
def test_another_runs_folder_is_refused_with_what_differs(
    what: str, says: str, run: Run, unfinished: Path, tmp_path: Path, record_property: Property
) -> None:
    tiny.grammar(tmp_path / "other.csv", 12)
    changes = {
        "settings": {"lr": 0.5, "seed": 7},
        "data": {"train_split": tmp_path / "other.csv"},
        "rows of a step": {"batch_size_training": 4},
    }
    before = contents(unfinished)
    one = run(**changes[what])
    assert one.end(60) == 2
    told(one.said, f"--output_dir {unfinished}: holds an unfinished run with other settings (", record_property)
    assert says in first_error(one.said)
    assert "pass --overwrite_output_dir to begin again" in first_error(one.said)
    assert contents(unfinished) == before


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the lock that a killed run leaves."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != NAME}


def refuses_nothing(folder: Path) -> None:
    store._refuse_changes = lambda *_: None


@pytest.mark.slow
def test_without_the_fingerprint_two_runs_would_be_one(run: Run, unfinished: Path, whole: Path) -> None:
    one = run(refuses_nothing, lr=0.5)
    assert one.end(60) == 0, one.said
    rates = column(lines(unfinished), "lr")
    assert rates[:2] == column(lines(whole), "lr")[:2]
    assert rates[2] > 10 * rates[1]


# ---- launchers


def follows_nobody(folder: Path) -> None:
    parent.follow = lambda: None
    heartbeat.Heart.begin = lambda *_: None  # type: ignore[method-assign]
    before_step(lambda self, step: mark(folder, "there") if step == 3 else None)
    before_step(lambda self, step: time.sleep(5) if step == 3 else None)


@pytest.mark.slow
def test_without_the_kernels_word_workers_outlive_their_launcher(run: Run, tmp_path: Path) -> None:
    one = run(follows_nobody)
    until((tmp_path / "there").exists, 60, "never came to it")
    assert len(one.workers()) == 2
    one.send(signal.SIGKILL)
    one.process.join()
    time.sleep(1)
    assert len(one.alive()) == 2


# ---- ports


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def is_told_a_port(folder: Path) -> None:
    """In the environment, as other programs tell one another."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text())


def insists_on_it(folder: Path) -> None:
    port = int((folder / "port").read_text())
    launch._loopback_store = lambda: (TCPStore("127.0.0.1", port, is_master=True), f"127.0.0.1:{port}")


def test_a_taken_port_is_no_obstacle(run: Run, tmp_path: Path, taken: int) -> None:
    (tmp_path / "port").write_text(str(taken))
    one = run(is_told_a_port, max_train_step=1, run_validation=False)
    assert one.end(60) == 0, one.said


def test_a_port_that_is_not_the_kernels_choice_is_one(run: Run, tmp_path: Path, taken: int) -> None:
    (tmp_path / "port").write_text(str(taken))
    one = run(insists_on_it, max_train_step=1, run_validation=False)
    assert one.end(60) == 1
    assert "already in use" in one.said
