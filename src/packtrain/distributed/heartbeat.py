"""What a rank does, told beside the collectives, and who notices that one stopped.

    Heart       of a rank: `at` says what it does; its thread leaves a beat in the store
    Watch       of the launcher, or under torchrun of a rank: reads all beats; `look` gives a Hang or None
    Hang        ranks that stopped, in words, with their stacks

A beat carries a count of progress. Once steps go round, only the next `at` is progress; in a first step, which may
compile, and in a save it is progress as well that any thread of the process is somewhere else than before; and before
the first `at` (downloads, data, weights) the beat itself is: a process may wait long for a disk or a network.
A rank that waits for others is not the one to name, unless all of them wait.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from types import FrameType
from typing import NamedTuple

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from packtrain.distributed import stacks

BEAT_SECONDS = 0.2
SILENT_SECONDS = 1.0
"""Without a beat the whole process stands still, not only what it does."""

DONE = "done"


class Beat(NamedTuple):
    """What a rank leaves in the store."""

    beats: int
    progress: int
    doing: str
    step: int
    waits: bool
    """For other ranks, as far as its stack shows."""
    host: str
    told: stacks.Told


class Heart:
    """One rank's. Without `begin` it only remembers."""

    def __init__(self, rank: int = 0) -> None:
        self.doing, self.step = "the start", 0
        self._rank, self._ticks, self._steady = rank, 0, False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, doing: str, *, step: int | None = None, steady: bool = False) -> None:
        """Say what is done from here on, and in which step; `steady`: it is short, and another `at` follows."""
        self.doing, self._steady = doing, steady
        self.step = self.step if step is None else step
        self._ticks += 1

    def begin(self, store: Store, look: Callable[[], None] | None = None) -> None:
        """Beat from now on, over a connection of its own; `look` is called after each beat."""
        told = stacks.listen()
        self._thread = threading.Thread(target=self._beat, args=(store, told, look), name="heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """The last beat: this rank is done."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join(5 * BEAT_SECONDS)

    def _beat(self, store: Store, told: stacks.Told, look: Callable[[], None] | None) -> None:
        host, count, progress, before = socket.gethostname(), 0, 0, None
        while True:
            ended = self._ended.is_set()
            frames = sys._current_frames()
            main = frames.get(told.thread)
            others = () if self._steady else tuple(sorted(_places(frames, threading.get_ident())))
            now = (self._ticks, others if self._ticks else count)
            count, progress, before = count + 1, progress + (now != before), now
            beat = Beat(count, progress, DONE if ended else self.doing, self.step, _waits(main), host, told)
            del frames, main  # they keep what functions held that have returned since: gigabytes of a GPU's memory
            try:
                store.set(_key(self._rank), json.dumps(beat))
            except (DistError, RuntimeError):  # the launcher is gone, and this process goes with it
                return
            if ended:
                return
            if look is not None:
                look()
            self._ended.wait(BEAT_SECONDS)


class Hang(NamedTuple):
    """Ranks that stopped: what is said, and whom."""

    text: str
    ranks: list[int]
    step: int
    pids: list[int]
    """Of those on this machine."""


class Watch:
    """Over `ranks`, of one try; `patience` in seconds, 0: never a hang."""

    def __init__(self, store: Store, ranks: Sequence[int], patience: float) -> None:
        self.beats: dict[int, Beat] = {}
        self._store, self._ranks, self._patience = store, ranks, patience
        self._alive: dict[int, float] = {}
        self._moved: dict[int, float] = {}

    @property
    def step(self) -> int:
        """The furthest that any rank has come."""
        return max((beat.step for beat in self.beats.values()), default=0)

    def look(self) -> Hang | None:
        """Read the beats; ranks whose beats, or whose progress, have stood still for as long as `patience`."""
        now = time.monotonic()
        for rank in self._ranks:
            beat, before = self._read(rank), self.beats.get(rank)
            if beat is None:
                continue
            if before is None or beat.beats != before.beats:
                self._alive[rank] = now
            if before is None or beat.progress != before.progress:
                self._moved[rank] = now
            self.beats[rank] = beat
        running = [rank for rank, beat in self.beats.items() if beat.doing != DONE]
        if not self._patience or not running:
            return None
        stuck = [rank for rank in running if now - self._moved[rank] >= self._patience]
        silent = [rank for rank in stuck if now - self._alive[rank] >= min(SILENT_SECONDS, self._patience)]
        named = silent or [rank for rank in stuck if not self.beats[rank].waits]
        if not named and stuck == running:
            named = stuck
        return self._hang(named, now) if named else None

    def _read(self, rank: int) -> Beat | None:
        if not self._store.check([_key(rank)]):
            return None
        values = json.loads(self._store.get(_key(rank)))
        return Beat(*values)._replace(told=stacks.Told(*values[-1]))

    def _hang(self, ranks: list[int], now: float) -> Hang:
        here = [rank for rank in ranks if self.beats[rank].host == socket.gethostname()]
        lines = []
        for rank in ranks:
            beat = self.beats[rank]
            how = stacks.state(beat.told.pid) if rank in here else f"on {beat.host}"
            who = f"process {beat.told.pid}" + (f", {how}" if how else "")
            seconds = now - self._moved[rank]
            lines.append(f"rank {rank} ({who}) has not moved for {seconds:.0f} s; it was at {beat.doing}")
            lines += [f"    {frame}" for frame in (stacks.ask(beat.told) if rank in here else [])]
        step = max(self.beats[rank].step for rank in ranks)
        return Hang("\n".join(lines), ranks, step, [self.beats[rank].told.pid for rank in here])


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _places(frames: dict[int, FrameType], own: int) -> list[tuple[int, int, int]]:
    """Where every thread but the heart's is: (thread, code, instruction) of each of its frames."""
    found = []
    for thread, top in frames.items():
        frame: FrameType | None = top if thread != own else None
        while frame is not None:
            found.append((thread, id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
    return found


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread's innermost frames are in a collective, or in a wait for another rank or the device."""
    for _ in range(3):
        if frame is None:
            return False
        file, name = PurePath(frame.f_code.co_filename), frame.f_code.co_name
        package = file.parent.as_posix()
        if "/torch/distributed" in package and "/checkpoint" not in package:
            return True
        if (file.name, name) in {("place.py", "wait_for"), ("streams.py", "synchronize")}:
            return True
        frame = frame.f_back
    return False
