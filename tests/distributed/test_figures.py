"""The scorecard's figures that are measured on a run as users start it, with bench/: M1 to M3, M5 to M7, M10.

What is asserted here is that each fault was gone through; whether a figure meets its bar is said by tests/faults.py.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import children, listening, until

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import checkpoints, restarts

KILLS = 30

Property = Callable[[str, object], None]


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path, record_property: Property) -> None:
    found = restarts.recovery(tmp_path, KILLS)
    record_property("M1", f"{len(found.seconds)} of {KILLS}")
    record_property("M2", f"{statistics.median(found.seconds):.2f}")
    record_property("M3", max(found.twice))
    assert len(found.seconds) == KILLS, found


@pytest.mark.slow
def test_goodput_under_kills(tmp_path: Path, record_property: Property) -> None:
    found = restarts.goodput(tmp_path)
    record_property("M5", f"{found.part:.2f}")
    assert found.steps > 50


@pytest.mark.slow
def test_what_a_checkpoint_adds_to_its_step(record_property: Property) -> None:
    times, _ = checkpoints.measure(checkpoints.options_of(["--every", "8", "--groups", "15"]))
    added, step = checkpoints.stalls(times)
    record_property("M6", f"{1e3 * statistics.median(added):.1f} ms of a step of {1e3 * step:.0f} ms")


@pytest.mark.slow
def test_a_stopped_worker_is_named(tmp_path: Path, record_property: Property) -> None:
    found = restarts.hang(tmp_path)
    record_property("M7", f"{found.named - found.patience:.2f} s, all gone {found.ended - found.named:.2f} s later")
    assert found.line.startswith("packtrain: rank 1 (process ")
    assert found.left == 0


@pytest.mark.slow
def test_sigterm(tmp_path: Path, record_property: Property) -> None:
    found = restarts.stop(tmp_path)
    record_property("M10", f"{found.seconds:.2f} s, {found.lost} lost")
    assert found.code == 75


@pytest.mark.parametrize("restarts_", [0, 1])
def test_no_process_of_a_run_listens_beyond_loopback(restarts_: int, tmp_path: Path) -> None:
    """Of the whole tree, before and after a restart."""
    with restarts.Run(tmp_path, "--max_restarts", str(restarts_)) as run:
        assert run.wait_for(2)
        first = tree(run.process.pid)
        found = [address for pid in first for address in listening(pid)]
        if restarts_:
            os.kill(run.workers()[1], signal.SIGKILL)
            assert run.wait_for(run.step() + 1)
            until(lambda: len(set(tree(run.process.pid)) - set(first)) == 2, 20, "no new workers")
            found += [address for pid in tree(run.process.pid) for address in listening(pid)]
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(30) == 75
        time.sleep(0.1)
        assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]
    assert len(first) == 4  # launcher, the process that workers come from, two workers
    assert len(found) >= 3
    assert all(address.startswith("127.") for address in found), found


def tree(pid: int) -> list[int]:
    """A process and all that come from it."""
    return [pid, *(one for child in children(pid) for one in tree(child))]
