"""`--save_metrics`: llama-recipes' metrics_data_RANK-TIME.json, and a picture of its curves beside it.

The original has a file from each rank with that rank's losses, rewritten at every micro-batch. Here losses are all
ranks' together, so there is one file, rank 0's, and a step is an optimizer step. What it is made of is kept line by
line in the run's folder, so that a run that is gone on with goes on in the same file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from packtrain import log
from packtrain.checkpoint.store import write_json
from packtrain.train.metrics import cut, finite_or_none, perplexity

JOURNAL = "save_metrics.jsonl"
"""In the run's folder: the file's name, and then what was told, a line each."""


def metrics_path(root: Path, journal: Path) -> Path:
    """The file of a run that is gone on with; of one that starts now, by llama-recipes' name."""
    for text in journal.read_text(encoding="utf-8").splitlines()[:1] if journal.exists() else []:
        return root / str(json.loads(text)["file"])
    return root / f"metrics_data_0-{datetime.now():%Y-%m-%d_%H-%M-%S}.json"


class RecipesMetrics:
    """Collects losses; writes file and picture at each epoch's end and at the run's."""

    def __init__(self, path: Path, journal: Path) -> None:
        self._path, self._journal_path = path, journal
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if not self._draws:
            log.say("--save_metrics: no picture of the curves without matplotlib (pip install matplotlib)")
        self._read()

    def _read(self) -> None:
        """What was told before, if it was; and the journal, open for more."""
        self._losses: dict[str, list[float]] = {
            f"{split}_{span}": [] for split in ("train", "val") for span in ("step", "epoch")
        }
        self._epoch_ends: list[int] = []
        known = self._journal_path.read_text(encoding="utf-8").splitlines() if self._journal_path.exists() else []
        for text in known[1:]:
            self._take(json.loads(text))
        self._journal = self._journal_path.open("a", encoding="utf-8")
        if not known:
            self._journal.write(json.dumps({"file": self._path.name}) + "\n")

    def step(self, line: Mapping[str, Any]) -> None:
        """Remember an optimizer step's loss."""
        self._tell(step=line["step"], train_step=[line["loss"]])

    def evaluation(self, step: int, loss: float, batches: Sequence[float]) -> None:
        """Remember each batch's loss."""
        self._tell(event="eval", step=step, val_step=[finite_or_none(batch) for batch in batches])

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        """Remember the means and write."""
        means = [] if eval_loss is None else [finite_or_none(eval_loss)]
        self._tell(event="epoch", step=step, train_epoch=[finite_or_none(train_loss)], val_epoch=means)
        self._write()

    def rewind(self, step: int) -> None:
        """Forget what came after a step."""
        self._journal.close()
        cut(self._journal_path, step, evaluated=True)
        self._read()

    def _tell(self, **said: Any) -> None:
        self._journal.write(json.dumps(said) + "\n")
        self._journal.flush()
        self._take(said)

    def _take(self, said: Mapping[str, Any]) -> None:
        for name, losses in self._losses.items():
            losses += [math.nan if loss is None else loss for loss in said.get(name, [])]
        if said.get("event") == "epoch":
            self._epoch_ends.append(said["step"])

    def close(self, results: Mapping[str, Any] | None) -> None:
        """Write, also when the run ended within an epoch."""
        self._write()
        self._journal.close()

    def _write(self) -> None:
        data: dict[str, list[float | None]] = {}
        for name, losses in self._losses.items():
            data[f"{name}_loss"] = [finite_or_none(loss) for loss in losses]
            data[f"{name}_perplexity"] = [finite_or_none(perplexity(loss)) for loss in losses]
        write_json(self._path, data)
        if self._draws:
            _draw(data, self._epoch_ends, self._path.with_suffix(".png"))


def _draw(data: Mapping[str, Sequence[float | None]], epoch_ends: Sequence[int], path: Path) -> None:
    """Loss and perplexity over optimizer steps; epochs' means as dots at their last step."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("loss", "perplexity"), strict=True):
        steps = data[f"train_step_{kind}"]
        curve = [math.nan if value is None else value for value in steps]
        axes.plot(range(1, len(curve) + 1), curve, linewidth=1, label="train, each step")
        for split in ("train", "val"):
            means = data[f"{split}_epoch_{kind}"]
            if means:
                axes.plot(epoch_ends[-len(means) :], means, "o-", label=f"{split}, each epoch")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(kind)
        axes.legend()
    figure.savefig(path, dpi=120)
