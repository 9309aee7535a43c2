"""What learns, and how it is counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from packtrain.peft.lora import LoraSettings, install
from packtrain.peft.trainable import count_line, freeze, frozen, trainable


def test_names_in_the_models_order_tied_once(tiny: Any) -> None:
    model = tiny(tie_word_embeddings=True)
    assert list(trainable(model)) == [name for name, _ in model.named_parameters()]
    freeze(model)
    assert trainable(model) == {}
    model.model.norm.weight.requires_grad_(True)
    assert list(trainable(model)) == ["model.norm.weight"]
    assert "model.norm.weight" not in frozen(model)
    assert len(frozen(model)) + 1 == len(list(model.parameters()))


def test_count_line_of_smollm2(tiny: Any) -> None:
    """SmolLM2-135M with r 8 on every linear layer: 134.5 M and 2.4 M of adapters, counted by hand."""
    model = tiny(
        device="meta",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    install(model, LoraSettings(r=8, target_modules="all-linear"))
    attention = [(576, 576), (576, 192), (576, 192), (576, 576)]
    mlp = [(576, 1536), (576, 1536), (1536, 576)]
    a_layer = sum(8 * (inputs + outputs) for inputs, outputs in attention + mlp)
    by_hand = 30 * a_layer
    text = count_line(model)
    assert text == f"trainable {by_hand:,} of 137.0 M ({100 * by_hand / (134_515_008 + by_hand):.2f} %)"


def test_count_line_of_small_and_large() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert count_line(layer) == "trainable 6 of 8 (75.00 %)"
    assert "of 1.60 B (100.00 %)" in count_line(nn.Linear(40_000, 40_000, bias=False, device=torch.device("meta")))
    assert count_line(nn.Identity()) == "trainable 0 of 0 (0.00 %)"
