"""Rotation and frequencies against transformers' own."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from packtrain.kernels.elementwise import turn
from packtrain.model.config import LlamaConfig
from packtrain.model.rope import cos_sin

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPE = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 128,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4096,
}
SCALINGS: dict[str, Any] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 512},
}


def tables(values: dict[str, Any], lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig.from_dict({**SHAPE, **values})
    positions = torch.cat([torch.arange(length) for length in lengths])
    batch: Any = SimpleNamespace(positions=positions, lengths=lengths)
    return cos_sin(config.rope_parameters, 128, config.max_position_embeddings, batch, torch.float32)


@pytest.mark.parametrize("length", [3000, 6000])
@pytest.mark.parametrize("kind", SCALINGS)
def test_turns_as_transformers_does(kind: str, length: int) -> None:
    values = {"rope_theta": 500000.0, "rope_scaling": SCALINGS[kind]}
    cos, sin = tables(values, (length,))
    x = torch.randn(length, 1, 128)
    theirs = LlamaRotaryEmbedding(TheirConfig.from_dict(deepcopy({**SHAPE, **values})))
    expected, _ = apply_rotary_pos_emb(x, x, *theirs(x, torch.arange(length)[None]), unsqueeze_dim=2)
    # llama3: one rounding of a frequency, times 6000.
    torch.testing.assert_close(turn(x, cos, sin), expected[0], rtol=0, atol=1e-4 if kind == "llama3" else 1e-6)


def test_dynamic_is_by_document() -> None:
    values = {"rope_scaling": SCALINGS["dynamic"]}
    together = tables(values, (5000, 10, 6000))
    alone = [tables(values, (length,)) for length in (5000, 10, 6000)]
    for i, table in enumerate(together):
        assert torch.equal(table, torch.cat([one[i] for one in alone]))
    short, plain = tables(values, (10,))[0], tables({}, (10,))[0]
    assert torch.equal(short, plain)
    assert (plain - alone[2][0][:10]).abs().max() > 0.1


def test_rotation_keeps_lengths_and_differences() -> None:
    cos, sin = tables({}, (40,))
    q, k = torch.randn(2, 1, 1, 128).expand(2, 40, 1, 128)
    turned_q, turned_k = turn(q, cos, sin)[:, 0], turn(k, cos, sin)[:, 0]
    torch.testing.assert_close(turned_q.norm(dim=1), q[:, 0].norm(dim=1))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=1e-4, atol=1e-4)
