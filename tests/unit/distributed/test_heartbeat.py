"""Beats as ranks leave them, and who is named when some stop."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import pytest
import torch.distributed as dist

from packtrain.distributed import heartbeat, stacks
from packtrain.distributed.heartbeat import Beat, Heart, Watch

HOST = socket.gethostname()


def beat(store: dist.Store, rank: int, **values: Any) -> None:
    told = stacks.Told(os.getpid(), -1, 0)
    right = {"beats": 1, "progress": 1, "doing": "step 3", "step": 3, "waits": False, "host": HOST, "told": told}
    store.set(f"beat/{rank}", json.dumps(Beat(**(right | values))))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The watch's clock."""
    time_ = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: time_[0])
    return time_


CASES: dict[str, tuple[list[dict[str, Any]], list[int] | None]] = {
    "all go on": ([{"beats": 2, "progress": 2}] * 3, None),
    "one stands, the others wait": ([{"beats": 2, "waits": True}, {"beats": 2}, {"beats": 2, "waits": True}], [1]),
    "one has no beat": ([{"beats": 2, "waits": True}, {"beats": 1, "waits": True}, {"beats": 2, "waits": True}], [1]),
    "all wait": ([{"beats": 2, "waits": True}] * 3, [0, 1, 2]),
    "two wait for one that works": ([{"beats": 2, "waits": True}] * 2 + [{"beats": 2, "progress": 2}], None),
    "one waits for two that are done": ([{"beats": 2, "waits": True}] + [{"doing": "done"}] * 2, [0]),
    "all are done": ([{"doing": "done"}] * 3, None),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_named(case: str, now: list[float]) -> None:
    later, named = CASES[case]
    store = dist.HashStore()
    watch = Watch(store, range(3), patience=10)
    assert watch.look() is None  # nobody has begun
    for rank in range(3):
        beat(store, rank)
    assert watch.look() is None
    now[0] += 5
    for rank, values in enumerate(later):
        beat(store, rank, **values)
    assert watch.look() is None
    now[0] += 5.5
    for rank, values in enumerate(later):
        beat(store, rank, **values | {"beats": values.get("beats", 1) * 2 if values.get("beats", 1) > 1 else 1})
    found = watch.look()
    assert (found and found.ranks) == named
    if found is not None:
        assert f"rank {named[0]} (process {os.getpid()})" in found.text  # type: ignore[index]
        assert "it was at step 3" in found.text
    assert watch.step == 3


def test_no_patience_no_verdict(now: list[float]) -> None:
    store = dist.HashStore()
    watch = Watch(store, [0], patience=0)
    beat(store, 0)
    watch.look()
    now[0] += 10**6
    assert watch.look() is None


def test_another_machines_rank_is_named_and_not_touched(now: list[float]) -> None:
    store = dist.HashStore()
    watch = Watch(store, [0], patience=1)
    beat(store, 0, host="elsewhere")
    watch.look()
    now[0] += 2
    found = watch.look()
    assert found is not None
    assert "on elsewhere" in found.text
    assert found.pids == []


def test_a_heart_beats_moves_and_ends() -> None:
    store, heart = dist.HashStore(), Heart(2)
    heart.begin(store)
    heart.at("step 1", step=1, steady=True)
    seen = []
    for _ in range(3):
        time.sleep(1.5 * heartbeat.BEAT_SECONDS)
        seen.append(json.loads(store.get("beat/2")))
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert seen[0][1] == seen[2][1]  # steady: no progress without `at`
    assert seen[2][2:4] == ["step 1", 1]
    heart.at("step 2", step=2, steady=True)
    heart.end()
    last = json.loads(store.get("beat/2"))
    assert last[1] > seen[2][1]
    assert last[2] == "done"
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_thread_that_works_is_progress_until_steps_go_round() -> None:
    store, heart = dist.HashStore(), Heart()
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            time.sleep(0.05)
            time.sleep(0.07)
            time.sleep(0.11)

    worker = threading.Thread(target=work, daemon=True)
    heart.begin(store)
    heart.at("loading")
    worker.start()
    before = json.loads(store.get("beat/0"))[1] if store.check(["beat/0"]) else 0
    time.sleep(6 * heartbeat.BEAT_SECONDS)
    assert json.loads(store.get("beat/0"))[1] > before + 1
    done.set()
    heart.end()


def test_stacks_of_another_process() -> None:
    code = (
        "import time; from packtrain.distributed import stacks\n"
        "def waits_here():\n    print(*stacks.listen(), flush=True); time.sleep(30)\nwaits_here()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        told = stacks.Told(*map(int, other.stdout.readline().split()))
        time.sleep(0.2)
        frames = stacks.ask(told)
        assert "in waits_here" in frames[0]
        assert stacks.ask(told) == frames  # again
        other.kill()
    assert stacks.ask(told) == []
    assert stacks.state(told.pid) == ""


def test_only_the_main_threads_frames_are_taken() -> None:
    dump = (
        "Current thread 0x0000000a (most recent call first):\n  <no Python frame>\n\n"
        'Thread 0x0000000b (most recent call first):\n  File "a.py", line 1 in f\n  File "b.py", line 2 in g\n'
    )
    assert stacks.frames_of(dump, 11) == ['File "a.py", line 1 in f', 'File "b.py", line 2 in g']
    assert stacks.frames_of(dump, 10) == []
    assert stacks.frames_of("", 11) == []


class Held:
    """What a function holds while a beat is made."""


def test_a_beat_keeps_nothing_alive() -> None:
    """Frames of other threads keep their functions' values, also when those have returned."""
    beaten = threading.Event()

    class Store:
        def set(self, key: str, value: str) -> None:
            beaten.set()

    def work() -> weakref.ref[Held]:
        held = Held()
        heart.begin(Store())  # type: ignore[arg-type]
        assert beaten.wait(10)
        return weakref.ref(held)

    heart = Heart()
    left = work()
    until = time.monotonic() + heartbeat.BEAT_SECONDS / 2
    while left() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert left() is None
    heart.end()
