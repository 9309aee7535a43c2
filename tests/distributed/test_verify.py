"""`packtrain verify`: right runs are within their bounds, and each kind of wrong one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

import tiny
from packtrain import cli, log, preflight
from packtrain.batch import Batch
from packtrain.checkpoint.dcp_run import Checkpoints
from packtrain.commands import verify_numbers, verify_resume, verify_run
from packtrain.commands.verify import apart
from packtrain.commands.verify_numbers import Row
from packtrain.configs.parse import build
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place
from packtrain.optim import Optimizer
from packtrain.train.interrupt import Interrupt

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
DROPOUT = {"use_peft": True, "lora_config": {"r": 4, "lora_dropout": 0.2, "target_modules": "all-linear"}}
PACKED = {"batching_strategy": "packing", "context_length": 160, "batch_size_training": 1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "lora with dropout, packed": (1, DROPOUT | PACKED),
    "full, recomputed, sharded": (2, {"activation_checkpointing": "full"}),
    "lora, not sharded, packed": (2, DROPOUT | PACKED | {"sharding_strategy": "NO_SHARD"}),
    "prompts": (1, {"use_peft": True, "peft_method": "llama_adapter", "adapter_layers": 2}),
    "bf16": (1, {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision"}),
    "4 bits": (1, DROPOUT | {"quantization": "4bit"}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tiny.model(folder / "base", **SIZES)
    words = ["he", "go", "home", "and", "she", "see", "a", "dog", "near", "the", "old", "house"]
    tiny.grammar(folder / "rows.csv", [(" ".join(words[: 1 + i % 9]), " ".join(words[i % 5 :])) for i in range(12)])
    return folder


def flags_of(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 2,
        "gradient_accumulation_steps": 2,
        "context_length": 128,
        "lr": 0.01,
        "verify_steps": 1,
        "output_dir": str(root / out),
        **changes,
    }


def verified(place: Place, flags: dict[str, Any]) -> tuple[bool, list[Row]]:
    """(what the command says, the rows of rank 0)."""
    log.quiet()
    cfg, seen = apart(build(**flags)), []
    whole = verify_run.table
    verify_run.table = lambda title, rows: (seen.extend(rows), whole(title, rows))[1]  # type: ignore[func-returns-value]
    result = verify_run.run(cfg, place, preflight.inputs(cfg, place), Interrupt())
    verify_run.table = whole
    return result["ok"], [Row(*row) for row in seen]


@pytest.mark.parametrize("case", CASES)
def test_a_right_run_is_within_its_bounds(case: str, root: Path) -> None:
    world, changes = CASES[case]
    results = run_ranks(verified, world, flags_of(root, case, **changes))
    rows = results[0][1]
    assert all(ok for ok, _ in results), [row for row in rows if not row.ok]
    names = [row.name for row in rows]
    assert names[:2] == ["loss", "gradient norm"]
    assert names[-1] == "saved tensors, stopped after step 1 of 2"
    assert len(rows) > 6
    assert all(row.reference > 0 for row in rows)  # nothing is compared with zeros
    assert [row.difference for row in rows[-3:]] == [0.0] * 3
    assert not list(root.glob("*.packtrain-verify"))
    if case == "bf16":
        assert max(row.difference for row in rows[:-3]) > 1e-4  # it is no fp32


Broken = Callable[[pytest.MonkeyPatch, Place], None]


def wrong_mask(patch: pytest.MonkeyPatch, place: Place) -> None:
    """The documents of a pack see one another."""
    whole = Loader.step

    def step(self: Loader, index: int, pieces: int = 1) -> list[Batch]:
        made = []
        for batch in whole(self, index, pieces):
            rows, columns = batch.ids.shape
            edges = torch.arange(0, rows * columns + 1, columns, dtype=torch.int32)
            made.append(replace(batch, cu_seqlens=edges, lengths=(columns,) * rows, max_seqlen=columns))
        return made

    patch.setattr(Loader, "step", step)


def wrong_weight(patch: pytest.MonkeyPatch, place: Place) -> None:
    """The last micro-batch counts a thousandth more than its labels."""
    whole, calls = Optimizer.scale, []

    def scale(self: Optimizer, loss: Tensor) -> Tensor:
        calls.append(loss)
        return whole(self, loss) * (1.001 if len(calls) == 3 else 1.0)

    patch.setattr(Optimizer, "scale", scale)


def wrong_sum(patch: pytest.MonkeyPatch, place: Place) -> None:
    """A rank's labels are not counted."""
    whole = verify_numbers.step_vector

    def vector(batches: Any, stop: bool, device: torch.device) -> Tensor:
        shares = whole(batches, stop, device)
        return shares * (0 if place.rank == 1 else 1)

    patch.setattr(verify_numbers, "step_vector", vector)


def forgets_moments(patch: pytest.MonkeyPatch, place: Place) -> None:
    """A resume that brings the weights back and the optimizer's first moments not."""
    whole = Checkpoints.restore

    def restore(self: Checkpoints, resumed: Any) -> None:
        whole(self, resumed)
        next(iter(self._optimizer.state().values()))["exp_avg"].zero_()

    patch.setattr(Checkpoints, "restore", restore)


BREAKS: dict[str, tuple[int, Broken, dict[str, Any], set[str]]] = {
    "mask": (1, wrong_mask, PACKED, {"loss", "gradient norm"}),
    "weight": (1, wrong_weight, {}, {"gradient norm"}),
    "sum": (2, wrong_sum, {}, {"loss", "gradient norm"}),
    "resume": (1, forgets_moments, {}, {"saved tensors, stopped after step 1 of 2"}),
}


def broken(place: Place, name: str, flags: dict[str, Any]) -> tuple[bool, list[Row]]:
    with pytest.MonkeyPatch.context() as patch:
        BREAKS[name][1](patch, place)
        return verified(place, flags)


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_run_is_not(name: str, root: Path) -> None:
    world, _, changes, expected = BREAKS[name]
    results = run_ranks(broken, world, name, flags_of(root, name, **changes))
    assert not any(ok for ok, _ in results)
    wrong = {row.name for row in results[0][1] if not row.ok}
    assert expected <= wrong
    assert (wrong <= {row.name for row in results[0][1][-3:]}) == (name == "resume")


def test_noise_is_the_bound_of_a_resume_where_there_is_some(root: Path, monkeypatch: Any) -> None:
    differences = {"stopped": 2e-7, "again": 1e-7}
    monkeypatch.setattr(
        verify_resume,
        "_differences",
        lambda ours, whole: dict.fromkeys(("loss", "grad_norm", "saved"), differences[ours.name]),
    )
    monkeypatch.setattr(verify_resume, "_figures", lambda folder: {"loss": [1.0], "grad_norm": [1.0]})
    monkeypatch.setattr(verify_resume, "_saved", lambda folder: {})
    noise = {"loss": 1e-7, "grad_norm": 1e-7, "saved": 0.0}
    rows = verify_resume._compared(Path("stopped"), Path("whole"), noise, 1)
    assert [row.ok for row in rows] == [True, True, False]


def words(root: Path, **changes: Any) -> list[str]:
    flags = flags_of(root, "cli", **changes)
    data = {f"grammar_dataset.{name}": value for name, value in flags.pop("grammar_dataset").items()}
    return [word for name, value in (flags | data).items() for word in (f"--{name}", str(value))]


def test_the_command_says_it_with_its_exit_code(root: Path, monkeypatch: Any, capsys: Any) -> None:
    assert cli.main(["verify", *words(root)]) == 0
    said = capsys.readouterr()
    assert "one step on 1 ranks (fp32) against plain fp32 on one:" in said.out
    assert "a run that was stopped and went on, against one that was not:" in said.out
    assert "NOT OK" not in said.out
    assert not (root / "cli").exists()
    monkeypatch.setitem(verify_numbers.BOUNDS, "fp32", verify_numbers.Bounds(1e-12, 1e-12, 1e-12))
    assert cli.main(["verify", *words(root)]) == 1
    said = capsys.readouterr()
    assert "NOT OK" in said.out
    assert "verify: NOT everything is within its bound" in said.err
    assert cli.main(["verify", *words(root, batch_size_training=0)]) == 2


def test_it_starts_workers(root: Path) -> None:
    command = [sys.executable, "-m", "packtrain", "verify", *words(root, nproc_per_node=2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "one step on 2 ranks (fp32) against plain fp32 on one:" in done.stdout
