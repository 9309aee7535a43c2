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
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks
from packtrain.model.shared import linears


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
        held, coming = recompute.Held.of(cfg, model, place, None), recompute._coming(cfg, model, place)
    beside = held.weights + held.training - coming
    needed = {c: recompute._needed(model, tokens, c, None, False, coming=coming) for c in recompute.CHOICES}
    return {choice: (beside + size) / recompute.SHARE for choice, size in needed.items()}


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
        anyprecision = flags | {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision"}
        for changes, each in (
            ({}, 2 + 2 + 4),  # gradients as they come, remainders, moments
            ({"moments": "8bit"}, 2 + 2 + 2),
            ({"moments": "8bit", "use_kahan": False}, 2 + 2),
            ({"moments": "8bit", "gradient_accumulation_steps": 2}, 2 + 4 + 2 + 2),
        ):
            cfg = build(**anyprecision, **changes)
            assert recompute.Held.of(cfg, bf16, place, None) == recompute.Held(2 * count, each * count)


def test_layers_gradients_take_the_place_of_what_the_forward_kept(
    flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8B in 8 bytes a weight on a card of 80 GB: 60 GiB with gradients, of which 13 come while 17 or 6 GiB go."""
    monkeypatch.setattr(recompute, "free_bytes", lambda place: 78 * recompute.GIB)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = LlamaConfig.from_dict(shape | {"architectures": ["LlamaForCausalLM"]})
    model = LlamaForCausalLM(config, dtype=torch.bfloat16, device=torch.device("meta"))
    little = flags | {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit"}
    form = Form(torch.bfloat16, float8=False)
    with open_place("cpu") as place:
        held = recompute.Held.of(build(**little), model, place, form)
        assert 59.5 < (held.weights + held.training) / recompute.GIB < 60.5
        chosen = [
            recompute.choose(build(**little, **more), model, place, tokens=tokens, form=form)[0]
            for tokens, more in ((4096, {}), (8192, {}), (4096, {"gradient_accumulation_steps": 2}))
        ]
    assert chosen == ["none", "selective", "full"]


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
