"""The numbers that must hold, against transformers and peft in one process, fp32.

    one step        loss, gradient norm and every gradient: on any number of ranks, in any split into micro-batches,
                    padded or packed, sharded in any way, recomputed or not
    whole runs      the curve, the learning rate, clipping, dropout's masks and the validation loss, from metrics.jsonl

Everything goes the way of a run: preflight's inputs, building's loaders, model and optimizer, train's step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from runs import apart, column, lines, mean, rows, train
from torch import Tensor, nn
from transformers import LlamaForCausalLM as TheirLlama

import tiny
from packtrain import building, log, preflight
from packtrain.building import Inputs
from packtrain.configs.parse import build
from packtrain.distributed.parallelize import local_rows
from packtrain.distributed.place import Place
from packtrain.model.linear import layout
from packtrain.peft.lora import adapter_tensors
from packtrain.peft.trainable import trainable
from packtrain.train.evaluate import evaluate
from packtrain.train.step import step_vector, train_step

BOUND = 1e-5
PATIENCE = 240.0
pytestmark = pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")
ALONE = cast(Place, SimpleNamespace(rank=0, world_size=1))
ROWS = 7
SIZES = {
    "vocab_size": 391,
    "hidden_size": 32,
    "intermediate_size": 44,
    "attention_bias": True,
    "mlp_bias": True,
    "initializer_range": 0.3,
}
"""Rows of the tables and of the MLP do not divide by 2 or 4 ranks."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, tied": {"tied": True},
    "lora": {"tied": True, "lora": {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "bias": "all"}},
    "lora beside whole layers": {
        "lora": {
            "target_modules": ["q_proj", "gate_proj", "lm_head"],
            "modules_to_save": ["v_proj", "embed_tokens", "model.norm"],
            "bias": "lora_only",
        }
    },
}
SPLITS = {
    1: [(7, 1), (1, 7), (2, 4), (3, 3)],
    2: [(4, 1), (1, 4), (2, 2), (7, 1)],
    4: [(2, 1), (1, 2), (3, 1), (5, 2)],
}
"""Ranks -> (micro-batch, accumulation) that take all rows in one step, most of them leaving some ranks without rows."""

STRATEGIES: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"sharding_strategy": name} for name in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")],
    4: [
        {"sharding_strategy": "FULL_SHARD"},
        {"sharding_strategy": "SHARD_GRAD_OP"},
        {"sharding_strategy": "NO_SHARD"},
        {"hsdp": True, "sharding_group_size": 2},
    ],
}


@dataclass(frozen=True)
class Truth:
    """What transformers says of all rows at once: mean loss, norm, gradient of each trained tensor by its name."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def uneven(count: int, longest: int) -> list[tuple[str, str]]:
    """Sentences of 1 to `longest` words."""
    words = ["he", "go", "home", "and", "she", "see", "a", "dog", "near", "the", "old", "house", "at", "night"]
    texts = [" ".join(words[(i * 3) % 5 :][: 1 + (i * 5) % longest]) for i in range(count)]
    return [(text, f"{text}{'.' * (1 + i % 3)}") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def place_of_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases, an adapter that has moved for each method that has one, and rows."""
    root = tmp_path_factory.mktemp("numbers")
    for tied in (False, True):
        tiny.model(root / f"base-{tied}", tie_word_embeddings=tied, **SIZES)
    for name, method in METHODS.items():
        if "lora" in method:
            base = root / f"base-{method.get('tied', False)}"
            tiny.adapter(root / name, base, lora_dropout=0.0, **method["lora"])
    tiny.grammar(root / "train.csv", uneven(ROWS, 12))
    tiny.grammar(root / "validation.csv", uneven(5, 8)[::-1])
    return root


def flags_of(root: Path, method: str, **flags: Any) -> dict[str, Any]:
    """A method's flags over the folder above: an adapter starts from the saved one, so that no gradient is zero."""
    base = root / f"base-{METHODS[method].get('tied', False)}"
    given: dict[str, Any] = {
        "model_name": str(base),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": str(root / "train.csv"), "test_split": str(root / "validation.csv")},
        "batching_strategy": "padding",
        "context_length": 128,
        "output_dir": str(root / "out"),
    }
    if "lora" in METHODS[method]:
        given |= {"use_peft": True, "from_peft_checkpoint": str(root / method)}
    return given | flags


def their_model(root: Path, method: str) -> nn.Module:
    base: nn.Module = TheirLlama.from_pretrained(root / f"base-{METHODS[method].get('tied', False)}")
    if "lora" in METHODS[method]:
        base = PeftModel.from_pretrained(base, str(root / method), is_trainable=True)
    return base.train()


def plain(name: str) -> str:
    """peft's name in memory -> in its file."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def truth(root: Path, method: str) -> Truth:
    model = their_model(root, method)
    loss = mean(model, list(rows(root / "train.csv")))
    loss.backward()
    gradients = {plain(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm()
    return Truth(loss.item(), float(norm), gradients)


def whole_gradients(model: nn.Module, truth: Truth) -> dict[str, Tensor]:
    """The truth by our names, NaN where it says nothing."""
    places = [(piece.name, ours, piece.start, piece.stop) for ours, pieces in layout(model).items() for piece in pieces]
    if any("lora_" in name for name in truth.gradients):
        places = [(name, s.parameter, s.start, s.stop) for name, s in adapter_tensors(model).items()]
    whole = {name: torch.full(p.shape, math.nan) for name, p in trainable(model).items()}
    for theirs, ours, start, stop in places:
        whole[ours][start:stop] = truth.gradients[theirs]
    return whole


def worst(model: nn.Module, gradients: Sequence[Tensor], truth: Truth) -> tuple[float, str]:
    """The largest difference of a gradient on this rank, relative to that gradient's largest entry, and its name."""
    errors = [(0.0, "")]
    whole = whole_gradients(model, truth)
    for (name, parameter), gradient in zip(trainable(model).items(), gradients, strict=True):
        first = local_rows(parameter)[1]
        expected = whole[name][first : first + gradient.shape[0]]
        if gradient.numel():
            error = float((gradient - expected).abs().max() / whole[name].abs().max())
            errors.append((math.inf if math.isnan(error) else error, name))
    return max(errors)


def first_steps(place: Place, root: Path, truths: dict[str, Truth], ways: list[Any]) -> dict[Any, Any]:
    """(method, strategy, recompute, split, batching) -> loss, norm, the worst gradient. Nothing is updated."""
    log.quiet()
    found = {}
    inputs = {method: preflight.inputs(build(**flags_of(root, method)), apart(place, method)) for method in METHODS}
    for method, number, recompute in ways:
        flags = flags_of(root, method) | STRATEGIES[place.world_size][number]
        flags |= {"activation_checkpointing": "full" if recompute else "none"}
        model = building.build(build(**flags), inputs[method], place)
        for batch, accumulation, batching in splits(place.world_size, number):
            split = {"batch_size_training": batch, "gradient_accumulation_steps": accumulation}
            cfg = build(**(flags | split | {"batching_strategy": batching}))
            key = (method, number, recompute, batch, accumulation, batching)
            found[key] = first_step(cfg, inputs[method], place, model, truths[method])
    return found


def first_step(cfg: Any, inputs: Inputs, place: Place, model: Any, truth: Truth) -> tuple[float, float, Any]:
    loader, _ = building.loaders(cfg, inputs, place)
    optimizer, _ = building.optimizer_of(cfg, model, loader.steps_per_epoch, 1)
    errors = []
    optimizer.step = lambda found_inf, **_: errors.append(worst(model, optimizer.gradients(), truth))  # type: ignore[method-assign]
    batches = loader.step(0)
    agreed = step_vector(batches, False, place.device)
    report = train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
    return float(report.loss), float(report.grad_norm), errors[0]


def ways(world: int) -> list[tuple[str, int, bool]]:
    """Every method in every strategy; recomputed or not in turn, for two of them both."""
    return [
        (method, number, recompute)
        for method in METHODS
        for number in range(len(STRATEGIES[world]))
        for recompute in (False, True)
        if method in ("full, tied", "lora") or recompute == bool(number % 2)
    ]


def splits(world: int, number: int) -> list[tuple[int, int, str]]:
    """Every split padded and packed in the first strategy; in the others each is one of the two in turn."""
    return [
        (*split, batching)
        for i, split in enumerate(SPLITS[world])
        for j, batching in enumerate(("padding", "packing"))
        if number == 0 or (i + j + number) % 2
    ]


@pytest.fixture(scope="module")
def truths(place_of_work: Path) -> dict[str, Truth]:
    return {method: truth(place_of_work, method) for method in METHODS}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_step_one_is_transformers_own(world: int, place_of_work: Path, truths: dict[str, Truth]) -> None:
    ranks = run_ranks(first_steps, world, place_of_work, truths, ways(world), timeout=PATIENCE)
    assert len(ranks[0]) == sum(len(splits(world, number)) for _, number, _ in ways(world))
    for found in ranks:
        for key, (loss, norm, error) in found.items():
            assert loss == pytest.approx(truths[key[0]].loss, rel=BOUND), key
            assert norm == pytest.approx(truths[key[0]].norm, rel=BOUND), key
            assert error[0] <= BOUND, (key, error)


def test_a_mean_of_means_is_no_such_loss(place_of_work: Path, truths: dict[str, Truth]) -> None:
    """What the bound must be able to see: rows that count alike, however many labels they have."""
    model, each = their_model(place_of_work, "full"), list(rows(place_of_work / "train.csv"))
    with torch.no_grad():
        means = torch.stack([mean(model, [row]) for row in each])
    assert abs(means.mean().item() / truths["full"].loss - 1) > 100 * BOUND


def test_one_wrong_gradient_is_noticed(place_of_work: Path, truths: dict[str, Truth]) -> None:
    wrong = {name: g * (1 + 2e-5 * (name == "model.norm.weight")) for name, g in truths["full"].gradients.items()}
    truth = replace(truths["full"], gradients=wrong)
    (found,) = run_ranks(first_steps, 1, place_of_work, {"full": truth}, [("full", 0, False)])
    assert all(error > BOUND and name == "model.norm.weight" for _, _, (error, name) in found.values())


STEPS = 3
RUNS: dict[str, dict[str, Any]] = {
    "full": {
        "method": "full",
        "lr_scheduler": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "gradient_clipping": True,
        "gradient_clipping_threshold": 0.5,
    },
    "gamma": {"method": "lora", "gamma": 0.5},
    "dropout": {"method": "lora", "lr_scheduler": "linear"},
    "dropout, all padded": {"method": "lora", "lr_scheduler": "constant"},
    "dropout, all packed": {"method": "lora", "lr_scheduler": "constant", "batching_strategy": "packing"},
}
"""Runs of STEPS steps of 4 rows, two steps an epoch; the last two take all rows, in one step an epoch."""


def run_flags(root: Path, name: str, world: int) -> dict[str, Any]:
    flags = dict(RUNS[name])
    method = flags.pop("method")
    whole = "all" in name
    flags |= {"lr": 0.01, "max_train_step": STEPS, "save_model": False, "eval_steps": 1, "seed": 7}
    flags |= {"batch_size_training": 8 // world if whole else max(1, 2 // world)}
    flags |= {"gradient_accumulation_steps": 1 if whole else 4 // world // flags["batch_size_training"]}
    flags |= {"val_batch_size": {1: 5, 2: 2, 4: 1}[world], "output_dir": str(root / f"out/{name}/{world}")}
    if "dropout" in name:
        flags |= {"from_peft_checkpoint": str(root / "lora with dropout")}
    return flags_of(root, method, **flags)


def whole_runs(place: Place, root: Path) -> None:
    for name in RUNS:
        train(place, name, run_flags(root, name, place.world_size))


@pytest.fixture(scope="module")
def curves(place_of_work: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Ranks -> run -> metrics."""
    tiny.adapter(place_of_work / "lora with dropout", place_of_work / "base-True", lora_dropout=0.1)
    for world in (1, 2, 4):
        run_ranks(whole_runs, world, place_of_work, timeout=PATIENCE)
    return {world: {name: lines(place_of_work / f"out/{name}/{world}") for name in RUNS} for world in (1, 2, 4)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_on_any_number_of_ranks(name: str, curves: Any) -> None:
    alone = curves[1][name]
    assert len(column(alone, "loss")) == len(column(alone, "eval_loss")) == STEPS
    for world in (2, 4):
        for key in ("loss", "grad_norm", "eval_loss", "lr", "tokens", "tokens_total", "epoch"):
            assert column(curves[world][name], key) == pytest.approx(column(alone, key), rel=BOUND), (world, key)


def test_masks_do_not_depend_on_packing_but_on_the_step(curves: Any) -> None:
    for world in (1, 2, 4):
        for key in ("loss", "grad_norm", "eval_loss"):
            packed, padded = (column(curves[world][f"dropout, all {how}"], key) for how in ("packed", "padded"))
            assert packed == pytest.approx(padded, rel=BOUND), (world, key)
    first = column(curves[1]["dropout"], "loss")[0], column(curves[1]["gamma"], "loss")[0]
    assert first[0] != pytest.approx(first[1], rel=1e-3)  # the mask is there at all


def test_a_run_is_a_loop_over_transformers(place_of_work: Path, curves: Any) -> None:
    """Loss, norm before clipping, updates after it, decay, learning rate and validation, step by step."""
    flags = run_flags(place_of_work, "full", 1)
    training, _ = building.loaders(build(**flags), preflight.examine(build(**flags)).inputs, ALONE)
    model, each = their_model(place_of_work, "full"), list(rows(place_of_work / "train.csv"))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)
    for step, lr in enumerate([0.01, 0.01, 0.005], 1):
        adamw.param_groups[0]["lr"] = lr
        chosen = [row for batch in training.step(step - 1) for row in batch.rows]
        assert len(chosen) == (3 if step == 2 else 4)  # the epoch's last step is short
        loss = mean(model, [each[row] for row in chosen])
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        adamw.step()
        with torch.no_grad():
            validation = mean(model, list(rows(place_of_work / "validation.csv")))
        expected = {"loss": loss.item(), "grad_norm": norm.item(), "eval_loss": validation.item(), "lr": lr}
        for key, value in expected.items():
            assert column(curves[1]["full"], key)[step - 1] == pytest.approx(value, rel=BOUND), (step, key)


def test_learning_rates_are_the_closed_forms(curves: Any) -> None:
    expected = {
        "full": [0.01, 0.01 * (1 + math.cos(0)) / 2, 0.01 * (1 + math.cos(math.pi / 2)) / 2],
        "gamma": [0.01, 0.01, 0.005],
        "dropout": [0.01, 0.01 * 2 / 3, 0.01 / 3],
        "dropout, all padded": [0.01, 0.01, 0.01],
    }
    for name, lr in expected.items():
        assert column(curves[1][name], "lr") == pytest.approx(lr, rel=1e-12)


def validation_losses(place: Place, root: Path) -> dict[tuple[str, int], float]:
    log.quiet()
    found = {}
    inputs = preflight.inputs(build(**flags_of(root, "lora")), place)
    model = building.build(build(**flags_of(root, "lora")), inputs, place)
    for batching in ("padding", "packing"):
        for size in (1, 2, 5):
            cfg = build(**flags_of(root, "lora") | {"val_batch_size": size, "batching_strategy": batching})
            validation = building.loaders(cfg, inputs, place)[1]
            assert validation is not None
            found[batching, size] = evaluate(model, validation, place).loss
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_eval_loss_is_transformers_token_mean(world: int, place_of_work: Path) -> None:
    model = their_model(place_of_work, "lora").eval()
    with torch.no_grad():
        expected = mean(model, list(rows(place_of_work / "validation.csv"))).item()
    for found in run_ranks(validation_losses, world, place_of_work):
        assert list(found.values()) == pytest.approx([expected] * 6, rel=BOUND)
