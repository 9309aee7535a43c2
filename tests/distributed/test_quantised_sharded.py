"""A quantised base on several ranks: the same bytes on any number, gathered as bytes; one process's gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import CPU, FP32, adapters, bare, batch, farthest
from test_quantised import FORMS, FP, models, moved

import tiny
from packtrain.checkpoint import hf
from packtrain.checkpoint.folder import HfFolder
from packtrain.distributed.parallelize import gather, local_rows, materialise, parallelize, reduce_gradients
from packtrain.distributed.place import Place
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.model.quantised import QuantisedLinear, quantise, quantised
from packtrain.peft import lora

DATA = ((7, 20, 3, 13), (9, 9), (30,), (5, 6, 7))
CASES: list[tuple[str, str, bool, fast.Recompute | None]] = [
    ("FULL_SHARD", "nf4 twice", False, None),
    ("FULL_SHARD", "int8", True, None),
    ("FULL_SHARD", "fp4", False, "none"),
    ("FULL_SHARD", "nf4", False, "selective"),
    ("SHARD_GRAD_OP", "nf4", True, None),
    ("HYBRID_SHARD", "nf4 twice", True, None),
    ("NO_SHARD", "nf4", True, None),
]
"""(strategy, form, recomputed, the fused form's recompute if it is fused)"""


class Traffic(TorchDispatchMode):
    """Bytes that parameters take once they are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather_base" in str(func):
            self.gathered.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[Tensor]]:
    """Every weight that a product reads, as it is then."""
    seen: list[Tensor] = []
    plain = QuantisedLinear.matrix

    def matrix(self: QuantisedLinear) -> Tensor:
        seen.extend((self.weight, self.weight_scale))
        return plain(self)

    QuantisedLinear.matrix = matrix  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        QuantisedLinear.matrix = plain  # type: ignore[method-assign]


def sharded(place: Place, strategy: str, form: str, again: bool, fused: fast.Recompute | None) -> LlamaForCausalLM:
    model = bare(adapters())
    quantise(model, FORMS[form], FP)
    if fused is not None:
        fast.install(model, FP32, fused)
    groups = {"shard_group": 2} if strategy == "HYBRID_SHARD" else {}
    parallelize(model, blocks(model), place, strategy, recompute=again, **groups)
    materialise(model, CPU)
    draw(model, 0, local_rows)
    moved(model, adapters(), local_rows)
    return model.train()


def gradients(place: Place) -> list[dict[str, Tensor]]:
    """Every adapter's, summed over ranks and batches, in each case."""
    found = []
    for case in CASES:
        model = sharded(place, *case)
        for lengths in DATA[place.rank :: place.world_size]:
            model(batch(lengths)).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reduce_gradients(model, [p.grad for p in trained.values()], place)
        found.append({name: gather(p.grad).clone() for name, p in trained.items()})
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_the_dequantised_model_in_one_process(world: int) -> None:
    expected: dict[str, dict[str, Tensor]] = {}
    for name, form in FORMS.items():
        _, plain = models(form)
        for lengths in DATA:
            plain(batch(lengths)).backward()
        expected[name] = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for ours in run_ranks(gradients, world):
        for case, found in zip(CASES, ours, strict=True):
            assert farthest(found, expected[case[1]]) < 1e-5, case
    assert farthest(found, expected["int8"]) > 1e-3  # the comparison tells one form from another


def traffic(place: Place) -> tuple[list[int], list[tuple[str, bool, int]], list[int], int]:
    """Bytes of each all-gather; (dtype, whether sharded, bytes) of all that products read; bytes of a layer's weights
    and scales, and of the rest of it.
    """
    model = sharded(place, "FULL_SHARD", "nf4 twice", True, None)
    with reads() as seen, Traffic() as traffic:
        model(batch()).backward()
    first = blocks(model)[0]
    packed = [size(p) for layer in quantised(first) for p in (layer.weight, layer.weight_scale)]
    read = [(str(weight.dtype), isinstance(weight, DTensor), weight.nbytes) for weight in seen]
    return traffic.gathered, read, packed, sum(map(size, first.parameters())) - sum(packed)


def size(parameter: Tensor) -> int:
    """Bytes of all of it."""
    return parameter.numel() * parameter.element_size()


def test_what_is_gathered_is_the_bytes() -> None:
    for gathered, read, packed, others in run_ranks(traffic, 2):
        # Four products a layer, forward, again, and back: below the first layer's first nothing learns.
        assert len(read) == 2 * (12 + 12 + 11)
        assert {size for _, _, size in read} == set(packed)
        assert not any(is_sharded for _, is_sharded, _ in read)
        assert {dtype for dtype, _, _ in read} == {"torch.bfloat16", "torch.float32"}
        _, *layers = gathered  # the root's embedding is first
        assert layers == [sum(packed) + others] * 6
        assert sum(packed) < 4 * 64 * (128 + 64 + 192 + 96) / 5.5


def folder_bytes(place: Place | None, folder: Path) -> dict[str, bytes]:
    config = LlamaConfig.from_dict(tiny.SIZES | {"model_type": "llama", "intermediate_size": 45})
    held: dict[str, bytes] = {}
    for kind, form in FORMS.items():
        model = LlamaForCausalLM(config, dtype=FP, device=torch.device("meta"))
        lora.install(model, adapters())
        quantise(model, form, FP)
        if place is not None:
            parallelize(model, blocks(model), place, "FULL_SHARD", recompute=False)
        materialise(model, CPU)
        hf.load_model(model, HfFolder(folder))
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                held[f"{kind} {name}"] = gather(parameter).contiguous().view(torch.uint8).numpy().tobytes()
    return held


def test_any_number_of_ranks_holds_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not divide, columns that are no whole blocks; and whatever is read at a time."""
    folder = tiny.model(tmp_path / "base", intermediate_size=45, with_tokenizer=False)
    alone = folder_bytes(None, folder)
    assert len(alone) == len(FORMS) * 2 * 4 * 2
    for world in (2, 4):
        assert run_ranks(folder_bytes, world, folder) == [alone] * world
    monkeypatch.setattr(hf, "STREAM_BYTES", 1000)
    assert folder_bytes(None, folder) == alone
