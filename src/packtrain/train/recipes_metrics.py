"""`--save_metrics`: llama-recipes' metrics_data_RANK-TIME.json, and a picture of its curves beside it.

The original has a file from each rank with that rank's losses, rewritten at every micro-batch. Here losses are all
ranks' together, so there is one file, rank 0's, and a step is an optimizer step.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from packtrain import log
from packtrain.checkpoint.store import write_json
from packtrain.train.metrics import finite_or_none, perplexity


def metrics_path(root: Path) -> Path:
    """llama-recipes' name for the file of a run that starts now."""
    return root / f"metrics_data_0-{datetime.now():%Y-%m-%d_%H-%M-%S}.json"


class RecipesMetrics:
    """Collects losses; writes file and picture at each epoch's end and at the run's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._losses: dict[str, list[float]] = {
            f"{split}_{span}": [] for split in ("train", "val") for span in ("step", "epoch")
        }
        self._epoch_ends: list[int] = []
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if not self._draws:
            log.say("--save_metrics: no picture of the curves without matplotlib (pip install matplotlib)")

    def step(self, line: Mapping[str, Any]) -> None:
        """Remember an optimizer step's loss."""
        self._losses["train_step"].append(math.nan if line["loss"] is None else line["loss"])

    def evaluation(self, step: int, loss: float, batches: Sequence[float]) -> None:
        """Remember each batch's loss."""
        self._losses["val_step"] += batches

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        """Remember the means and write."""
        self._epoch_ends.append(step)
        self._losses["train_epoch"].append(train_loss)
        if eval_loss is not None:
            self._losses["val_epoch"].append(eval_loss)
        self._write()

    def close(self, results: Mapping[str, Any] | None) -> None:
        """Write, also when the run ended within an epoch."""
        self._write()

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
