"""Biases beside a LoRA: which train, and how, against peft; the sentences where there are none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from packtrain.checkpoint.adapter import load_adapter, save_adapter
from packtrain.optim import Optimizer
from packtrain.peft.lora import LoraSettings, adapter_tensors, config_dict, install, problems
from packtrain.peft.trainable import trainable

BIASED = {"attention_bias": True, "mlp_bias": True}
TARGETS = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Pair:
    """A model of ours and peft's, with the same base and adapter, and the loss of the same documents in each."""

    ours: Any
    theirs: Any
    documents: list[list[int]]
    batch: Any
    twins: Any


@pytest.fixture(params=["all", "lora_only"])
def pair(request: pytest.FixtureRequest, twins: Any, tools: Any, tmp_path: Path) -> Pair:
    """peft's adapter, trained biases and all, saved by it and loaded by us over the same base."""
    made = twins(**BIASED)
    install(made.ours, LoraSettings(r=3, lora_alpha=3, target_modules=TARGETS, lora_dropout=0.0, bias=request.param))
    config = LoraConfig(r=3, lora_alpha=3, target_modules=list(TARGETS), bias=request.param)
    theirs = get_peft_model(made.theirs, config)
    disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "peft")
    load_adapter(made.ours, tmp_path / "peft")
    documents = made.documents(7, 5, 9)
    return Pair(made.ours, theirs, documents, tools.rows_of(documents, packed=True), made)


@torch.no_grad()
def disturb(parameters: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def theirs_by_name(model: Any) -> dict[str, Any]:
    """peft's parameters that learn, under the names of its file."""
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}


def test_the_same_biases_learn_with_the_same_gradients(pair: Pair) -> None:
    pair.ours.train()
    loss = pair.ours(pair.batch)
    expected = pair.twins.their_loss(pair.theirs, pair.documents)
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    expected.backward()
    theirs, ours = theirs_by_name(pair.theirs), dict(pair.ours.named_parameters())
    table = adapter_tensors(pair.ours)
    assert set(table) == set(theirs)
    assert {saved.parameter for saved in table.values()} == set(trainable(pair.ours))
    for name, saved in table.items():
        gradient = ours[saved.parameter].grad
        assert gradient is not None
        error = (gradient[saved.start : saved.stop] - theirs[name].grad).abs().max() / theirs[name].grad.abs().max()
        assert error < 1e-5, name


def test_peft_reads_them_with_equal_logits(pair: Pair, tools: Any, tmp_path: Path) -> None:
    disturb(trainable(pair.ours).values())
    bias = "all" if any("k_proj.bias" in name for name in adapter_tensors(pair.ours)) else "lora_only"
    settings = LoraSettings(r=3, lora_alpha=3, target_modules=TARGETS, lora_dropout=0.0, bias=bias)
    save_adapter(pair.ours, tmp_path / "ours", config_dict(settings, "base"))
    base = pair.theirs.unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    document = pair.documents[0]
    ours = pair.ours.eval()(tools.rows_of([document], packed=False), logits=True)[0]
    assert torch.allclose(ours, pair.twins.their_logits(loaded, document), rtol=1e-4, atol=1e-5)


def test_what_does_not_learn_does_not_decay_either(tiny: Any, tools: Any) -> None:
    """k's bias is in one parameter with q's and v's; under lora_only it stays, whatever the weight decay."""
    model = tiny(**BIASED)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.5)
    install(model, LoraSettings(r=2, target_modules=("q_proj", "v_proj"), lora_dropout=0.0, bias="lora_only"))
    layer = model.model.layers[0].self_attn.qkv_proj
    optimizer = Optimizer(trainable(model), lr=0.1, weight_decay=0.5)
    batch = tools.rows_of([[1, 2, 3, 4, 5, 6]], packed=True)
    for _ in range(2):
        model(batch).backward()
        optimizer.step(torch.zeros(()))
        optimizer.zero_grad()
    used: Tensor = layer._bias(torch.float32)
    moved = {part.name: bool((used[part.start : part.stop] != 0.5).any()) for part in layer.parts}
    assert moved == {"q_proj": True, "k_proj": False, "v_proj": True}


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({}, {"bias": "all"}, "bias: all, and this model has none"),
        ({}, {"bias": "lora_only"}, "bias: lora_only, and this model has none"),
        ({"attention_bias": True}, {"bias": "lora_only", "target_modules": ("up_proj",)}, "no layer of target_modules"),
        (BIASED, {"bias": "all", "modules_to_save": ("k_proj",)}, "give lora_only, or take the layer out"),
    ],
)
def test_there_is_a_sentence(tiny: Any, config: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    (found,) = problems(tiny(device="meta", **config), LoraSettings(**settings))
    assert words in found
    assert problems(tiny(device="meta", **config), LoraSettings(**(settings | {"bias": "none"}))) == []
