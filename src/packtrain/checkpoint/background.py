"""One piece of work at a time beside the training, whose error is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for one piece of work; `wait` ends it and raises what it ran into, on the caller's side.

    The thread is a daemon: a process that has to end does, whatever a disk or another rank keeps it waiting for.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begin; what was begun before has been waited for."""
        assert self._thread is None, "one at a time"

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether the work goes on."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it ran into an error that nobody has been told of yet."""
        return self._error is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the work is done, or so many seconds; whether it is. Raises its error, once."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True
