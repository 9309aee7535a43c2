"""Batches from plain documents, and transformers' model beside ours with the same weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as TheirModel

from packtrain.batch import Batch
from packtrain.kernels.random import dropout, token_keys
from packtrain.model.linear import layout
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def batch_of(
    rows: Sequence[Sequence[Sequence[int]]],
    *,
    length: int | None = None,
    whole_rows: bool = False,
    numbers: Sequence[int] | None = None,
    masked: int = 0,
    step: int = 0,
) -> Batch:
    """Rows of documents of token ids, padded to `length`; a document's first `masked` tokens are no labels."""
    length = length or max(sum(map(len, row)) for row in rows)
    number = iter(numbers or itertools.count())
    tiles: list[tuple[list[int], int, bool]] = []
    for row in rows:
        tiles += [(list(document), next(number), True) for document in row]
        if padding := length - sum(map(len, row)):
            tiles.append(([0] * padding, 2**40, False))
    edges = [0, *itertools.accumulate(len(ids) for ids, _, _ in tiles)]
    index = [
        place
        for start, (ids, _, labelled) in zip(edges, tiles, strict=False)
        for place in range(start + max(masked - 1, 0), start + len(ids) - 1)
        if labelled
    ]
    flat = torch.tensor([token for ids, _, _ in tiles for token in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids, _, _ in tiles])
    row_numbers = torch.cat([torch.full((len(ids),), row) for ids, row, _ in tiles])
    places = torch.tensor(index, dtype=torch.int64)
    return Batch(
        ids=flat.view(-1, length),
        positions=positions.view(-1, length),
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        lengths=tuple(len(ids) for ids, _, _ in tiles),
        max_seqlen=max(len(ids) for ids, _, _ in tiles),
        whole_rows=whole_rows,
        index=places,
        targets=flat[places + 1],
        keys=token_keys(7, step, row_numbers, positions).view(-1, length),
        tokens=sum(len(ids) for ids, _, labelled in tiles if labelled),
        rows=tuple(range(len(rows))),
    )


def some_ids(length: int, seed: int = 0, vocabulary: int = 97) -> list[int]:
    return torch.randint(1, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(values: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """Our model of the small shape, changed by `values`, drawn."""
    model = LlamaForCausalLM(LlamaConfig.from_dict({**SMALL, **(values or {})}), dtype=dtype, device=CPU)
    draw(model, seed)
    return model


def theirs(values: dict[str, Any] | None = None, attention: str = "eager") -> TheirModel:
    """transformers' model of the small shape, every parameter random (norms and biases too)."""
    config = TheirConfig.from_dict(deepcopy({**SMALL, **(values or {})}))  # which writes into what it is given
    config._attn_implementation = attention
    model = TheirModel(config).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            shift = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(shift + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def twin(model: TheirModel, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Our model with the weights of theirs, moved by the layout's table alone."""
    copy = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()), dtype=dtype, device=CPU)
    weights = model.state_dict()
    with torch.no_grad():
        for name, pieces in layout(copy).items():
            for piece in pieces:
                copy.get_parameter(name)[piece.start : piece.stop] = weights[piece.name]
    return copy


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over b's largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12)).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


class FakeLora(nn.Module):
    """The least that fills an adapter slot: y + s (dropout(x) A^T) B^T."""

    def __init__(self, name: str, columns: int, rows: int, p: float, rank: int = 3) -> None:
        super().__init__()
        self.name, self.p = name, p
        generator = torch.Generator().manual_seed(columns * 1000 + rows)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, columns, generator=generator))
        self.lora_B = nn.Parameter(0.3 * torch.randn(rows, rank, generator=generator))

    def columns(self, x: Tensor, keys: Tensor) -> Tensor:
        kept = dropout(x, keys, self.name, self.p) if self.training else x
        return 0.5 * (kept @ self.lora_A.to(x.dtype).t())

    def forward(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        return y + self.columns(x, keys) @ self.lora_B.to(x.dtype).t()


@dataclass(frozen=True)
class Tools:
    """What the tests of this room share."""

    batch_of = staticmethod(batch_of)
    some_ids = staticmethod(some_ids)
    ours = staticmethod(ours)
    theirs = staticmethod(theirs)
    twin = staticmethod(twin)
    distance = staticmethod(distance)
    gradients = staticmethod(gradients)
    fake_lora = FakeLora


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()
