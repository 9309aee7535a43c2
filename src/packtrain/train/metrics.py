"""What a run says about itself: `run/metrics.jsonl` and the averages llama-recipes returns.

MetricsFile     one JSON line an optimizer step, and event lines; rank 0 only
cut             the file as it was at a step, for a run that goes on from there
Listener        who else is told (llama-recipes' metrics file, Weights & Biases)
Averages        per-epoch sums from which avg_train_loss and its kin are made
memory_gb       this rank's figure, no polling thread
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from packtrain.checkpoint.files import write_text


def memory_gb(device: torch.device) -> float:
    """GiB: the most that was allocated on a GPU so far; on a CPU what is resident now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: what is not finite is written as null."""
    return value if math.isfinite(value) else None


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class Listener(Protocol):
    """Is told what happens, on rank 0. Losses are mean token losses in nats."""

    def step(self, line: Mapping[str, Any]) -> None:
        """An optimizer step's line, as in metrics.jsonl."""

    def evaluation(self, step: int, loss: float, batches: Sequence[float]) -> None:
        """A validation after `step`, as a whole and batch by batch (NaN for one without labels)."""

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        """An epoch has ended with `step`, and its validation is done; None if there was none."""

    def rewind(self, step: int) -> None:
        """The run goes back to a step; others will come in the place of those behind it."""

    def close(self, results: Mapping[str, Any] | None) -> None:
        """The run has ended with these results, or, with None, without any."""


class MetricsFile:
    """Appends to `run/metrics.jsonl`; every line is whole on disk before the next step's. Passes it on."""

    def __init__(self, path: Path | None, listeners: Sequence[Listener] = ()) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8") if path else None
        self._listeners = listeners

    def write(self, **values: Any) -> None:
        """One line; floats that are not finite become null. It is a step's unless it names an event."""
        if self._file is None:
            return
        clean = {k: finite_or_none(v) if isinstance(v, float) else v for k, v in values.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if "event" not in values:
            for listener in self._listeners:
                listener.step(clean)

    def evaluation(self, step: int, loss: float, batches: Sequence[float] = ()) -> None:
        """The line of a validation."""
        self.write(event="eval", step=step, eval_loss=loss, eval_perplexity=perplexity(loss))
        for listener in self._listeners:
            listener.evaluation(step, loss, batches)

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        """An epoch's end, which has no line of its own."""
        for listener in self._listeners:
            listener.epoch(step, train_loss, eval_loss)

    def rewind(self, step: int) -> None:
        """The run goes back to a step: the lines behind it go, since others will come in their place."""
        if self._file is not None and self._path is not None:
            self._file.close()
            cut(self._path, step, evaluated=True)
            self._file = self._path.open("a", encoding="utf-8")
            for listener in self._listeners:
                listener.rewind(step)

    def close(self, results: Mapping[str, Any] | None = None) -> None:
        """Put the last lines on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        for listener in self._listeners:
            listener.close(results)


def cut(path: Path, step: int, *, evaluated: bool) -> None:
    """Drop the lines behind a step, its evaluation unless it was `evaluated`, and what a kill left unfinished."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the last one, cut short
        at = line.get("step", 0)
        if at < step or (at == step and (evaluated or line.get("event") != "eval")):
            kept.append(f"{text}\n")
    write_text(path, "".join(kept))


@dataclass
class Averages:
    """Sums behind llama-recipes' result keys. Its averages go over epochs; a partial last epoch is one too."""

    train: list[float] = field(default_factory=list)
    evals: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    loss_sum: float = 0.0
    labels: float = 0.0

    def step(self, loss: float, labels: int) -> None:
        """Add a step's mean loss over its labels."""
        self.loss_sum += loss * labels
        self.labels += labels

    def end_epoch(self, seconds: float) -> None:
        """Close the epoch: its loss is the mean over its labelled tokens."""
        if self.labels:
            self.train.append(self.loss_sum / self.labels)
            self.epoch_seconds.append(seconds)
        self.loss_sum = self.labels = 0.0

    def results(self) -> dict[str, float | None]:
        """llama-recipes' keys."""
        return {
            "avg_train_prep": _mean([perplexity(x) for x in self.train]),
            "avg_train_loss": _mean(self.train),
            "avg_eval_prep": _mean([perplexity(x) for x in self.evals]),
            "avg_eval_loss": _mean(self.evals),
            "avg_epoch_time": _mean(self.epoch_seconds),
            "avg_checkpoint_time": _mean(self.save_seconds),
        }


def _mean(values: list[float]) -> float | None:
    return finite_or_none(sum(values) / len(values)) if values else None
