"""What holds in every run, and what is said when it does not: each check sees a run that was broken on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import lines, train
from torch import Tensor

import tiny
from packtrain import building, finetuning, preflight
from packtrain.checkpoint import adapter as adapter_files
from packtrain.configs.parse import build
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place
from packtrain.errors import Fault, UserError
from packtrain.optim import Optimizer
from packtrain.peft.lora import LoraAdapter
from packtrain.train.invariants import FirstSteps

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3}
LORA = {"use_peft": True, "lora_config": {"r": 4, "target_modules": ["q_proj", "up_proj"]}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, dropout": {"use_peft": True, "lora_config": {"r": 4, "lora_dropout": 0.3, "target_modules": "all-linear"}},
    "lora, saved modules": {"use_peft": True, "modules_to_save": "embed_tokens,lm_head", "lora_config.r": 2},
    "llama_adapter": {"use_peft": True, "peft_method": "llama_adapter", "adapter_layers": 2},
    "prefix": {"use_peft": True, "peft_method": "prefix", "num_virtual_tokens": 3},
    "full": {},
    "full, some frozen": {"freeze_layers": True},
    "full, masters": {"fsdp_config.pure_bf16": True},
    "full, anyprecision": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "lr": 1e-5},
    "full, 8 bits": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit", "lr": 1e-5},
    "full, no remainders": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "use_kahan": False, "lr": 1e-7},
    "full, warming up": {"warmup_steps": 1000, "lr": 1e-4},
}
STRATEGIES: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, {"sharding_strategy": "NO_SHARD"}],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariants")
    tiny.model(folder / "base", **SIZES)
    tiny.grammar(folder / "rows.csv", 8)
    return folder


def flags_of(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "run_validation": False,
        "batching_strategy": "padding",
        "batch_size_training": 2,
        "num_epochs": 1,
        "max_train_step": 2,
        "lr": 0.01,
        "output_dir": str(root / out),
        **changes,
    }


def healthy(place: Place, root: Path) -> list[str]:
    """Methods that ran although the checks looked at them, with what was said against them."""
    seen: list[bool] = []
    whole = FirstSteps.taken

    def taken(self: FirstSteps, step: int, lr: float) -> None:
        whole(self, step, lr)
        seen.append(self.done)

    FirstSteps.taken = taken  # type: ignore[method-assign]
    wrong = []
    for number, strategy in enumerate(STRATEGIES[place.world_size]):
        for name, method in METHODS.items():
            seen.clear()
            try:
                train(
                    place,
                    f"{name} {number}",
                    flags_of(root, f"{place.world_size}/{name}/{number}", **method, **strategy),
                )
            except Fault as fault:
                wrong.append(f"{name}: {fault}")
            wrong += [f"{name}: not looked at, {seen}"] * (seen != [False, True])
    return wrong


@pytest.mark.parametrize("world", [1, 2])
def test_every_method_holds(world: int, root: Path) -> None:
    assert run_ranks(healthy, world, root, timeout=120) == [[]] * world


Broken = Callable[[Place, pytest.MonkeyPatch], None]


def cut_graph(place: Place, patch: pytest.MonkeyPatch) -> None:
    """An adapter whose output is detached: q_proj learns nothing, and the run would go on."""
    whole = LoraAdapter.forward

    def forward(self: LoraAdapter, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        made = whole(self, x, y, keys)
        return made.detach() + y * 0 if y.shape[1] == SIZES["hidden_size"] else made

    patch.setattr(LoraAdapter, "forward", forward)


def still(place: Place, patch: pytest.MonkeyPatch) -> None:
    """An update that reaches no weight."""
    whole = Optimizer.step

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        before = {name: weight.value.clone() for name, weight in self._weights.items() if "layers.1" in name}
        whole(self, *args, **kwargs)
        for name, value in before.items():
            self._weights[name].value.copy_(value)

    patch.setattr(Optimizer, "step", step)


def restless(place: Place, patch: pytest.MonkeyPatch) -> None:
    """A frozen weight that somebody changes, on one rank."""
    whole = building.build

    def build_(*args: Any, **kwargs: Any) -> Any:
        model = whole(*args, **kwargs)
        if place.rank == place.world_size - 1:
            norm = building.local_rows(model.model.norm.weight)[0]
            step = Optimizer.zero_grad
            patch.setattr(Optimizer, "zero_grad", lambda self: (norm.add_(0.001), step(self))[1])
        return model

    patch.setattr(finetuning, "build", build_)


def other_order(place: Place, patch: pytest.MonkeyPatch) -> None:
    if place.rank == 1:
        whole = Loader.order
        patch.setattr(Loader, "order", lambda self, epoch: whole(self, epoch)[::-1])


def other_copy(place: Place, patch: pytest.MonkeyPatch) -> None:
    """A copy of the model that began elsewhere."""
    if place.rank == 1:
        whole = building.build

        def build_(*args: Any, **kwargs: Any) -> Any:
            model = whole(*args, **kwargs)
            with torch.no_grad():
                model.model.layers[1].input_layernorm.weight[0] += 0.001
            return model

        patch.setattr(finetuning, "build", build_)


def other_settings(place: Place, patch: pytest.MonkeyPatch) -> None:
    if place.rank == 1:
        whole = preflight._settings
        patch.setattr(preflight, "_settings", lambda cfg: whole(cfg) | {"--lr": 0.5})


def bad_save(place: Place, patch: pytest.MonkeyPatch) -> None:
    """Gathered wrong: what is written is read back as it was written, and is not what the model has."""
    whole = adapter_files._gathered

    def gathered(*args: Any) -> dict[str, Tensor]:
        tensors = whole(*args)
        return {name: t + 1e-6 * ("layers.1" in name and "lora_B" in name) for name, t in tensors.items()}

    patch.setattr(adapter_files, "_gathered", gathered)


BREAKS: dict[str, tuple[Broken, dict[str, Any], list[int], str]] = {
    "cut": (
        cut_graph,
        LORA,
        [1, 2],
        "q_proj.lora_B, model.layers.1.self_attn.qkv_proj.adapters.q_proj.lora_B: 2 of 8 trained",
    ),
    "still": (still, {}, [1, 2], "6 of 15 trained have a gradient and have not moved"),
    "restless": (restless, LORA, [1, 2], "model.norm.weight: 1 of 15 frozen have changed"),
    "order": (other_order, {}, [2], "the order of the data of rank 1 differs"),
    "copy": (other_copy, {"sharding_strategy": "NO_SHARD"}, [2], "the model of rank 1 differs"),
    "settings": (other_settings, {}, [2], "the settings, data or weights file of rank 1 differs"),
    "save": (bad_save, LORA, [1, 2], "lora_B.weight is saved with other values than the model has"),
}


def broken(place: Place, root: Path, name: str) -> str:
    breaks, changes, *_ = BREAKS[name]
    with pytest.MonkeyPatch.context() as patch:
        breaks(place, patch)
        try:
            train(place, name, flags_of(root, f"broken/{name}/{place.world_size}", **changes))
        except Fault as fault:
            return str(fault)
    return "nothing was said"


@pytest.mark.parametrize(("name", "world"), [(name, world) for name, row in BREAKS.items() for world in row[2]])
def test_a_broken_run_is_stopped_with_names(name: str, world: int, root: Path) -> None:
    said = run_ranks(broken, world, root, name)
    assert all(BREAKS[name][3] in text or "failed: " in text for text in said), said
    assert any(BREAKS[name][3] in text for text in said), said
    steps = [line["step"] for line in lines(root / f"broken/{name}/{world}")]
    assert len(steps) == {"order": 0, "copy": 0, "settings": 0, "save": 2}.get(name, 1)


def test_rows_that_mask_their_end_are_refused(root: Path, tmp_path: Path) -> None:
    def custom(labels: str) -> dict[str, Any]:
        row = f"{{'input_ids': [5, 6, 1], 'labels': {labels}}}"
        (tmp_path / "own.py").write_text(f"def get_custom_dataset(config, tokenizer, split):\n    return [{row}] * 4\n")
        return {"dataset": "custom_dataset", "custom_dataset": {"file": str(tmp_path / "own.py")}}

    def examined(labels: str) -> list[str]:
        return preflight.examine(build(**flags_of(root, "none") | custom(labels)), writes=False).lines()

    with pytest.raises(UserError, match=r"4 of 4 rows end with the end of sequence \(</s>\) and none trains it"):
        examined("[-100, 6, -100]")
    assert any("4 of 4 rows teach the end of sequence" in line for line in examined("[-100, 6, 1]"))
    assert not any("warning" in line for line in examined("[-100, 6, 1]"))


def test_what_it_costs(root: Path) -> None:
    """Beside a step: well under one, in a model whose steps are as short as they come."""
    (seconds,) = run_ranks(costs, 1, root)
    assert seconds["checks"] < 0.5 * seconds["step"] + 0.05, seconds


def costs(place: Place, root: Path) -> dict[str, float]:
    spent = {"checks": 0.0}
    for name in ("__init__", "taken"):
        whole = getattr(FirstSteps, name)

        def timed(self: FirstSteps, *args: Any, whole: Any = whole) -> None:
            began = time.perf_counter()
            whole(self, *args)
            spent["checks"] += time.perf_counter() - began

        setattr(FirstSteps, name, timed)
    train(place, "costs", flags_of(root, "costs", **LORA))
    steps = [line["step_time"] for line in lines(root / "costs") if "step_time" in line]
    return spent | {"step": min(steps)}
