"""bench/quality.py, small, on a CPU: pairs of runs that learn, and gradients that float8 only bends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import quality
from bench.shapes import TINY, weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU computes in: fp32")
SHAPE = TINY | {"initializer_range": 0.1}


def test_a_pair_of_runs_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights(tmp_path / "model", SHAPE, torch.device("cpu"))
    rows = tmp_path / "rows.csv"
    rows.write_text("input,target\n" + "".join(f"w{i} w5,w{i} w7 w9\n" for i in range(10, 18)), encoding="utf-8")
    words = ["--model", str(tmp_path / "model"), "--train", str(rows), "--validation", str(rows), "--lr", "1e-2"]
    code = quality.main([*words, "--seeds", "0", "--steps", "6", "--batch", "4", "--beside", "2"])
    said = capsys.readouterr().out
    row = next(line.split("|") for line in said.splitlines() if line.startswith("| 0 |"))
    before, after, before8, after8, ratio = (float(cell) for cell in row[2:7])
    assert after < 0.95 * before, said
    assert 0 < abs(before8 - before) < 0.03 * before
    assert after8 / after == pytest.approx(ratio, rel=1e-3)
    assert code == int(ratio > quality.BOUND)


def test_gradients_in_float8_point_the_same_way(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPE), encoding="utf-8")
    options = quality.options_of(["--cosine", str(config), "--length", "48", "--rows", "2", "--warm", "2"])
    found: dict[str, Any] = quality.gradients(options, tmp_path)
    assert list(found) == ["fp32", "float8"]
    assert all(g.abs().max() > 0 for gradient in found.values() for g in gradient.values())  # of A too
    for layer in (0, 1, None):
        names = [n for n in found["fp32"] if layer is None or f"layers.{layer}." in n]
        x, y = (np.concatenate([found[form][n].numpy().ravel() for n in names]) for form in ("fp32", "float8"))
        expected = float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        assert quality.cosine(found["float8"], found["fp32"], layer) == pytest.approx(expected, abs=1e-5)
        assert 0.9 < expected < 0.99999
    assert "first layer, A |" in quality.cosine_table(found, options)
    assert "bf16: does not fit" in quality.cosine_table({**found, "bf16": "does not fit"}, options)


def test_a_run_that_failed_or_is_worse_is_seen() -> None:
    good: dict[str, Any] = {"0": {"fp32": (2.0, 1.0), "float8": (2.0, 1.015)}}
    assert not quality.within(good)
    good["1"] = {"fp32": (2.0, 1.0), "float8": (2.0, 0.99)}
    assert quality.ratio(good) == pytest.approx(1.0025)
    assert quality.within(good)
    good["2"] = {"fp32": (2.0, 1.0), "float8": "exit code 1: no memory"}
    assert not quality.within(good)
    options = quality.options_of(["--model", "m", "--train", "t", "--validation", "v"])
    assert "float8: exit code 1: no memory" in quality.loss_table(good, options)
