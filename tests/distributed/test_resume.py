"""A run that was cut off goes on: same bits on as many ranks, the same within 1e-5 on others.

Each case runs three times in one group: unbroken; cut by a signal (or an error) in the middle of an epoch; and the same
command again. Compared are every line of metrics.jsonl, result.json and what is saved.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import apart, column, lines, train
from safetensors.torch import load_file

import tiny
from packtrain import building, finetuning, log, preflight
from packtrain.checkpoint.dcp_folder import complete, read_state, verify
from packtrain.checkpoint.dcp_run import Checkpoints, Resumed
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.errors import Stopped, UserError
from packtrain.optim.rules import has_torchao
from packtrain.train.interrupt import Interrupt
from packtrain.train.loop import Loop

PATIENCE = 120.0
SIZES = {
    "vocab_size": 391,
    "hidden_size": 32,
    "intermediate_size": 44,
    "initializer_range": 0.3,
    "attention_bias": True,
}
ROWS, STEPS = 11, 6
"""4 rows a step, so 3 steps an epoch whose last is short; two epochs."""

LORA = {
    "use_peft": True,
    "lora_config": {
        "r": 4,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "bias": "lora_only",
    },
}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA | {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "warmup_steps": 2},
    "lora, 4 bits": LORA | {"quantization": "4bit", "quant_type": "nf4", "use_double_quant": True},
    "lora, packed": LORA | {"batching_strategy": "packing", "context_length": 64, "eval_steps": 2},
    "full": {
        "weight_decay": 0.1,
        "gradient_clipping": True,
        "save_steps": 2,
        "eval_first": True,
        "save_optimizer": True,
        "save_metrics": True,
    },
    "full, bf16, gathered": {
        "fsdp_config.pure_bf16": True,
        "checkpoint_type": "StateDictType.FULL_STATE_DICT",
        "eval_steps": 1,
    },
    "full, anyprecision": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "save_steps": 1},
    "full, 8 bits": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit", "save_steps": 1},
    "full, fp16": {"use_fp16": True, "freeze_layers": True},
    "prefix": {"use_peft": True, "peft_method": "prefix", "num_virtual_tokens": 5},
    "llama_adapter": {"use_peft": True, "peft_method": "llama_adapter", "adapter_len": 5, "adapter_layers": 2},
}
if has_torchao():
    CASES["lora, 8-bit moments"] = LORA | {"optimizer": "adamw8bit", "save_steps": 1}
    CASES["full, 8-bit moments"] = {"optimizer": "adamw8bit", "fsdp_config.pure_bf16": True}
RUNS = {1: ["lora", "full"], 2: list(CASES)}
"""Ranks -> cases."""

CLOCK = ("step_time", "tokens_per_second", "memory_gb")


class StopAt(Interrupt):
    """A signal that comes while a step is made ready, on one rank."""

    def __init__(self, step: int, place: Place, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self._left, self._error = step if place.rank == place.world_size - 1 else -1, error

    @property
    def asked(self) -> bool:
        if sys._getframe(1).f_code is not Loop._wishes.__code__:
            return False  # an evaluation asks too, of every batch
        self._left -= 1
        if self._left == 0 and self._error is not None:
            raise self._error
        return self._left == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.model(folder / "base", **SIZES)
    tiny.model(folder / "no biases", **SIZES | {"attention_bias": False})
    words = ["he", "go", "home", "and", "she", "see", "a", "dog", "near", "the", "old", "house", "at", "night"]
    tiny.grammar(folder / "rows.csv", [(" ".join(words[: 1 + i]), " ".join(words[i:])) for i in range(ROWS)])
    return folder


def flags_of(root: Path, case: str, out: str, world: int, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    settings = dict(CASES[case])
    rows = 4 // settings.get("gradient_accumulation_steps", 1) // world
    return {
        "model_name": str(root / ("no biases" if case == "llama_adapter" else "base")),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": max(1, rows),
        "val_batch_size": 2,
        "num_epochs": 2,
        "lr": 0.02,
        "seed": 5,
        "output_dir": str(root / out),
        **settings,
        **changes,
    }


def cut_off(place: Place, name: str, flags: dict[str, Any], step: int, error: type[BaseException] | None = None) -> str:
    """A run that a signal ends after a step, or an error in it; what was said."""
    log.quiet()
    cfg, own = build(**flags), apart(place, name)
    with pytest.raises((Stopped, RuntimeError)) as said:
        finetuning.run(cfg, own, preflight.inputs(cfg, own), StopAt(step, place, error))
    return str(said.value)


def broken_and_not(place: Place, root: Path, names: list[str]) -> dict[str, list[str]]:
    torch.compiler.set_stance("force_eager")  # torchao compiles its update, which takes a minute on a CPU
    said: dict[str, list[str]] = {}
    for case in names:
        train(place, f"{case} whole", flags_of(root, case, f"{place.world_size}/{case}/whole", place.world_size))
        flags = flags_of(root, case, f"{place.world_size}/{case}/broken", place.world_size)
        said[case] = [cut_off(place, f"{case} {step}", flags, step - begin) for begin, step in ((0, 2), (2, 3), (3, 5))]
        train(place, f"{case} again", flags)
    return said


@pytest.fixture(scope="module")
def broken(root: Path) -> dict[int, dict[str, list[str]]]:
    """Ranks -> case -> what was said at each stop: in the first epoch, at its end, in the second."""
    return {world: run_ranks(broken_and_not, world, root, names, timeout=PATIENCE)[0] for world, names in RUNS.items()}


def without_clock(lines: list[dict[str, Any]]) -> list[str]:
    """Lines to be compared bit by bit: json writes a float so that it reads back the same."""
    return [json.dumps({key: value for key, value in line.items() if key not in CLOCK}) for line in lines]


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in RUNS.items() for case in cases])
def test_a_stopped_run_goes_on_bit_for_bit(world: int, case: str, root: Path, broken: Any) -> None:
    said = [f"stopped by a signal on another rank after step {step} of {STEPS}" for step in (2, 3, 5)]
    assert [text.partition(";")[0] for text in broken[world][case]] == said
    whole, again = root / f"{world}/{case}/whole", root / f"{world}/{case}/broken"
    assert len(column(lines(whole), "loss")) == STEPS
    assert without_clock(lines(whole)) == without_clock(lines(again))
    for before in whole.rglob("*.safetensors"):
        after = again / before.relative_to(whole)
        assert before.read_bytes() == after.read_bytes(), before
    results = [json.loads((folder / "run/result.json").read_text()) for folder in (whole, again)]
    for key in ("status", "step", "best_eval_loss", "best_step", "avg_train_loss", "avg_eval_loss", "tokens_total"):
        assert results[0][key] == results[1][key], key
    assert results[1]["resumed_from"].endswith("step-5")
    assert results[1]["last_checkpoint"].endswith(f"step-{STEPS}")


@pytest.mark.parametrize("world", RUNS)
def test_save_metrics_goes_on_in_the_same_file(world: int, root: Path, broken: Any) -> None:
    whole, again = (list((root / f"{world}/full/{name}").glob("metrics_data_*.json")) for name in ("whole", "broken"))
    assert len(whole) == len(again) == 1
    found = json.loads(again[0].read_text(encoding="utf-8"))
    assert found == json.loads(whole[0].read_text(encoding="utf-8"))
    assert len(found["train_step_loss"]) == STEPS


@pytest.mark.parametrize("case", CASES)
def test_what_is_kept(case: str, root: Path, broken: Any) -> None:
    """The newest and the best checkpoint, whole, the same after a broken run; the place in it is a count of rows."""
    for how in ("whole", "broken"):
        kept = complete(root / f"2/{case}/{how}/checkpoints")
        best = json.loads((root / f"2/{case}/{how}/run/result.json").read_text())["best_step"]
        assert max(kept) == STEPS
        assert set(kept) <= {STEPS, best}
        for folder in kept.values():
            assert verify(folder) == []
        state = read_state(kept[STEPS])
        assert state["sample"] == (2 * ROWS if "packed" not in case else state["sample"])
        assert state["optimizer"] == CASES[case].get("save_optimizer", False)


def on_other_ranks(place: Place, root: Path, case: str) -> list[list[int]]:
    """The run that 2 ranks began, a copy for this number of ranks, to its end; the rows of each later step."""
    flags = flags_of(root, case, f"began/{case}-{place.world_size}", 2)
    train(place, "other", flags)
    cfg = build(**flags)
    loader, _ = building.loaders(cfg, preflight.inputs(cfg, apart(place, "rows")), place, 4)
    return [[row for batch in loader.step(step) for row in batch.rows] for step in range(2, STEPS)]


def begun(place: Place, root: Path, case: str) -> list[list[int]]:
    flags = flags_of(root, case, f"began/{case}", 2)
    cut_off(place, "begun", flags, 2)
    cfg = build(**flags)
    loader, _ = building.loaders(cfg, preflight.inputs(cfg, apart(place, "rows")), place)
    return [[row for batch in loader.step(step) for row in batch.rows] for step in range(2, STEPS)]


@pytest.mark.parametrize("case", ["lora", "full"])
def test_another_number_of_ranks_takes_the_same_rows(case: str, root: Path, broken: Any) -> None:
    """2 ranks begin; 1, 3 and 4 end it: 3 x 2 rows hold the 4 of a step, and some ranks get none."""
    parts = run_ranks(begun, 2, root, case, timeout=PATIENCE)
    for world in (1, 3, 4):
        shutil.copytree(root / f"began/{case}", root / f"began/{case}-{world}")
        others = run_ranks(on_other_ranks, world, root, case, timeout=PATIENCE)
        for step in range(STEPS - 2):
            assert sorted(r for rank in others for r in rank[step]) == sorted(r for rank in parts for r in rank[step])
        whole, ours = lines(root / f"2/{case}/whole"), lines(root / f"began/{case}-{world}")
        for key in ("loss", "grad_norm", "eval_loss"):
            assert column(ours, key) == pytest.approx(column(whole, key), rel=1e-5), (world, key)
        for key in ("lr", "tokens", "tokens_total", "epoch", "step"):
            assert column(ours, key) == column(whole, key), (world, key)


def without_moments(place: Place, root: Path) -> None:
    """The run that 2 ranks stopped, gone on with on 2, but for its first moments."""
    flags = flags_of(root, "full", "forgetful", 2)
    with pytest.MonkeyPatch.context() as patch:
        restore = Checkpoints.restore

        def forgets(self: Any, resumed: Resumed) -> None:
            restore(self, resumed)
            for state in self._optimizer.state().values():
                state["exp_avg"].zero_()

        patch.setattr(Checkpoints, "restore", forgets)
        train(place, "forgetful", flags)


def test_what_is_not_restored_is_noticed(root: Path, broken: Any) -> None:
    run_ranks(begun, 2, root, "full", timeout=PATIENCE)
    shutil.copytree(root / "began/full", root / "forgetful")
    run_ranks(without_moments, 2, root, timeout=PATIENCE)
    losses = [column(lines(root / folder), "loss") for folder in ("2/full/whole", "forgetful")]
    assert losses[0][:3] == losses[1][:3]  # the third is of the restored weights, before their first update
    assert losses[0][3:] != pytest.approx(losses[1][3:], rel=1e-5)


def crashes(place: Place, root: Path) -> dict[str, Any]:
    """Endings that no signal announces, and folders that are not this run's to go on with."""
    log.quiet()
    found: dict[str, Any] = {}
    flags = flags_of(root, "full", "crashed", 1)
    found["crash"] = cut_off(place, "crash", flags, 6, RuntimeError)
    steps = root / "crashed/checkpoints"
    found["kept"] = list(complete(steps))
    with (root / "crashed/run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    for name, changes in {
        "lr": {"lr": 0.03, "gradient_clipping_threshold": 2.0},
        "rows": {"batch_size_training": 2},
        "data": {"grammar_dataset": {"train_split": str(root / "other.csv"), "test_split": str(root / "rows.csv")}},
    }.items():
        changed = flags | changes
        with pytest.raises(UserError) as error:
            train(place, name, changed)
        found[name] = str(error.value)
    shutil.copytree(root / "crashed", root / "split")
    found["split"] = train(
        place,
        "split",
        flags | {"output_dir": str(root / "split"), "batch_size_training": 2, "gradient_accumulation_steps": 2},
    )["status"]
    damaged = max(complete(steps).items())[1]
    shutil.copytree(root / "crashed", root / "damaged")
    file = root / "damaged/checkpoints" / damaged.name / "rank-00000.safetensors"
    bytes_ = bytearray(file.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    file.write_bytes(bytes_)
    found["damaged"] = train(place, "damaged", flags | {"output_dir": str(root / "damaged")})
    found["again"] = train(place, "again", flags)
    for case in (
        "full",
        "lora",
    ):  # the end of a run whose last word is missing; with the optimizer's state, and without
        folder = root / f"1/{case}/broken"
        result = json.loads((folder / "run/result.json").read_text())
        (folder / "run/result.json").write_text(json.dumps(result | {"status": "failed"}))
        found[f"{case} ended"] = train(place, f"{case} ended", flags_of(root, case, f"1/{case}/broken", 1))
    found["overwritten"] = train(place, "overwritten", flags | {"overwrite_output_dir": True, "max_train_step": 1})
    return found


def test_ends_that_nothing_announced(root: Path, broken: Any) -> None:
    tiny.grammar(root / "other.csv", 11)
    (found,) = run_ranks(crashes, 1, root, timeout=PATIENCE)
    whole = without_clock(lines(root / "1/full/whole"))
    assert found["kept"] in ([4], [3, 4])
    assert "--lr: 0.02 then, 0.03 now" in found["lr"]
    assert "--gradient_clipping_threshold: 1.0 then, 2.0 now" in found["lr"]
    assert "--overwrite_output_dir" in found["lr"]
    assert "rows of a step: 4 then, 2 now (--batch_size_training: 4 then, 2 now)" in found["rows"]
    assert "train data: " in found["data"]
    assert found["again"]["resumed_from"].endswith("step-4")
    assert without_clock(lines(root / "damaged")) == whole
    assert not str(found["damaged"].get("resumed_from")).endswith("step-4")
    assert (root / "damaged/checkpoints/damaged/step-4").is_dir()
    assert found["split"] == "done"
    for case in ("full", "lora"):
        assert found[f"{case} ended"]["status"] == "done"
        assert without_clock(lines(root / f"1/{case}/broken")) == without_clock(lines(root / f"1/{case}/whole"))
    assert len(column(lines(root / "crashed"), "loss")) == 1
    assert list(complete(root / "crashed/checkpoints")) == [1]
    assert list(complete(root / "crashed/checkpoints/old"))[-1] == STEPS


def test_the_folders_of_the_dist_flags(root: Path) -> None:
    """ROOT/FOLDER-NAME/step-N, the model's slashes out of the way; results are in --output_dir all the same."""
    run_ranks(with_dist_flags, 1, root)
    name = str(root / "base").lstrip("/").replace("/", "--")
    assert list(complete(root / f"ck/tuned-{name}")) == [1]
    assert (root / f"ck/tuned-{name}/step-1/config.json").is_file()
    assert load_file(root / "dist/model.safetensors")["model.norm.weight"].dtype == torch.float32
    assert not (root / "dist/checkpoints").exists()


def with_dist_flags(place: Place, root: Path) -> None:
    dist = {"dist_checkpoint_root_folder": str(root / "ck"), "dist_checkpoint_folder": "tuned"}
    train(place, "dist", flags_of(root, "full", "dist", 1, max_train_step=1, **dist))
