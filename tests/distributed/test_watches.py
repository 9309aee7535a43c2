"""The FLOP counter and the profiler on two ranks: of sharded models, and of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

import tiny
from packtrain.batch import Batch
from packtrain.data.collate import make_batch
from packtrain.data.tokens import Tokens
from packtrain.distributed.parallelize import materialise, parallelize
from packtrain.distributed.place import Place
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks
from packtrain.peft import lora
from packtrain.peft.lora import LoraSettings
from packtrain.train.flops import Cost, Count, FlopCounter, Work
from packtrain.train.profile import Profiler

SHAPE: dict[str, Any] = tiny.SIZES | {"model_type": "llama"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_of(place: Place, strategy: str, method: str, *, recompute: bool) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=torch.float32, device=torch.device("meta"))
    if method == "lora":
        lora.install(model, LoraSettings(r=8, target_modules=TARGETS))
    parallelize(model, blocks(model), place, strategy, recompute=recompute)
    materialise(model, place.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model.train()


def batch(lengths: tuple[int, ...]) -> Batch:
    ids = np.ones(sum(lengths), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = Tokens(ids, ids, offsets, np.arange(1, len(lengths) + 1), "rows")
    return make_batch(tokens, [np.arange(len(lengths))], seed=0, step=0, pad_id=0)


def costs(place: Place, strategy: str, method: str) -> tuple[Cost, int]:
    """(the formula's, torch's count of a step without what was recomputed)."""
    model = model_of(place, strategy, method, recompute=True)
    with Count() as count:
        model(batch((40, 50))).backward()
    assert count.recomputed > 0
    return Cost.of(model), count.flops - count.recomputed


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_a_sharded_model_costs_what_it_costs_whole(strategy: str, method: str) -> None:
    whole, *_ = run_ranks(costs, 1, "NO_SHARD", method)
    work = Work.computed([batch((40, 50))])
    for cost, counted in run_ranks(costs, 2, strategy, method):
        assert cost == whole[0]
        assert counted == pytest.approx(cost.flops(work), rel=0.02)


def watched(place: Place, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Six steps under each watch; this rank's batch is longer by its number."""
    model = model_of(place, "FULL_SHARD", "lora", recompute=False)
    counter = FlopCounter(model, place, start=1, total_steps=6)
    profiler = Profiler(Path(folder), place)
    for watch in (counter, profiler):
        for number in range(1, 7):
            batches = [batch((30 + 10 * place.rank,))]
            with watch.step(number, batches):
                model(batches[0]).backward()
    return counter.finish(), profiler.finish()


def test_ranks_add_up_their_flops_and_write_a_trace_each(tmp_path: Path) -> None:
    found = run_ranks(watched, 2, str(tmp_path))
    alone = [cost for cost, _ in run_ranks(costs, 1, "NO_SHARD", "lora")]
    expected = sum(alone[0].flops(Work.useful([batch((length,))])) for length in (30, 40))
    for flops, profile in found:
        assert flops["model_flops"] == pytest.approx(expected)
        assert flops["model_tflops"] > 0
        assert profile == {"profiler_dir": str(tmp_path)}
    assert found[0][0]["counted_flops"] < found[1][0]["counted_flops"], "each rank counts its own"
    names = sorted(path.name.split(".")[0] for path in tmp_path.glob("*.pt.trace.json.gz"))
    assert names == ["rank-0", "rank-1"]
