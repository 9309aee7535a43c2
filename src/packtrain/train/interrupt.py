"""SIGTERM, SIGINT and SIGUSR1 set a flag; the loop asks it once a step, and all ranks stop at the same one.

The time for it is limited: a worker of `start_workers` is ended by that; any other process ends itself when the grace
is over or a second signal says to stop at once, by a thread that hears signals whatever the main thread is stuck in.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from packtrain import log
from packtrain.distributed import parent
from packtrain.distributed.orders import SIGNALS, StopOrders
from packtrain.errors import EXIT_FAULT, EXIT_STOPPED

LAST_WORD_SECONDS = 1.0


class StoppedEarly(SystemExit):
    """A signal before the first step: there is nothing to save."""


class Interrupt:
    """A context manager. Before `begin` nothing is worth keeping, and a signal leaves at once with exit code 75.

    `grace`: seconds from a signal to the end. `last_word`: called with a sentence if the process must end itself.
    """

    def __init__(self, grace: float = 30.0) -> None:
        self.signal: signal.Signals | None = None
        self.last_word: Callable[[str], object] = lambda text: None
        self._orders = StopOrders(grace)
        self._training = False
        self._previous: dict[signal.Signals, object] = {}
        self._previous_fd = -1
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread have handlers: a run inside a service keeps the service's
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        if parent.PARENT not in os.environ:
            self._pipe = hears, told = os.pipe()
            os.set_blocking(told, False)
            self._previous_fd = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            threading.Thread(target=self._limit, args=(hears,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._pipe[1])
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
        self.signal = self.signal or signal.Signals(number)
        if not self._training:
            log.say(f"packtrain: stopped by {self.signal.name} before the first step")
            raise StoppedEarly(EXIT_STOPPED)

    def _limit(self, hears: int) -> None:
        """A thread's life: bytes are signals, the end of the file is the end of the run."""
        while True:
            left = self._orders.left()
            if not select.select([hears], [], [], None if left is None else max(0.0, left))[0]:
                self._end(f"had not ended {self._orders.grace:g} s after a signal to stop")
            heard = os.read(hears, 64)
            if not heard:
                os.close(hears)
                return
            for number in filter(set(SIGNALS).__contains__, heard):
                self._orders.add(number)
            if self._orders.at_once:
                self._end("stopped at once by a second signal")

    def _end(self, text: str) -> None:
        """End this process, and say why; what cannot be written in a second is not."""
        log.say(f"packtrain: {text}; what is saved is the last complete checkpoint")
        word = threading.Thread(target=self.last_word, args=(text,), daemon=True)
        word.start()
        word.join(LAST_WORD_SECONDS)
        sys.stderr.flush()
        os._exit(EXIT_FAULT)
