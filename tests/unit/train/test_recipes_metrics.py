"""--save_metrics: llama-recipes' eight keys, and a picture where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from packtrain import log
from packtrain.train.metrics import cut
from packtrain.train.recipes_metrics import RecipesMetrics, metrics_path

KEYS = [
    f"{split}_{span}_{kind}"
    for split in ("train", "val")
    for span in ("step", "epoch")
    for kind in ("loss", "perplexity")
]


def told(metrics: RecipesMetrics) -> None:
    """Two epochs of two steps, the second without a validation, then half an epoch."""
    metrics.step({"step": 1, "loss": 3.0})
    metrics.step({"step": 2, "loss": None})
    metrics.evaluation(2, 2.0, [1.0, 3.0, math.nan])
    metrics.epoch(2, 3.0, 2.0)
    metrics.step({"step": 3, "loss": 1.0})
    metrics.epoch(3, 1.0, None)
    metrics.step({"step": 4, "loss": 0.5})


def test_eight_lists(tmp_path: Path) -> None:
    metrics = RecipesMetrics(tmp_path / "m.json", tmp_path / "run.jsonl")
    told(metrics)
    metrics.close(None)
    found: dict[str, Any] = json.loads((tmp_path / "m.json").read_text())
    assert sorted(found) == sorted(KEYS)
    assert found["train_step_loss"] == [3.0, None, 1.0, 0.5]
    assert found["train_epoch_loss"] == [3.0, 1.0]
    assert found["val_step_loss"] == [1.0, 3.0, None]
    assert found["val_epoch_loss"] == [2.0]
    for name, losses in found.items():
        if name.endswith("loss"):
            expected = [None if loss is None else pytest.approx(math.exp(loss)) for loss in losses]
            assert found[name.replace("loss", "perplexity")] == expected


def test_it_is_written_at_each_epochs_end_and_no_oftener(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    metrics = RecipesMetrics(path, tmp_path / "run.jsonl")
    metrics.step({"step": 1, "loss": 3.0})
    metrics.evaluation(1, 2.0, [2.0])
    assert not path.exists()
    metrics.epoch(1, 3.0, 2.0)
    assert json.loads(path.read_text())["train_step_loss"] == [3.0]
    metrics.step({"step": 2, "loss": 1.0})
    assert json.loads(path.read_text())["train_step_loss"] == [3.0]


def test_the_name_is_theirs(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"metrics_data_0-\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.json", metrics_path(tmp_path, tmp_path / "none").name
    )


def test_a_run_that_is_gone_on_with_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """Killed after step 3 with its checkpoint at 2: all that was told up to there, and what comes after it."""
    journal = tmp_path / "run.jsonl"
    told(RecipesMetrics(tmp_path / "m.json", journal))
    assert metrics_path(tmp_path, journal) == tmp_path / "m.json"
    cut(journal, 2, evaluated=True)
    again = RecipesMetrics(metrics_path(tmp_path, journal), journal)
    again.step({"step": 3, "loss": 1.5})
    again.epoch(3, 1.5, None)
    again.close(None)
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["train_step_loss"] == [3.0, None, 1.5]
    assert found["val_step_loss"] == [1.0, 3.0, None]
    assert (found["train_epoch_loss"], found["val_epoch_loss"]) == ([3.0, 1.5], [2.0])


def test_a_run_that_goes_back_forgets(tmp_path: Path) -> None:
    metrics = RecipesMetrics(tmp_path / "m.json", tmp_path / "run.jsonl")
    told(metrics)
    metrics.rewind(2)
    metrics.step({"step": 3, "loss": 7.0})
    metrics.close(None)
    found = json.loads((tmp_path / "m.json").read_text())
    assert (found["train_step_loss"], found["train_epoch_loss"]) == ([3.0, None, 7.0], [3.0])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_one_picture(tmp_path: Path) -> None:
    metrics = RecipesMetrics(tmp_path / "m.json", tmp_path / "run.jsonl")
    told(metrics)
    metrics.close({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "m.png", "run.jsonl"]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_state", {"speaks": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    metrics = RecipesMetrics(tmp_path / "m.json", tmp_path / "run.jsonl")
    assert "no picture of the curves without matplotlib (pip install matplotlib)" in capsys.readouterr().err
    told(metrics)
    metrics.close(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.json", "run.jsonl"]
