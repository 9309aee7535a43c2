"""A step of the run as its flags say, against the plainest that there is.

The reference is one rank, fp32, layers in their plain form with nothing recomputed, eager attention, each row of the
data by itself: no packing, no padding, no accumulation. Its loss is torch's cross-entropy of all logits. Both begin
from the same weights; what an adapter begins with as zeros is given small values first, since a zero factor would hide
the other's gradient.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn import functional as F

from packtrain.batch import IGNORE
from packtrain.building import Inputs, build, loaders
from packtrain.configs.run import RunConfig
from packtrain.data.collate import collated, make_batch
from packtrain.distributed.collectives import sum_
from packtrain.distributed.parallelize import copies, local_rows
from packtrain.distributed.place import Place
from packtrain.model.llama import LlamaForCausalLM
from packtrain.optim import Optimizer
from packtrain.peft.trainable import trainable
from packtrain.precision import weight_dtype
from packtrain.train.step import step_vector, train_step


class Bounds(NamedTuple):
    """Relative differences that a precision may make: of the loss, of the gradient's norm, of a tensor's gradient."""

    loss: float
    norm: float
    gradient: float


BOUNDS = {
    "fp32": Bounds(1e-5, 1e-5, 1e-4),
    "16 bits": Bounds(0.01, 0.05, 0.25),
    "fp8": Bounds(0.02, 0.15, 0.9),
    "8bit": Bounds(0.05, 0.2, 0.7),
    "4bit": Bounds(0.2, 0.5, 1.5),
}
"""The last two are of another base: its weights are rounded to so few bits, the reference's are not."""

SMALL = 0.02
"""What stands for an adapter's zeros."""


class Row(NamedTuple):
    """One comparison; `ours` and `reference` are what people read."""

    name: str
    ours: float
    reference: float
    difference: float
    bound: float

    @property
    def ok(self) -> bool:
        """Within its bound; NaN is not."""
        return self.difference <= self.bound


class Step(NamedTuple):
    """What one step found; gradients are whole, fp32, on the host, and on rank 0 alone."""

    loss: float
    gradients: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return whole_norm(self.gradients.values())


def rows(cfg: RunConfig, place: Place, inputs: Inputs) -> list[Row]:
    """The comparisons, on rank 0; nothing on the others."""
    bounds = BOUNDS[precision(cfg, place)]
    ours, taken = _run_own(cfg, place, inputs)
    let_go()
    found: list[Row] = []
    if place.rank == 0:
        reference = _reference(cfg, place, inputs, taken)
        found = list(_compared(ours, reference, bounds))
    place.agree("verify/numbers", lambda: True)  # the others wait here for as long as the reference takes
    let_go()
    return found


def precision(cfg: RunConfig, place: Place) -> str:
    """Whose bounds hold: what the base is held in, else what is computed in."""
    quantization = cfg.train_config.quantization
    if quantization is not None:
        return quantization
    return "fp32" if weight_dtype(cfg, place.device) == torch.float32 else "16 bits"


def _run_own(cfg: RunConfig, place: Place, inputs: Inputs) -> tuple[Step, list[int]]:
    """The first step as the run takes it, up to its update; and the rows that are in it."""
    model = build(cfg, inputs, place)
    fill_zeros(model)
    loader, _ = loaders(cfg, inputs, place)
    optimizer = _Looking(trainable(model), lr=0.0, fp16=cfg.train_config.use_fp16)
    for scale in optimizer.scalars().values():
        scale.fill_(min(float(scale), 2.0**10))  # a run finds its own within some steps
    batches = [batch.to(place.device) for batch in loader.step(0)]
    agreed = step_vector(batches, False, place.device)
    report = train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
    whole = {}
    for (name, parameter), gradient in zip(trainable(model).items(), optimizer.seen, strict=True):
        gathered = _whole(parameter, gradient, model, place)
        if place.rank == 0:
            whole[name] = gathered.cpu()
    return Step(float(report.loss), whole), [row for rank in loader.rows_of(0) for part in rank for row in part]


class _Looking(Optimizer):
    """Keeps the gradients of a step instead of using them."""

    def step(self, found_inf: Tensor, **_: Any) -> None:
        self.seen = [gradient.clone() for gradient in self.gradients()]


def _whole(parameter: Tensor, gradient: Tensor, model: nn.Module, place: Place) -> Tensor:
    """A gradient gathered from the ranks that have its rows."""
    first = local_rows(parameter)[1]
    whole = torch.zeros(parameter.shape, dtype=torch.float32, device=place.device)
    whole[first : first + gradient.shape[0]] = gradient.to(place.device)
    return sum_(whole, place) / copies(model, place)


def _reference(cfg: RunConfig, place: Place, inputs: Inputs, taken: list[int]) -> Step:
    alone = replace(place, rank=0, world_size=1, local_rank=0, local_world_size=1, store=HashStore())
    model = build(plain(cfg), inputs, alone)
    fill_zeros(model)
    model.train()
    labels = sum(int((inputs.train.row(row)[1][1:] != IGNORE).sum()) for row in taken)
    loss = torch.zeros((), dtype=torch.float64, device=place.device)
    for row in taken:
        part = _row_loss(model, inputs, row, cfg.train_config.seed, place.device) / labels
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    learning = trainable(model)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learning.items()}
    return Step(float(loss), {name: gradient.float().cpu() for name, gradient in gradients.items()})


def plain(cfg: RunConfig) -> RunConfig:
    """The same run in fp32, with nothing clever about it."""
    train = replace(
        cfg.train_config,
        mixed_precision=False,
        use_fp16=False,
        quantization=None,
        attention="eager",
        activation_checkpointing="none",
    )
    rounding = {"mixed_precision": False, "use_fp16": False, "pure_bf16": False, "optimizer": "AdamW"}
    fsdp = replace(cfg.fsdp_config, fsdp_cpu_offload=False, **rounding)  # type: ignore[arg-type]
    return replace(cfg, train_config=train, fsdp_config=fsdp)


def _row_loss(model: LlamaForCausalLM, inputs: Inputs, row: int, seed: int, device: torch.device) -> Tensor:
    """Sum of one row's token losses, from all its logits."""
    tokens, place, names = inputs.train, row, None
    if inputs.collator is not None:
        names = np.array([row])
        tokens, place = collated(tokens, names, inputs.collator), 0
    batch = make_batch(tokens, [np.array([place])], seed=seed, step=0, pad_id=inputs.pad_id, names=names)
    logits = model(batch.to(device), logits=True)[0, :-1].float()
    labels = torch.from_numpy(tokens.row(place)[1][1:].astype(np.int64)).to(device)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Small values for what an adapter begins with as zeros, each a function of its parameter's name and place."""
    for name, parameter in trainable(model).items():
        if ".adapters." not in name and ".prompt." not in name:
            continue
        local, first = local_rows(parameter)
        seed = int.from_bytes(sha256(name.encode()).digest()[:8], "little")
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        drawn.normal_(0.0, SMALL, generator=torch.Generator().manual_seed(seed))
        mine = drawn[first : first + local.shape[0]].to(local)
        local.copy_(torch.where(local == 0, mine, local))


def _compared(ours: Step, reference: Step, bounds: Bounds) -> Iterator[Row]:
    yield Row("loss", ours.loss, reference.loss, _relative(ours.loss, reference.loss), bounds.loss)
    yield Row("gradient norm", ours.norm, reference.norm, _relative(ours.norm, reference.norm), bounds.norm)
    least = 1e-6 * reference.norm
    groups: dict[str, list[Row]] = {}
    for name, right in reference.gradients.items():
        difference = float((ours.gradients[name] - right).norm() / max(float(right.norm()), least))
        row = Row(name, float(ours.gradients[name].norm()), float(right.norm()), difference, bounds.gradient)
        groups.setdefault(re.sub(r"\blayers\.\d+\.", "layers.*.", name), []).append(row)
    for group, found in groups.items():
        worst = max(found, key=lambda row: row.difference if row.difference == row.difference else float("inf"))
        yield worst._replace(name=group if len(found) == 1 else f"{group} (worst of {len(found)})")


def _relative(ours: float, reference: float) -> float:
    return abs(ours - reference) / max(abs(reference), 1e-30)


def whole_norm(tensors: Iterable[Tensor]) -> float:
    """The 2-norm of all of them."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def let_go() -> None:
    """Memory of a model that is no longer there."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
