"""Which modules a LoRA means: every rule, and the sentence for every mistake."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from packtrain.errors import UserError
from packtrain.peft.lora import LoraSettings, install, problems
from packtrain.peft.targets import select, ties

L0, L1 = "model.layers.0.", "model.layers.1."
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), [L0 + "self_attn.q_proj", L1 + "self_attn.q_proj"]),
        (("self_attn.v_proj", "lm_head"), [L0 + "self_attn.v_proj", L1 + "self_attn.v_proj", "lm_head"]),
        ((L1 + "mlp.up_proj",), [L1 + "mlp.up_proj"]),
        (r".*\.1\..*\.(k|gate)_proj", [L1 + "self_attn.k_proj", L1 + "mlp.gate_proj"]),
        ("lm_head", ["lm_head"]),
        ("all-linear", [prefix + name for prefix in (L0, L1) for name in LINEARS]),
    ],
)
def test_targets(tiny: Any, targets: Any, expected: list[str]) -> None:
    selection, wrong = select(tiny(device="meta"), LoraSettings(target_modules=targets))
    assert (list(selection.adapted), wrong) == (expected, [])


def test_a_name_is_no_substring(tiny: Any) -> None:
    """proj is the end of every name, and the whole of none."""
    assert "'proj' matches no linear layer" in problems(tiny(device="meta"), LoraSettings(target_modules=("proj",)))[0]


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (("embed_tokens",), ["model.embed_tokens"]),
        (("lm_head", "model.norm"), ["model.norm", "lm_head"]),
        (("0.mlp",), [L0 + "mlp.gate_proj", L0 + "mlp.up_proj", L0 + "mlp.down_proj"]),
        (
            ("norm",),
            [p + n for p in (L0, L1) for n in ("input_layernorm", "post_attention_layernorm")] + ["model.norm"],
        ),
    ],
)
def test_modules_to_save(tiny: Any, saved: tuple[str, ...], expected: list[str]) -> None:
    selection, wrong = select(tiny(device="meta"), LoraSettings(modules_to_save=saved))
    assert (sorted(selection.saved), wrong) == (sorted(expected), [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"target_modules": ("q_proj", "q_porj")},
            ["'q_porj' matches no linear", "nearest: q_proj", "down_proj, lm_head"],
        ),
        ({"target_modules": ("norm",)}, ["'norm' matches no linear layer"]),
        ({"target_modules": ("embed_tokens",)}, ["'embed_tokens' matches no linear layer"]),
        ({"target_modules": "q_proj"}, ["matches no whole name", "[q_proj]"]),
        ({"target_modules": ".*(q"}, ["no regular expression"]),
        ({"target_modules": r".*\.mlp\..*"}, ["also matches model.layers.0.mlp.act_fn"]),
        ({"target_modules": r".*self_attn.*"}, ["also matches model.layers.0.self_attn, model.layers.1.self_attn"]),
        ({"target_modules": r"model\..*"}, ["also matches model.embed_tokens", "and 6 more"]),
        ({"target_modules": ()}, ["target_modules: empty"]),
        ({"modules_to_save": ("lm_haed",)}, ["modules_to_save: 'lm_haed' matches no module", "nearest: lm_head"]),
        ({"modules_to_save": ("",)}, ["modules_to_save: '' matches no module"]),
        ({"modules_to_save": ("v_proj",)}, ["both name v_proj"]),
        ({"r": 0}, ["r: 0; expected a rank of at least 1"]),
        ({"lora_alpha": 0}, ["lora_alpha: 0"]),
        ({"lora_dropout": 1.0}, ["lora_dropout: 1.0; expected a probability in [0, 1)"]),
        ({"bias": "some"}, ["bias: 'some'; expected none, all, lora_only"]),
    ],
)
def test_mistakes(tiny: Any, settings: dict[str, Any], words: list[str]) -> None:
    model = tiny(device="meta")
    (problem,) = problems(model, LoraSettings(**settings))
    assert all(word in problem for word in words), problem
    with pytest.raises(UserError):
        install(model, LoraSettings(**settings))


def test_every_mistake_at_once(tiny: Any) -> None:
    settings = LoraSettings(r=0, target_modules=("a_proj", "b_proj"), modules_to_save=("zzz",), lora_dropout=-1)
    assert len(problems(tiny(device="meta"), settings)) == 5


@pytest.mark.parametrize(("named", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_half_of_a_tied_weight(tiny: Any, named: str, other: str) -> None:
    settings = LoraSettings(modules_to_save=(named,))
    (problem,) = problems(tiny(device="meta", tie_word_embeddings=True), settings)
    assert f"shares its weight with {other}" in problem
    assert "embed_tokens,lm_head" in problem
    assert problems(tiny(device="meta"), settings) == []


def test_ties(tiny: Any) -> None:
    assert ties(tiny(device="meta", tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert ties(tiny(device="meta")) == {}
    shared: nn.Module = tiny(device="meta")
    shared.lm_head.weight = shared.model.embed_tokens.weight
    assert ties(shared) == {"lm_head.weight": "model.embed_tokens.weight"}
