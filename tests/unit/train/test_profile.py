"""The profiler's files, its table and its schedule."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import packtrain
import tiny
from packtrain.configs.parse import build
from packtrain.kernels import product
from packtrain.train.measure import watch_of
from packtrain.train.profile import HEAVIEST, Profiler, heaviest
from packtrain.train.watch import Watch

TENSORBOARD = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")
"""torch's TensorBoard plugin: worker, time."""
ALONE: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


def steps(profiler: Profiler, count: int) -> dict[str, Any]:
    for number in range(1, count + 1):
        with profiler.step(number, []):
            torch.randn(60, 60) @ torch.randn(60, 60)
    return profiler.finish()


def trace(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json.gz")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        found: dict[str, Any] = json.load(opened)
    return found


def recorded(folder: Path) -> list[str]:
    """Names of the steps in a trace."""
    names = {event.get("name", "") for event in trace(folder)["traceEvents"]}
    return sorted(name for name in names if name.startswith("ProfilerStep#"))


@pytest.mark.parametrize(("count", "expected"), [(6, [3, 4, 5]), (9, [3, 4, 5]), (5, [3, 4])])
def test_steps_4_to_6_are_recorded(tmp_path: Path, count: int, expected: list[int]) -> None:
    folder = tmp_path / "deep" / "down"
    assert steps(Profiler(folder, ALONE), count) == {"profiler_dir": str(folder)}
    # torch counts from 0, and a run that ends while recording leaves the beginning of a step more
    assert recorded(folder)[: len(expected)] == [f"ProfilerStep#{number}" for number in expected]
    assert any(event.get("name") == "aten::mm" for event in trace(folder)["traceEvents"])


def test_the_file_is_named_as_tensorboard_wants_it(tmp_path: Path) -> None:
    steps(Profiler(tmp_path, SimpleNamespace(rank=3, world_size=4, device=torch.device("cpu"))), 6)  # type: ignore[arg-type]
    (file,) = tmp_path.iterdir()
    found = TENSORBOARD.match(file.name)
    assert found is not None
    assert found[1] == "rank-3"


def test_two_runs_into_one_folder_keep_both_traces(tmp_path: Path) -> None:
    for _ in range(2):
        steps(Profiler(tmp_path, ALONE), 6)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_too_short_to_record_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps(Profiler(tmp_path, ALONE), 3) == {"profiler_dir": None}
    assert "the run had 3 steps, and recording begins with step 4" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_ten_heaviest_operators(tmp_path: Path) -> None:
    def event(name: str, micros: float, device: str = "CPU") -> Any:
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(
            key=name, count=6, device_type=kind, self_cpu_time_total=micros, self_device_time_total=2 * micros
        )

    events = [event(f"op{number}", 100.0 * number) for number in range(13)]
    events += [event("ProfilerStep*", 1e9), event("kernel of op12", 1e9, "CUDA")]
    header, *rows = heaviest(events, 3, on_cuda=False)
    assert "CPU ms/step" in header
    assert [row.split()[0] for row in rows] == [f"op{number}" for number in range(12, 12 - HEAVIEST, -1)]
    assert rows[0].split() == ["op12", "2.0", "0.400", "15.4%"]
    assert "GPU ms/step" in heaviest(events, 3, on_cuda=True)[0]
    assert heaviest(events, 3, on_cuda=True)[1].split() == ["op12", "2.0", "0.800", "15.4%"]


def test_nobody_watches_by_default() -> None:
    watch = Watch()
    with watch.step(1, []):
        pass
    assert watch.finish() == {}


def test_profiler_dir_is_obeyed(tmp_path: Path) -> None:
    cfg = build(model_name="M", use_profiler=True, profiler_dir=str(tmp_path / "typed"))
    watch = watch_of(cfg, None, ALONE, tmp_path, 9)  # type: ignore[arg-type]  # no model is needed
    assert isinstance(watch, Profiler)
    assert steps(watch, 6) == {"profiler_dir": str(tmp_path / "typed")}


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "run" / "profile"
    result = packtrain.finetune(
        model_name=str(tiny.model(tmp_path / "model")),
        dataset="grammar_dataset",
        train_split=str(tiny.grammar(tmp_path / "rows.csv", 24)),
        run_validation=False,
        context_length=64,
        batch_size_training=1,
        max_train_step=7,
        output_dir=str(tmp_path / "out"),
        use_profiler=True,
    )
    assert result["profiler_dir"] == str(folder)
    assert len(recorded(folder)) == 3
    said = capsys.readouterr().err
    assert "the memory snapshot is of CUDA's memory; there is none on a CPU" in said
    assert f"profiler: 3 steps of each rank are in {folder} (TensorBoard, ui.perfetto.dev)" in said
    assert "operator (its own time)" in said
    heaviest = "aten::mm " if product._ONEDNN is None else "mkldnn::_linear_pointwise "
    assert heaviest in said
    assert (tmp_path / "out" / "model.safetensors").is_file()
