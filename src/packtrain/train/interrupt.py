"""SIGTERM, SIGINT and SIGUSR1 set a flag; the loop asks it once a step, and all ranks stop at the same one."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType

from packtrain import log
from packtrain.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """A context manager. Before `begin` nothing is worth keeping, and a signal leaves at once with exit code 75."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._training = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread have handlers: a run inside a service keeps the service's
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def begin(self) -> None:
        """From here on a signal is only noted: the loop ends the run in order."""
        self._training = True

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if not self._training:
            log.say(f"packtrain: stopped by {self.signal.name} before the first step")
            sys.exit(EXIT_STOPPED)
