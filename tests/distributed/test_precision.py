"""Whole runs in every precision, on one and two gloo ranks, beside the same run in fp32.

fp16            losses within fp16's tolerance; overflows are events, and at the lowest scale a fault
pure_bf16       with and without fp32 masters
adamw8bit       where torchao is installed
offload         to the bit what shards on the device give
freeze_layers   the first layers stay, all others move, the model is saved whole
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import column, lines, train
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from packtrain.distributed.place import Place
from packtrain.errors import Fault
from packtrain.optim import LOWEST_SCALE, scaling

PATIENCE = 240.0
STEPS = 6
TORCHAO = importlib.util.find_spec("torchao") is not None
SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3}

LORA: dict[str, Any] = {"use_peft": True, "r": 4, "lora_dropout": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"save_metrics": True},
    "fp16": {"use_fp16": True},
    "pure bf16": {"pure_bf16": True},
    "anyprecision": {"pure_bf16": True, "optimizer": "anyprecision"},
    "anyprecision, no sum": {"pure_bf16": True, "optimizer": "anyprecision", "gradient_accumulation_steps": 1},
    "anyprecision, 8 bits": {"pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit"},
    "anyprecision alone": {"optimizer": "anyprecision"},
    "offload": {"fsdp_cpu_offload": True},
    "offload fp16": {"fsdp_cpu_offload": True, "use_fp16": True},
    "frozen": {"freeze_layers": True, "num_freeze_layers": 2},
    "lora": LORA,
    "lora fp16": LORA | {"use_fp16": True},
    "lora pure bf16": LORA | {"pure_bf16": True, "optimizer": "anyprecision"},
    "lora frozen": LORA | {"freeze_layers": True},
    **({"adamw8bit": {"optimizer": "adamw8bit"}} if TORCHAO else {}),
}


def flags_of(root: Path, out: str, **flags: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": str(root / "rows.csv"), "test_split": str(root / "rows.csv")},
        "batching_strategy": "padding",
        "val_batch_size": 4,
        "gradient_clipping": True,
        "lr": 2e-3,
        "max_train_step": STEPS,
        "output_dir": str(root / "out" / out),
    }
    return given | flags


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("precision")
    tiny.model(made / "base", **SIZES)
    tiny.grammar(made / "rows.csv", 12)
    return made


def whole_runs(place: Place, root: Path) -> dict[str, float]:
    """Run -> seconds; a step takes 4 rows on any number of ranks."""
    torch.compiler.set_stance("force_eager")  # torchao compiles its update, for a minute
    seconds = {}
    for name, flags in RUNS.items():
        parts = flags.get("gradient_accumulation_steps", 2)
        split = {"batch_size_training": 4 // parts // place.world_size, "gradient_accumulation_steps": parts}
        given = flags_of(root, f"{name}/{place.world_size}", **{**split, **flags})
        seconds[name] = train(place, name, given)["seconds"]
    return seconds


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """The folder of all runs: NAME/RANKS."""
    for world in (1, 2):
        run_ranks(whole_runs, world, root, timeout=PATIENCE)
    return root / "out"


def losses(finished: Path, name: str, world: int) -> list[float]:
    return column(lines(finished / name / str(world)), "loss")


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "beside", "bound"),
    [
        ("fp16", "fp32", 2e-3),
        ("lora fp16", "lora", 2e-3),
        ("pure bf16", "fp32", 2e-2),
        ("anyprecision", "fp32", 2e-2),
        ("anyprecision", "pure bf16", 5e-3),
        ("anyprecision, no sum", "anyprecision", 5e-3),
        ("anyprecision, 8 bits", "anyprecision", 5e-3),
        ("anyprecision alone", "fp32", 1e-6),
        ("lora pure bf16", "lora", 2e-2),
        ("lora frozen", "lora", 1e-6),
        ("offload", "fp32", 1e-6),
        ("offload fp16", "fp16", 1e-6),
        pytest.param("adamw8bit", "fp32", 2e-2, marks=pytest.mark.skipif(not TORCHAO, reason="torchao is missing")),
    ],
)
def test_losses_are_those_of_the_run_beside(name: str, beside: str, bound: float, world: int, finished: Path) -> None:
    found, expected = losses(finished, name, world), losses(finished, beside, world)
    assert len(found) == STEPS
    assert expected[-1] < expected[0] - 0.02  # it learns
    assert found == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(name: str, finished: Path) -> None:
    bound = 1e-5 if name in ("fp32", "offload", "frozen", "lora", "lora frozen", "anyprecision alone") else 5e-3
    for key in ("loss", "grad_norm", "eval_loss"):
        alone, both = (column(lines(finished / name / str(world)), key) for world in (1, 2))
        assert both == pytest.approx(alone, rel=bound if key != "grad_norm" else 4 * bound)


@pytest.mark.parametrize("world", [1, 2])
def test_the_saved_model_has_the_forwards_dtype(world: int, finished: Path) -> None:
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "pure bf16": torch.bfloat16, "anyprecision": torch.bfloat16}
    for name, dtype in dtypes.items():
        folder = finished / name / str(world)
        assert {tensor.dtype for tensor in weights(folder).values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("world", [1, 2])
def test_llama_recipes_metrics_are_one_file_of_all_ranks(world: int, finished: Path) -> None:
    folder = finished / "fp32" / str(world)
    (file,) = folder.glob("metrics_data_*.json")
    result = json.loads((folder / "run/result.json").read_text())
    assert result["metrics_filename"] == str(file)
    found = json.loads(file.read_text())
    assert found["train_step_loss"] == column(lines(folder), "loss")
    assert found["val_epoch_loss"] == column(lines(folder), "eval_loss")
    assert len(found["train_epoch_loss"]) == len(found["val_epoch_loss"]) == STEPS // 3
    assert sum(found["train_epoch_loss"]) / (STEPS // 3) == pytest.approx(result["avg_train_loss"])
    assert len(found["val_step_loss"]) == (STEPS // 3) * math.ceil(12 / (4 * world))


@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_weights_are_the_same_to_the_bit(world: int, finished: Path) -> None:
    here, there = weights(finished / "fp32" / str(world)), weights(finished / "offload" / str(world))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_layers_stay_and_all_others_move(world: int, root: Path, finished: Path) -> None:
    before, after = weights(root / "base"), weights(finished / "frozen" / str(world))
    assert before.keys() == after.keys()
    frozen = {name for name in before if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert len(frozen) == 2 * 9
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    everything = weights(finished / "fp32" / str(world))
    assert not any(torch.equal(before[name], everything[name]) for name in before)


def overflowing(place: Place, root: Path, base: str, first_scale: float) -> list[str]:
    """A run in fp16 from another first scale; what it raised."""
    scaling.FIRST_SCALE = first_scale
    flags = flags_of(root, f"{base} at {first_scale}/{place.world_size}", model_name=str(root / base), use_fp16=True)
    try:
        train(place, base, flags | {"run_validation": False})
    except Fault as fault:
        return [str(fault)]
    return []


@pytest.mark.parametrize("world", [1, 2])
def test_an_overflow_is_an_event_and_a_line_with_null(world: int, root: Path) -> None:
    assert run_ranks(overflowing, world, root, "base", 2.0**20) == [[]] * world
    written = lines(root / f"out/base at {2.0**20}/{world}")
    events = [line for line in written if line.get("event") == "overflow"]
    steps = [line for line in written if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert 1 <= len(events) < STEPS - 1
    assert [(e["step"], e["scale"]) for e in events] == [(n + 1, 2.0 ** (20 - n)) for n in range(len(events))]
    assert [line["step"] for line in steps if line["grad_norm"] is None] == [e["step"] for e in events]
    assert all(line["loss"] is not None for line in steps)
    assert len({line["loss"] for line in steps if line["grad_norm"] is not None}) == STEPS - len(events)
    result = json.loads((root / f"out/base at {2.0**20}/{world}/run/result.json").read_text())
    assert result["status"] == "done"


@pytest.mark.parametrize("world", [1, 2])
def test_what_no_scale_can_heal_is_a_fault(world: int, root: Path) -> None:
    broken = root / "broken"
    if not broken.exists():
        tiny.model(broken, **SIZES)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.norm.weight"][0] = float("inf")
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for said in run_ranks(overflowing, world, root, "broken", 2.0):
        assert said
        assert said[0].startswith("step 2: the loss (nan)")
    events = [line for line in lines(root / f"out/broken at 2.0/{world}") if "event" in line]
    assert [(e["event"], e["step"]) for e in events] == [("overflow", 1), ("not_finite", 2)]
    assert events[0]["scale"] == 2 * LOWEST_SCALE
    saved, base = weights(root / f"out/broken at 2.0/{world}"), weights(broken)
    assert all(torch.equal(saved[name], base[name].half()) for name in base)


def all_layers_frozen(place: Place, root: Path) -> None:
    train(place, "frozen", flags_of(root, "all frozen", freeze_layers=True, num_freeze_layers=3))


def test_all_layers_can_be_frozen(root: Path) -> None:
    run_ranks(all_layers_frozen, 2, root, timeout=PATIENCE)
    before, after = weights(root / "base"), weights(root / "out/all frozen")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
