"""A float8 base on several ranks: one process's bytes and scales, gathered as bytes, and its losses and gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from ranks import run_ranks
from runs import column, lines, train
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import CPU, FLOAT8, adapters, bare, batch, farthest
from test_quantised import moved
from test_resume import cut_off

import tiny
from packtrain.checkpoint import hf
from packtrain.checkpoint.folder import HfFolder
from packtrain.distributed.parallelize import (
    gather,
    largest,
    local_rows,
    materialise,
    parallelize,
    reduce_gradients,
    set_gradient_sync,
)
from packtrain.distributed.place import Place
from packtrain.kernels import float8
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.model.shared import linears
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")
DATA = ((7, 20, 3, 13), (9, 9), (30,), (5, 6, 7))
"""Documents of each micro-batch of a step."""
CASES: list[tuple[str, fast.Recompute, LoraSettings]] = [
    ("FULL_SHARD", "none", adapters()),
    ("SHARD_GRAD_OP", "selective", adapters(("q_proj", "v_proj"), r=5)),
    ("HYBRID_SHARD", "full", adapters(lora_dropout=0.3)),
    ("FULL_SHARD", "selective", adapters(lora_dropout=0.3)),
    ("NO_SHARD", "none", adapters()),
]


def sharded(model: LlamaForCausalLM, place: Place | None, strategy: str, recompute: fast.Recompute) -> LlamaForCausalLM:
    """A model on meta with a float8 base and memory, in the form that this many ranks have."""
    assert fast.obstacle(model, CPU, FLOAT8) is None
    fast.install(model, FLOAT8, recompute)
    groups = {"shard_group": 2} if strategy == "HYBRID_SHARD" else {}
    if place is not None:
        parallelize(model, blocks(model), place, strategy, recompute=recompute != "none", **groups)
    if place is None or strategy == "NO_SHARD":
        fast.allocate(model, CPU)
    materialise(model, CPU)
    return model.train()


Bytes = dict[str, tuple[int, bytes, float]]


def held(model: LlamaForCausalLM) -> Bytes:
    """Of each float8 weight here: the first row, the bytes of all rows, the scale."""
    found: Bytes = {}
    for i, layer in enumerate(blocks(model)):
        for linear in linears(layer):
            local, first = local_rows(linear.weight)
            assert local.dtype == float8.E4M3
            scale: Any = linear.weight_scale
            assert (scale == scale[0]).all()
            name = f"{i}.{linear.parts[0].name}"
            found[name] = first, local.contiguous().view(torch.uint8).numpy().tobytes(), scale[0].item()
    return found


def filled(place: Place | None, folder: Path) -> dict[tuple[str, str], Bytes]:
    """From a folder and drawn, under each strategy."""
    config = LlamaConfig.from_dict(tiny.SIZES | {"model_type": "llama", "intermediate_size": 48})
    found = {}
    for strategy in STRATEGIES:
        if place is not None and strategy == "HYBRID_SHARD" and place.world_size % 2:
            continue
        for source in ("folder", "drawn"):
            model = LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("meta"))
            lora.install(model, adapters())
            sharded(model, place, strategy, "none")
            if source == "drawn":
                draw(model, 3, local_rows, largest=largest)
            else:
                hf.load_model(model, HfFolder(folder))
            found[strategy, source] = held(model)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_holds_the_same_bytes_and_scales(world: int, tmp_path: Path) -> None:
    """Rows that do not divide by 3, too."""
    expected = filled(None, tiny.model(tmp_path, intermediate_size=48, with_tokenizer=False))
    assert expected["FULL_SHARD", "folder"] != expected["FULL_SHARD", "drawn"]
    ranks = run_ranks(filled, world, tmp_path)
    for case in ranks[0]:
        for name, (_, whole, scale) in expected[case].items():
            pieces = dict(rank[case][name][:2] for rank in ranks)  # copies of the model have one another's
            assert b"".join(pieces[first] for first in sorted(pieces)) == whole, (case, name)
            assert {rank[case][name][2] for rank in ranks} == {scale}, (case, name)
    assert len(ranks[0]["FULL_SHARD", "drawn"]["0.q_proj"][1]) < len(expected["FULL_SHARD", "drawn"]["0.q_proj"][1])


def gradients(place: Place) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss here, and every adapter's gradient, summed over ranks and micro-batches, in each case."""
    found = []
    for strategy, recompute, settings in CASES:
        model = sharded(bare(settings), place if place.world_size > 1 else None, strategy, recompute)
        draw(model, 0, local_rows, largest=largest)
        moved(model, settings, local_rows)
        mine, loss = DATA[place.rank :: place.world_size], 0.0
        for lengths in mine:
            set_gradient_sync(model, last=lengths is mine[-1])
            part = model(batch(lengths)) / 40
            part.backward()
            loss += part.item()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reduce_gradients(model, [p.grad for p in trained.values()], place)
        found.append((loss, {name: gather(p.grad).clone() for name, p in trained.items()}))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_one_processs(world: int) -> None:
    """Micro-batch by micro-batch, so that only the sums of gradients are in another order."""
    (alone,) = run_ranks(gradients, 1)
    ranks = run_ranks(gradients, world)
    for i, (loss, expected) in enumerate(alone):
        assert sum(rank[i][0] for rank in ranks) == pytest.approx(loss, rel=1e-6), CASES[i]
        for rank in ranks:
            assert farthest(rank[i][1], expected) < 1e-6, CASES[i]
    assert farthest(alone[0][1], alone[-1][1]) == 0.0  # one process has no strategies


class Traffic(TorchDispatchMode):
    """Bytes that each group of parameters takes once it is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather_base" in str(func):
            self.gathered.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def traffic(place: Place) -> tuple[list[int], int, int]:
    """Bytes of each all-gather; bytes of a layer's float8 weights; and of all else in it."""
    model = sharded(bare(adapters()), place, "FULL_SHARD", "none")
    draw(model, 0, local_rows, largest=largest)
    moved(model, adapters(), local_rows)
    with Traffic() as seen:
        model(batch()).backward()
    weights = [linear.weight.numel() for linear in linears(blocks(model)[0])]
    others = sum(p.numel() * p.element_size() for p in blocks(model)[0].parameters() if p.dtype != float8.E4M3)
    return seen.gathered, sum(weights), others


def test_a_weight_is_gathered_as_a_byte_and_adapters_as_they_are() -> None:
    for (_, *layers), weights, others in run_ranks(traffic, 2):  # the root's are first
        assert layers == [weights + others] * 6


RUN: dict[str, Any] = {
    "dataset": "grammar_dataset",
    "use_peft": True,
    "quantization": "fp8",
    "r": 4,
    "lora_dropout": 0.1,
    "lr": 5e-3,
    "batch_size_training": 1,
    "val_batch_size": 1,
    "context_length": 96,
    "max_train_step": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "unsharded, padded": {"sharding_strategy": "NO_SHARD", "batching_strategy": "padding"},
    "selective": {"sharding_strategy": "SHARD_GRAD_OP", "activation_checkpointing": "selective"},
}


def flags_of(place: Place, root: Path, out: str, **flags: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        **RUN,
        "model_name": str(root / "base"),
        "grammar_dataset": {"train_split": data, "test_split": data},
        "gradient_accumulation_steps": 4 // place.world_size,
        "output_dir": str(root / out / str(place.world_size)),
        **flags,
    }


def whole_runs(place: Place, root: Path) -> None:
    for kind, flags in KINDS.items():
        train(place, kind, flags_of(place, root, kind, **flags))


def stopped(place: Place, root: Path) -> None:
    cut_off(place, "stopped", flags_of(place, root, "resumed"), 2)


def resumed(place: Place, root: Path) -> None:
    train(place, "resumed", flags_of(place, root, "resumed", output_dir=str(root / "resumed/2")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: KIND/RANKS."""
    root = tmp_path_factory.mktemp("float8")
    tiny.model(root / "base")
    tiny.grammar(root / "rows.csv", 12)
    for world in (1, 2):
        run_ranks(whole_runs, world, root, timeout=120)
    run_ranks(stopped, 2, root, timeout=120)
    run_ranks(resumed, 2, root, timeout=120)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_two_ranks_is_one_ranks(kind: str, finished: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        one, two = (column(lines(finished / kind / world), key) for world in ("1", "2"))
        assert two == pytest.approx(one, rel=1e-5), key
    ours, theirs = (load_file(finished / kind / world / "adapter_model.safetensors") for world in ("1", "2"))
    assert farthest(ours, theirs) < 1e-4


def test_a_stopped_run_on_two_ranks_goes_on_bit_for_bit(finished: Path) -> None:
    whole, again = finished / "sharded/2", finished / "resumed/2"
    assert json.loads((again / "run/result.json").read_text())["resumed_from"].endswith("step-2")
    for key in ("loss", "grad_norm", "eval_loss"):
        assert column(lines(again), key) == column(lines(whole), key), key
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert PeftConfig.from_pretrained(again).r == 4
