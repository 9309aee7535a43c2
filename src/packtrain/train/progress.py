"""The bar that people watch: step, loss, tokens/s, time left. Rank 0 only; plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from packtrain import log

SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """A context manager around a run's steps. `update` costs nothing on ranks that do not speak."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._total = total
        self._last_line = 0.0
        self._bar: Progress | None = None
        if log.speaks() and self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")

    def __enter__(self) -> Bar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show a finished step."""
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif log.speaks() and (step == self._total or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            log.say(f"step {step}/{self._total}  {figures}  {seconds_left:,.0f} s left")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar:
            self._console.print(text, highlight=False)
        else:
            log.say(text)
