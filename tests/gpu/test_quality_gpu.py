"""bench/quality.py on a CUDA device: bf16, fp32 and float8 of one model, built one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import quality
from bench.shapes import SMALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_gradients_of_three_forms(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL), encoding="utf-8")
    options = quality.options_of(["--cosine", str(config), "--length", "256", "--rows", "2", "--warm", "2"])
    found: dict[str, Any] = quality.gradients(options, tmp_path)
    assert list(found) == ["bf16", "fp32", "float8"]
    assert quality.cosine(found["bf16"], found["fp32"]) > 0.99
    assert 0.8 < quality.cosine(found["float8"], found["fp32"]) < quality.cosine(found["bf16"], found["fp32"])
    assert "| all, A and B |" in quality.cosine_table(found, options)
