"""Logits and every gradient against transformers' LlamaForCausalLM, in fp32, for each kind of Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from packtrain.model.linear import layout

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "llama-1": {"num_key_value_heads": 4},
    "llama-2-70b": {"num_attention_heads": 6, "num_key_value_heads": 1, "pretraining_tp": 1},
    "llama-3": {"rope_theta": 500000.0, "pad_token_id": 3},
    "llama-3.1": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 16}},
    "llama-3.2": {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    "smollm2": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True, "pad_token_id": 2},
    "tinyllama": {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 4},
    "negative pad": {"pad_token_id": -1},
}


def compare(tools: Any, values: dict[str, Any], attention: str, length: int, tolerance: float = 1e-5) -> None:
    """Assert that loss, logits (1e-5) and gradients of one document agree, relative to the tensor's largest value."""
    their_model = tools.theirs(values, attention)
    our_model = tools.twin(their_model)
    ids = tools.some_ids(length)
    logits = their_model(torch.tensor([ids])).logits
    loss = F.cross_entropy(logits[0, :-1].double(), torch.tensor(ids[1:]), reduction="sum")
    loss.backward()

    batch = tools.batch_of([[ids]])
    assert tools.distance(our_model(batch, logits=True), logits) < 1e-5
    our_loss = our_model(batch)
    assert our_loss.dtype == torch.float32
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    our_loss.backward()
    expected = {name: p.grad for name, p in their_model.named_parameters()}
    found = tools.gradients(our_model)
    pieces = [(name, piece) for name, table in layout(our_model).items() for piece in table]
    assert {piece.name for _, piece in pieces} == set(expected)
    for name, piece in pieces:
        assert tools.distance(found[name][piece.start : piece.stop], expected[piece.name]) < tolerance, piece.name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(tools: Any, kind: str, attention: str) -> None:
    compare(tools, KINDS[kind], attention, length=29)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape(tools: Any, data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    values = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": (heads := kv_heads * data.draw(st.integers(1, 3))),
        "hidden_size": heads * data.draw(st.integers(8, 16)),
        "head_dim": 2 * data.draw(st.integers(2, 12)),
        "intermediate_size": data.draw(st.integers(8, 70)),
        "num_hidden_layers": data.draw(st.integers(1, 3)),
        "tie_word_embeddings": data.draw(st.booleans()),
        "attention_bias": data.draw(st.booleans()),
        "mlp_bias": data.draw(st.booleans()),
        "rope_scaling": data.draw(st.sampled_from([kind.get("rope_scaling") for kind in KINDS.values()])),
    }
    # Among shapes this small are some whose gradients cancel to thousandths of their terms, in fp32 on both sides.
    compare(tools, values, "sdpa", length=data.draw(st.integers(8, 40)), tolerance=1e-4)


def test_the_comparison_can_fail(tools: Any) -> None:
    model = tools.theirs()
    copy = tools.twin(model)
    with torch.no_grad():
        copy.model.layers[1].self_attn.qkv_proj.weight[0] *= 1.001
    ids = tools.some_ids(20)
    logits = copy(tools.batch_of([[ids]]), logits=True)
    assert tools.distance(logits, model(torch.tensor([ids])).logits) > 1e-5


def test_bf16_rounds_where_transformers_does(tools: Any) -> None:
    model = tools.theirs(KINDS["llama-3.1"], "sdpa")
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies  # from_pretrained leaves these in fp32
    ids = tools.some_ids(24)
    logits = tools.twin(model, torch.bfloat16)(tools.batch_of([[ids]]), logits=True)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, model(torch.tensor([ids])).logits)
