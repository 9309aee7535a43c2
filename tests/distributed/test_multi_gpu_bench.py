"""bench/multi_gpu.py without GPUs: its dry run ends in verdicts, and what is wrong is none of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.multi_gpu_parts import same
from bench.multi_gpu_plan import DRY, Tolerance
from bench.overlap import of_events
from bench.runs import Job, Machine, Memory, Outcome

ROOT = Path(__file__).resolve().parents[2]
LIMIT = Tolerance(loss=1e-5, norm=1e-4, curve=1e-3)


def outcome(losses: list[float | None], norm: float = 1.0, said: str = "", failed: str | None = None) -> Outcome:
    steps = [{"step": n, "loss": loss, "grad_norm": norm} for n, loss in enumerate(losses, 1)]
    return Outcome(failed, False, steps, {}, 1.0, 0.5, Memory(), said)


FALLING = [6.0, 5.7, 5.4, 5.1, 4.8, 4.5]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (outcome(FALLING), "same"),
        (outcome([6.001, *FALLING[1:]]), "differs: loss"),
        (outcome(FALLING, norm=2.0), "differs: norm"),
        (outcome([*FALLING[:3], 5.4, 5.1, 4.8]), "differs: curve"),
        (outcome([*FALLING[:5], None]), "differs: curve"),
        (outcome(FALLING[:5]), "differs: 5 steps, 6 wanted"),
        (outcome([]), "differs: 0 steps, 6 wanted"),
        (outcome([], failed="took more than 9 s"), "took more than 9 s"),
    ],
)
def test_a_wrong_curve_is_seen(ours: Outcome, verdict: str) -> None:
    assert same(ours, outcome(FALLING), LIMIT)[1] == verdict


def test_a_curve_that_would_hide_a_wrong_place_proves_nothing() -> None:
    flat = outcome([6.0, 5.0, 4.0, 4.0, 4.0, 4.0])
    assert same(flat, flat, LIMIT)[1] == "same"
    assert same(flat, flat, LIMIT, since=2)[1] == "proves nothing: the curve is too flat"


def test_exposed_communication_is_what_no_other_kernel_hides() -> None:
    def kernel(name: str, start: float, stop: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": stop - start}

    events = [
        kernel("gemm", 0, 40),
        kernel("ncclDevKernel_AllGather", 20, 60),  # 20 of it hidden
        kernel("gemm", 60, 70),
        kernel("ncclDevKernel_ReduceScatter", 62, 66),  # all of it
        kernel("gemm", 90, 100),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500},
    ]
    assert of_events(events) == pytest.approx((0.20, 0.44, 0.20))


def test_runs_end_in_their_time_and_lose_no_others(tmp_path: Path) -> None:
    told: list[str] = []
    machine = Machine(tmp_path, 1, dry=True, seconds=100, note=lambda name, found: told.append(name))
    jobs = [Job("refused", ["--no_such_flag", "1"], 60), Job("late", ["--help"], 5)]
    refused, late = machine.beside(jobs, 1)
    assert refused.refused
    assert "no_such_flag" in str(refused.failed)
    assert late.failed == "no time was left"
    assert sorted(told) == ["late", "refused"]


@pytest.mark.slow
def test_the_dry_run_says_what_is_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.multi_gpu", "--dry_run", "--parts", "1", "--gpus", "1,2"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("| same |")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| LoRA, FULL_SHARD",
        "| LoRA, SHARD_GRAD_OP",
        "| LoRA, NO_SHARD",
        "| LoRA, float8 base, FULL_SHARD",
        "| LoRA, 4-bit base, FULL_SHARD",
        "| full, FULL_SHARD",
        "| full, kill -9 on 2, on from step 12",
    ]
    assert "| 1 | 7 of 7 the same, 0 refused, 0 not right |" in done.stdout
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == done.stdout
    runs = {line["run"]: line for line in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    whole = replace(outcome([]), steps=runs["1-whole"]["steps"])
    assert same(whole, whole, DRY.tolerance)[1] == "same"
    for wrong in ("1-0-FULL_SHARD", "1-2-FULL_SHARD"):  # what another kind of run did is not taken for it
        assert same(replace(whole, steps=runs[wrong]["steps"]), whole, DRY.tolerance)[1] != "same"
