"""`python -m bench`: transformers + PEFT has packtrain's losses in it, and what differs or is not there is said."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.__main__ import judge, table
from bench.peers import PEERS, Peer, installed
from bench.shapes import TINY, weights
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
RUNS = "packtrain;transformers + peft"


def test_losses_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY | {"initializer_range": 0.1}), encoding="utf-8")
    sizes = ["--length", "48", "--batch", "2", "--rank", "4", "--steps", "6", "--lr", "3e-3"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--config", str(config), "--only", RUNS, "--folder", str(tmp_path), *sizes],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| packtrain ") or "peft |" in line]
    assert done.returncode == 0, done.stderr
    assert len(rows) == 2
    (first, last), (their_first, their_last) = ([float(cell) for cell in row[7:9]] for row in rows)
    assert first == pytest.approx(their_first, abs=1e-4)  # the same weights, to the last digit shown
    assert last < first - 0.05
    assert first - last == pytest.approx(their_first - their_last, rel=0.1)  # other adapters to begin with


def losses(*values: float) -> dict[str, Any]:
    return {"losses": list(values), "seconds": 0.5, "memory": 1.0}


def test_what_differs_is_marked() -> None:
    found = {
        "one": losses(6.2, 5.2),
        "other": losses(6.21, 5.15),
        "another base": losses(6.3, 5.2),
        "trains nothing": losses(6.2, 6.2),
        "not a number": losses(6.2, float("nan")),
        "failed": {"failed": "no memory"},
    }
    judge(list(found.values()))
    assert {name: run.get("differs") for name, run in found.items()} == {
        "one": False,
        "other": False,
        "another base": True,
        "trains nothing": True,
        "not a number": True,
        "failed": None,
    }
    judge([{"failed": "all did"}])


def test_a_table_says_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "absent", Peer(("json", "no_such_module"), "its own", lambda options: {}))
    assert installed("absent") == "no_such_module"
    found = losses(6.2, 5.2)
    judge([found])
    options = argparse.Namespace(batch=2, length=64, rank=4, lr=1e-3, steps=4)
    runs = [("packtrain", "--flag", found), ("absent", "its own", {"failed": "not installed: no_such_module"})]
    text = table(runs, options, TINY)
    assert "| absent | its own | not installed: no_such_module |" in text
    row = next(line.split("|") for line in text.splitlines() if line.startswith("| packtrain"))
    assert row[3].strip() == "256"  # tokens of a step over its half second
    cells = {len(re.findall(r"\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert cells == {9}


def test_random_weights_are_all_different(tmp_path: Path) -> None:
    weights(tmp_path / "w", TINY, torch.device("cpu"))
    places = json.loads((tmp_path / "w/model.safetensors.index.json").read_text())["weight_map"]
    sums = []
    for name in (name for name in places if "norm" not in name):
        with safe_open(tmp_path / "w" / places[name], "pt") as file:
            tensor = file.get_tensor(name)
        assert tensor.float().std().item() == pytest.approx(TINY["initializer_range"], rel=0.05)
        sums.append(tensor.double().sum().item())
    assert len(set(sums)) == len(sums) == 2 + 7 * TINY["num_hidden_layers"]
