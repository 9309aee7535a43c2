"""A tiny Llama of ours, with values; transformers' beside it; packed and padded rows."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as TheirLlama

from packtrain.batch import Batch
from packtrain.model.linear import layout
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw
from packtrain.optim import Optimizer
from packtrain.peft.trainable import trainable


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """Makes the model; keywords are the config's, and dtype and device."""

    def make(dtype: torch.dtype = torch.float32, device: str = "cpu", **config: Any) -> LlamaForCausalLM:
        sizes = {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        model = LlamaForCausalLM(LlamaConfig.from_dict(sizes | config), dtype=dtype, device=torch.device(device))
        if device != "meta":
            draw(model, seed=0)
        return model

    return make


def rows_of(documents: Sequence[Sequence[int]], packed: bool) -> Batch:
    """One row of all documents, or one each, padded to the longest; all their tokens but the first are trained."""
    length = sum(map(len, documents)) if packed else max(map(len, documents))
    tiles: list[list[int]] = []
    edges, index = [0], []
    for document in documents:
        index += range(edges[-1], edges[-1] + len(document) - 1)
        padding = 0 if packed else length - len(document)
        for tile in ([*document], [0] * padding):
            if tile:
                tiles.append(tile)
                edges.append(edges[-1] + len(tile))
    flat = torch.tensor([token for tile in tiles for token in tile])
    positions = torch.cat([torch.arange(len(tile)) for tile in tiles]).view(-1, length)
    places = torch.tensor(index)
    return Batch(
        ids=flat.view(-1, length),
        positions=positions,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        lengths=tuple(map(len, tiles)),
        max_seqlen=max(map(len, tiles)),
        whole_rows=not packed,
        index=places,
        targets=flat[places + 1],
        keys=torch.zeros_like(positions),
        tokens=sum(map(len, documents)),
        rows=tuple(range(1 if packed else len(documents))),
    )


@dataclass(frozen=True)
class Twins:
    """transformers' model, and ours with its weights."""

    theirs: Any
    ours: LlamaForCausalLM

    def documents(self, *lengths: int) -> list[list[int]]:
        """Random ids, never 0, which pads."""
        generator = torch.Generator().manual_seed(3)
        return [torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths]

    def their_logits(self, model: Any, document: Sequence[int]) -> Tensor:
        """[L, V], of a transformers or peft model."""
        return cast(Tensor, model(torch.tensor([document])).logits[0])

    def their_loss(self, model: Any, documents: Sequence[Sequence[int]]) -> Tensor:
        """The sum of all tokens' losses, a document at a time."""
        parts = [
            F.cross_entropy(self.their_logits(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
            for ids in documents
        ]
        return torch.stack(parts).sum()


@pytest.fixture(scope="session")
def twins(tiny: Callable[..., LlamaForCausalLM]) -> Callable[..., Twins]:
    """Makes them; keywords are the config's. Three layers, values that make attention uneven."""

    def make(**config: Any) -> Twins:
        config = {"num_hidden_layers": 3, **config}
        ours = tiny(**config)
        values = asdict(ours.config) | {"rope_parameters": asdict(ours.config.rope_parameters)}
        theirs = TheirLlama(TheirConfig(**(values | config | {"pad_token_id": None}))).eval()
        weights = theirs.state_dict()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(("norm" in name) + 0.2 * torch.randn(weight.shape, generator=generator))
            for name, pieces in layout(ours).items():
                for piece in pieces:
                    ours.get_parameter(name)[piece.start : piece.stop] = weights[piece.name]
        return Twins(theirs, ours)

    return make


@torch.no_grad()
def disturb(parameters: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in parameters:
        parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that learns, by name; none is missing."""
    model.zero_grad()
    loss.backward()
    return {name: cast(Tensor, parameter.grad).clone() for name, parameter in trainable(model).items()}


def two_steps(model: LlamaForCausalLM, batch: Batch) -> tuple[set[str], set[str]]:
    """Names of the parameters that moved in two optimizer steps, and of those that stayed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(trainable(model), lr=0.1)
    for _ in range(2):
        (model(batch) / batch.count).backward()
        optimizer.step(torch.zeros(()))
        optimizer.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    return moved, set(before) - moved


@dataclass(frozen=True)
class Tools:
    """What the tests of the prompt adapters share."""

    rows_of = staticmethod(rows_of)
    disturb = staticmethod(disturb)
    gradients = staticmethod(gradients)
    two_steps = staticmethod(two_steps)


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools()
