"""--activation_checkpointing auto: by an estimate and by what is free, and the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import lines, train

import tiny
from packtrain import building, log, preflight, recompute
from packtrain.configs.parse import build
from packtrain.distributed.place import Place, open_place
from packtrain.kernels.rows import Form
from packtrain.model.fast_layer import linears
from packtrain.model.llama import LlamaForCausalLM, blocks


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recompute")
    return {
        "model_name": str(tiny.model(folder / "base", num_hidden_layers=6)),
        "dataset": "grammar_dataset",
        "grammar_dataset": dict.fromkeys(("train_split", "test_split"), str(tiny.grammar(folder / "rows.csv"))),
        "batching_strategy": "padding",
        "batch_size_training": 4,
        "output_dir": str(folder / "out"),
        "max_train_step": 1,
        "run_validation": False,
    }


def of(model: LlamaForCausalLM) -> str:
    """How its layers are recomputed."""
    (found,) = {(block.recompute, block.keeps_attention) for block in blocks(model)}
    return {(False, False): "none", (True, True): "selective", (True, False): "full"}[found]


def needs(flags: dict[str, Any]) -> dict[str, float]:
    """Bytes that a rank must have free for each choice, by the rule itself."""
    cfg = build(**flags)
    with open_place("cpu") as place:
        inputs = preflight.inputs(cfg, place)
        tokens = building.micro_batch_tokens(cfg, inputs)
        model = LlamaForCausalLM(inputs.model_config, dtype=torch.float32, device=torch.device("meta"))
        held = recompute.Held.of(cfg, model, place, None)
    return {
        choice: (held.weights + held.training + recompute._needed(model, tokens, choice, None, False)) / recompute.SHARE
        for choice in recompute.CHOICES
    }


def test_float8_weights_turned_over_are_kept_by_one_process_only(flags: dict[str, Any]) -> None:
    with open_place("cpu") as place:
        inputs = preflight.inputs(build(**flags), place)
    model = LlamaForCausalLM(inputs.model_config, dtype=torch.float32, device=torch.device("meta"))
    layers = [sum(linear.weight.numel() for linear in linears(layer)) for layer in blocks(model)]
    form = Form(torch.float32, float8=True)
    alone, sharded = (recompute._needed(model, 100, "none", form, False, alone) for alone in (True, False))
    assert alone - sharded == sum(layers) - 2 * max(layers)


def test_what_is_held_is_counted(flags: dict[str, Any]) -> None:
    """fp32 weights, and for each a gradient, two moments."""
    with open_place("cpu") as place:
        cfg = build(**flags)
        inputs = preflight.inputs(cfg, place)
        model = LlamaForCausalLM(inputs.model_config, dtype=torch.float32, device=torch.device("meta"))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert recompute.Held.of(cfg, model, place, None) == recompute.Held(4 * count, 12 * count)
        bf16 = LlamaForCausalLM(inputs.model_config, dtype=torch.bfloat16, device=torch.device("meta"))
        assert recompute.Held.of(cfg, bf16, place, None) == recompute.Held(2 * count, 18 * count)


@pytest.mark.parametrize("chosen", ["none", "selective", "full", "too little"])
def test_the_least_that_fits(
    chosen: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    just = needs(flags)
    free = {"too little": 0.5 * just["full"]} | {choice: size + 64 for choice, size in just.items()}
    assert just["none"] > just["selective"] > just["full"]
    monkeypatch.setattr(recompute, "free_bytes", lambda place: free[chosen])
    log.quiet(False)
    with open_place("cpu") as place:
        cfg = build(**flags)
        model = building.build(cfg, preflight.inputs(cfg, place), place)
    expected = "full" if chosen == "too little" else chosen
    assert of(model) == expected
    said = capsys.readouterr().err
    assert f"activation checkpointing: {expected}: a micro-batch of " in said
    assert (" GiB if all were kept) of " in said) == (chosen != "none")
    assert ("may not fit: a smaller --batch_size_training" in said) == (chosen == "too little")


def uneven(place: Place, flags: dict[str, Any], free: list[float]) -> str:
    recompute.free_bytes = lambda place: free[place.rank]
    log.quiet()
    cfg = build(**flags)
    return of(building.build(cfg, preflight.inputs(cfg, place), place))


def test_ranks_choose_alike(flags: dict[str, Any]) -> None:
    """One has all the memory it wants and the other little: whole layers on both."""
    assert run_ranks(uneven, 2, flags, [1e15, 1.0]) == ["full", "full"]
    assert run_ranks(uneven, 2, flags, [1e15, 1e15]) == ["none", "none"]


def three_ways(place: Place, flags: dict[str, Any], folder: Path) -> None:
    for how in recompute.CHOICES:
        train(place, how, flags | {"activation_checkpointing": how, "output_dir": str(folder / how)})


def test_a_step_is_the_same_in_all_three(flags: dict[str, Any], tmp_path: Path) -> None:
    run_ranks(three_ways, 2, flags, tmp_path)
    found = [lines(tmp_path / how)[0] for how in recompute.CHOICES]
    assert len({(line["loss"], line["grad_norm"]) for line in found}) == 1
