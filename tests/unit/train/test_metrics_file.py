"""metrics.jsonl's lines, and who else is told of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from packtrain.train.metrics import Averages, MetricsFile


class Ear:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def step(self, line: Mapping[str, Any]) -> None:
        self.told.append(("step", line["step"], line["loss"]))

    def evaluation(self, step: int, loss: float, batches: Sequence[float]) -> None:
        self.told.append(("evaluation", step, loss, list(batches)))

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        self.told.append(("epoch", step, train_loss, eval_loss))

    def close(self, results: Mapping[str, Any] | None) -> None:
        self.told.append(("close", results))


def test_lines_are_whole_and_passed_on(tmp_path: Path) -> None:
    ear = Ear()
    metrics = MetricsFile(tmp_path / "metrics.jsonl", [ear])
    metrics.write(step=1, loss=2.0, grad_norm=math.inf)
    metrics.write(event="overflow", step=1, scale=4.0)
    metrics.write(step=2, loss=math.nan)
    metrics.evaluation(2, 1.0, [0.5, 1.5])
    metrics.epoch(2, 2.0, 1.0)
    metrics.close({"avg_train_loss": 2.0})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 2.0, "grad_norm": None},
        {"event": "overflow", "step": 1, "scale": 4.0},
        {"step": 2, "loss": None},
        {"event": "eval", "step": 2, "eval_loss": 1.0, "eval_perplexity": math.e},
    ]
    assert ear.told == [
        ("step", 1, 2.0),
        ("step", 2, None),
        ("evaluation", 2, 1.0, [0.5, 1.5]),
        ("epoch", 2, 2.0, 1.0),
        ("close", {"avg_train_loss": 2.0}),
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = MetricsFile(None)
    metrics.write(step=1, loss=2.0)
    metrics.evaluation(1, 1.0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_averages_are_over_tokens_then_over_epochs() -> None:
    averages = Averages()
    for loss, labels in ((1.0, 10), (4.0, 30)):
        averages.step(loss, labels)
    averages.end_epoch(5.0)
    averages.end_epoch(5.0)  # an epoch without a step that counts
    averages.step(2.0, 1)
    averages.end_epoch(7.0)
    found = averages.results()
    assert found["avg_train_loss"] == pytest.approx((3.25 + 2.0) / 2)
    assert found["avg_train_prep"] == pytest.approx((math.exp(3.25) + math.exp(2.0)) / 2)
    assert found["avg_epoch_time"] == 6.0
    assert found["avg_eval_loss"] is None
