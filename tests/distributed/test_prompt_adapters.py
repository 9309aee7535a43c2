"""LLaMA-Adapter and prefix tuning under FSDP2, against peft in one process, fp32.

one step        loss, norm and each gradient: any number of ranks and strategy, padded or packed, recomputed or not
whole runs      from llama-recipes' defaults: the same curve and file on any number of ranks, which peft loads
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, PrefixTuningConfig, get_peft_model
from ranks import run_ranks
from runs import apart, column, lines, mean, rows, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM as TheirLlama

import tiny
from packtrain import building, log, peft, preflight
from packtrain.configs.parse import build
from packtrain.distributed.parallelize import local_rows
from packtrain.distributed.place import Place
from packtrain.peft.tensors import PREFIX, generator
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

BOUND = 1e-5
PATIENCE = 240.0
ROWS = 7
LAYERS = 3
METHODS = {
    "llama_adapter": AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
"""Five rows, or one, on up to four ranks: some hold nothing."""

STRATEGIES: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{}, {"sharding_strategy": "SHARD_GRAD_OP"}, {"sharding_strategy": "NO_SHARD"}],
    4: [{}, {"hsdp": True, "sharding_group_size": 2}],
}
SPLITS = {1: [(7, 1), (3, 3)], 2: [(4, 1), (2, 2)], 4: [(2, 1), (1, 2)]}
"""Ranks -> (micro-batch, accumulation) that take all rows in one step; on some ranks the last ones are empty."""


class Truth(NamedTuple):
    """What peft says of all rows at once: mean loss, gradient of each tensor by its name in the file."""

    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and rows of uneven lengths."""
    folder = tmp_path_factory.mktemp("prompts")
    tiny.model(folder / "base", num_hidden_layers=LAYERS, initializer_range=0.3)
    words = ["he", "go", "home", "and", "she", "see", "a", "dog"]
    texts = [" ".join(words[: 1 + 3 * i % 8]) for i in range(ROWS)]
    tiny.grammar(folder / "train.csv", [(text, f"{text}{'.' * (1 + i % 3)}") for i, text in enumerate(texts)])
    tiny.grammar(folder / "validation.csv", 3)
    return folder


@pytest.fixture(scope="module")
def truths(root: Path) -> dict[str, Truth]:
    """Of peft's adapters, gates open, each also saved in a folder of its method's name."""
    found = {}
    for method, config in METHODS.items():
        torch.manual_seed(1)
        model = get_peft_model(TheirLlama.from_pretrained(root / "base"), config)
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, parameter in learning.items():
            if "gate" in name:
                parameter.data.normal_()
        model.save_pretrained(root / method)
        loss = mean(model, list(rows(root / "train.csv")))
        loss.backward()
        found[method] = Truth(loss.item(), {in_file(name): cast(Tensor, p.grad) for name, p in learning.items()})
    return found


def in_file(name: str) -> str:
    """peft's name in memory -> in its file."""
    return "prompt_embeddings" if name.startswith("prompt_encoder") else name


def flags_of(root: Path, method: str, **flags: Any) -> dict[str, Any]:
    return {
        "model_name": str(root / "base"),
        "use_peft": True,
        "peft_method": method,
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": str(root / "train.csv"), "test_split": str(root / "validation.csv")},
        "batching_strategy": "padding",
        "context_length": 128,
        "output_dir": str(root / "out"),
    } | flags


def whole_gradients(model: nn.Module, truth: Truth) -> dict[str, Tensor]:
    """The truth by our names."""
    whole = {}
    for name, saved in peft.adapter_tensors(model).items():
        columns = truth.gradients[name].chunk(len(saved.parameters), dim=-1)
        whole |= dict(zip(saved.parameters, columns, strict=True))
    assert whole.keys() == trainable(model).keys()
    return whole


def worst(model: nn.Module, gradients: list[Tensor], truth: Truth) -> float:
    """The largest difference of a gradient on this rank, relative to that gradient's largest entry."""
    whole, errors = whole_gradients(model, truth), [0.0]
    for (name, parameter), gradient in zip(trainable(model).items(), gradients, strict=True):
        first = local_rows(parameter)[1]
        if gradient.numel():
            difference = gradient - whole[name][first : first + gradient.shape[0]]
            errors.append(float(difference.abs().max() / whole[name].abs().max()))
    return max(errors)


def first_steps(place: Place, root: Path, truths: dict[str, Truth]) -> dict[Any, tuple[float, float, float]]:
    """(method, strategy, recompute, split, batching) -> loss, norm, the worst gradient. Nothing is updated."""
    log.quiet()
    found = {}
    for method, truth in truths.items():
        flags = flags_of(root, method, from_peft_checkpoint=str(root / method))
        inputs = preflight.inputs(build(**flags), apart(place, method))
        for number, strategy in enumerate(STRATEGIES[place.world_size]):
            for recompute in ("none", "full") if number == 0 else ("full",):
                how = flags | strategy | {"activation_checkpointing": recompute}
                model = building.build(build(**how), inputs, place)
                for batch, accumulation in SPLITS[place.world_size]:
                    for batching in ("padding", "packing"):
                        split = {"batch_size_training": batch, "gradient_accumulation_steps": accumulation}
                        cfg = build(**(how | split | {"batching_strategy": batching}))
                        key = (method, number, recompute, batch, batching)
                        found[key] = first_step(cfg, inputs, place, model, truth)
    return found


def first_step(cfg: Any, inputs: Any, place: Place, model: Any, truth: Truth) -> tuple[float, float, float]:
    loader, _ = building.loaders(cfg, inputs, place)
    optimizer, _ = building.optimizer_of(cfg, model, loader.steps_per_epoch, 1)
    errors = []
    optimizer.step = lambda found_inf, **_: errors.append(worst(model, optimizer.gradients(), truth))  # type: ignore[method-assign]
    batches = loader.step(0)
    agreed = step_vector(batches, False, place.device)
    report = train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
    return float(report.loss), float(report.grad_norm), errors[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_step_one_is_pefts(world: int, root: Path, truths: dict[str, Truth]) -> None:
    norms = {
        method: float(torch.cat([gradient.double().flatten() for gradient in truth.gradients.values()]).norm())
        for method, truth in truths.items()
    }
    for found in run_ranks(first_steps, world, root, truths, timeout=PATIENCE):
        assert len(found) == 2 * (len(STRATEGIES[world]) + 1) * len(SPLITS[world]) * 2
        for key, (loss, norm, error) in found.items():
            assert loss == pytest.approx(truths[key[0]].loss, rel=BOUND), key
            assert norm == pytest.approx(norms[key[0]], rel=BOUND), key
            assert error <= BOUND, key


def test_a_wrong_gradient_is_noticed(root: Path, truths: dict[str, Truth]) -> None:
    loss, right = truths["llama_adapter"]
    gradients = {name: gradient * (1 + 2 * BOUND * ("gate" in name)) for name, gradient in right.items()}
    (found,) = run_ranks(first_steps, 1, root, {"llama_adapter": Truth(loss, gradients)})
    assert all(error > BOUND for _, _, error in found.values())


def run_flags(root: Path, method: str, world: int, **flags: Any) -> dict[str, Any]:
    sizes = {"batch_size_training": 4 // world, "val_batch_size": {1: 3, 2: 2, 4: 1}[world]}
    steps = {"lr": 0.01, "max_train_step": 3, "eval_steps": 3, "seed": 7, "output_dir": str(root / f"{method}-{world}")}
    return flags_of(root, method, **sizes, **steps, **flags)


def whole_runs(place: Place, root: Path) -> None:
    """With llama-recipes' defaults: ten prompt tokens in 30 layers, of which there are three; 30 virtual tokens."""
    for method in METHODS:
        train(place, method, run_flags(root, method, place.world_size))


def going_on(place: Place, root: Path) -> None:
    for method in METHODS:
        first = root / f"{method}-2"
        flags = run_flags(root, method, 2, from_peft_checkpoint=str(first), eval_first=True)
        train(place, method, flags | {"output_dir": str(root / f"{method}-on")})


@pytest.fixture(scope="module")
def runs(root: Path) -> Path:
    for world in (1, 2, 4):
        run_ranks(whole_runs, world, root, timeout=PATIENCE)
    return root


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def at_the_start(method: str) -> dict[str, Tensor]:
    """What seed and names alone give."""

    def drawn(name: str, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=generator(7, name))

    layers = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    if method == "prefix":
        return {"prompt_embeddings": torch.cat([drawn(f"{name}.past_key_values", 30, 64) for name in layers], dim=1)}
    prompts = {f"{PREFIX}{name}.adaption_prompt": drawn(f"{name}.adaption_prompt", 1, 10, 64) for name in layers}
    return prompts | {f"{PREFIX}{name}.adaption_gate": torch.zeros(1) for name in layers}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_on_any_number_of_ranks(method: str, runs: Path) -> None:
    alone = runs / f"{method}-1"
    for world in (2, 4):
        folder = runs / f"{method}-{world}"
        for key in ("loss", "grad_norm", "eval_loss"):
            expected = column(lines(alone), key)
            assert column(lines(folder), key) == pytest.approx(expected, rel=10 * BOUND), (world, key)
        for name, tensor in tensors(folder).items():
            assert (tensor - tensors(alone)[name]).abs().max() < 1e-4, (world, name)


@pytest.mark.parametrize("method", METHODS)
def test_everything_learned_and_peft_loads_it(method: str, runs: Path) -> None:
    folder = runs / f"{method}-4"
    found, start = tensors(folder), at_the_start(method)
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        moved = (tensor - start[name]).abs()
        assert moved.max() < 0.1, "three steps of 0.01"
        assert (moved > 1e-4).float().mean() > 0.9, name
    model = PeftModel.from_pretrained(TheirLlama.from_pretrained(runs / "base"), folder).eval()
    with torch.no_grad():
        expected = mean(model, list(rows(runs / "validation.csv"))).item()
    assert column(lines(folder), "eval_loss")[-1] == pytest.approx(expected, rel=BOUND)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(runs / "base")
    assert config.get("adapter_layers", LAYERS) == LAYERS


def test_a_run_goes_on_from_a_saved_adapter(runs: Path) -> None:
    run_ranks(going_on, 2, runs, timeout=PATIENCE)
    for method in METHODS:
        before = column(lines(runs / f"{method}-2"), "eval_loss")[-1]
        first, *_, last = column(lines(runs / f"{method}-on"), "eval_loss")
        assert first == pytest.approx(before, rel=BOUND)
        assert abs(last - first) > 1e-3
