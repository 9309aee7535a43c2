"""Whether a run is started again after a failure, and why not.

Failure         how one try ended
Restarts        counts them: `refuse` says why there is no other try, or None
oom_kills       how often the kernel has killed for want of memory
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

from packtrain.errors import EXIT_USER

IN_VAIN = 3
"""Tries in a row that came no further than an earlier one, after which there is no other."""


class Failure(NamedTuple):
    """The first cause of a try's end."""

    rank: int
    text: str
    exit_code: int
    step: int
    """The one it was in, or before; 0 before the first."""
    out_of_memory: bool = False
    outside: bool = False
    """By a signal that no fault of the program sends: it says nothing about the next try."""


class Restarts:
    """At most `limit` in a run."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._furthest = -1
        self._in_vain = 0
        self._causes: set[tuple[int, str]] = set()

    def refuse(self, failure: Failure) -> str | None:
        """Why this failure is the last one: a sentence, "" if nobody asked for restarts; None: start again."""
        if not self.limit or failure.exit_code == EXIT_USER:
            return ""
        cause = (failure.step, failure.text)
        again = cause in self._causes and not failure.outside
        self._causes.add(cause)
        self._in_vain = 0 if failure.step > self._furthest else self._in_vain + 1
        self._furthest = max(self._furthest, failure.step)
        at = f"step {failure.step}" if failure.step else "the start"
        if failure.out_of_memory:
            return "not started again: memory would run out again; a smaller --batch_size_training needs less"
        if again:
            return f"not started again: the same failure came at {at} before"
        if self._in_vain >= IN_VAIN - 1:
            return f"not started again: {IN_VAIN} tries in a row ended at {at} or before"
        if self.used == self.limit:
            return f"not started again: --max_restarts {self.limit} is used up"
        self.used += 1
        return None


def is_outside(number: int) -> bool:
    """Whether a signal comes from elsewhere: a fault of the program sends SIGSEGV, SIGABRT and their like."""
    return number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def oom_kills() -> int:
    """Processes of this machine (and of this container) that the kernel has killed for want of memory so far."""
    count = 0
    for file, name in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        count += sum(int(line.split()[1]) for line in lines if line.split()[0] == name)
    return count
