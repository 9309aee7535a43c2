"""Orders to stop, counted: Ctrl-C reaches a process twice, and an impatient user presses it twice. Imports no torch.

StopOrders      takes signals; says when the first one's grace is over, and whether a later one says "at once"
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Each asks a run to save and end. (Slurm announces its time limit by any signal; Kubernetes and torchrun: SIGTERM.)"""

SAME_SECONDS = 0.5
"""A signal so soon after another one is the same order, told by two: the terminal and the launcher, srun and a trap."""


class StopOrders:
    """`grace` seconds are given after the first order, and anew when another signal follows SIGUSR1, a mere notice."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.grace = grace
        self.told: list[signal.Signals] = []
        self.at_once = False
        """Whether a second order has come."""
        self._clock = clock
        self._since = 0.0
        self._heard = 0.0

    def add(self, number: int) -> bool:
        """Take a signal; whether it says to stop at once."""
        now, order = self._clock(), signal.Signals(number)
        fresh = not self.told or now - self._heard >= SAME_SECONDS
        notice_only = set(self.told) <= {signal.SIGUSR1}
        self._heard = now
        self.told.append(order)
        if not fresh or (order is signal.SIGUSR1 and len(self.told) > 1):
            return False
        if notice_only:
            self._since = now
        else:
            self.at_once = True
        return self.at_once

    @property
    def asked(self) -> bool:
        """Whether an order has come."""
        return bool(self.told)

    def left(self) -> float | None:
        """Seconds of the grace that are left, 0 or less when it is over; None if nobody asked for an end."""
        return self._since + self.grace - self._clock() if self.told else None
