"""The fast layers sharded: weights are gathered for the forward and again for the backward, columns and all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import CPU, FP32, SHAPE, adapters, bare, batch

from packtrain.distributed.parallelize import gather, local_rows, materialise, parallelize
from packtrain.distributed.place import Place
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.peft import lora


def gradients(
    place: Place, strategy: str, recompute: fast.Recompute, dropout: float | None, shards: bool
) -> dict[str, Tensor]:
    """After two steps of plain descent, so that stale columns would show: every summed gradient. `dropout` None: all
    weights learn."""
    if dropout is None:
        model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=torch.float32, device=torch.device("meta"))
    else:
        model = bare(adapters(lora_dropout=dropout))
    rate = 1e-4 if dropout is None else 0.01
    fast.install(model, FP32, recompute)
    if shards:
        parallelize(model, blocks(model), place, strategy, recompute=False)
    else:
        fast.allocate(model, CPU)
    materialise(model, CPU)
    draw(model, 0, local_rows)
    lora.initialise(model, 0, local_rows)
    model.train()
    data = [batch(), batch((9, 9), seed=3)]
    mine = [data[place.rank]] if shards else data
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = None
        for part in mine:
            model(part).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = {n: gather(p.grad).clone() for n, p in trained.items() if p.grad is not None}
        with torch.no_grad():
            for parameter in trained.values():
                local_rows(parameter)[0].sub_(rate * local_rows(parameter.grad)[0])
    return found


def alone(place: Any, *arguments: Any) -> dict[str, Tensor]:
    return gradients(place, *arguments)


@pytest.mark.parametrize(
    ("strategy", "recompute", "dropout"),
    [
        ("FULL_SHARD", "none", 0.0),
        ("SHARD_GRAD_OP", "full", 0.0),
        ("FULL_SHARD", "selective", 0.3),
        ("FULL_SHARD", "none", None),
        ("SHARD_GRAD_OP", "selective", None),
    ],
)
def test_gradients_equal_one_process(strategy: str, recompute: fast.Recompute, dropout: float | None) -> None:
    (whole,) = run_ranks(alone, 1, strategy, recompute, dropout, False)
    assert len(whole) == (21 if dropout is None else 42)
    for ours in run_ranks(gradients, 2, strategy, recompute, dropout, True):
        assert ours.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
