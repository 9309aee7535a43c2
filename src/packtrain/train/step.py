"""One optimizer step, whole: a function of its inputs that knows no config, no clock and no print.

    step_vector     what all ranks agree on before the step: labelled tokens, input tokens, and what is asked for
    train_step      forward and backward over this rank's micro-batches, one update
    Guard           which updates are not to be taken, decided on the device before they would be
    StepReport      what the host reads, one step late

The loss is the mean over every labelled token of the whole step: every rank, every micro-batch. Each part is
divided by that one number before its backward, so gradients only ever add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packtrain.batch import Batch, queued
from packtrain.distributed.collectives import sum_
from packtrain.distributed.parallelize import reduce_gradients, set_gradient_sync, sums_after
from packtrain.distributed.place import Place, is_out_of_memory
from packtrain.optim import Optimizer, clip_factor, grad_norm, not_finite

LABELS, INPUTS, STOP, SAVE, FAILED = range(5)
VECTOR = 5
"""Places in the step vector, and how many: labelled tokens, tokens that are not padding, ranks that ask to stop, to
save, or to say that an earlier save has failed.
"""

NOT_FINITE, SPIKE, NO_LABELS = 1, 2, 4
"""Bits of `StepReport.verdict`."""


@dataclass(frozen=True, slots=True)
class Guard:
    """What is done about a step's numbers before its update; all ranks see the same ones.

    An update with a loss or a gradient that is not finite is never taken; `latches`: nor are later ones, until the
    host has read of it. A spike is a loss or a norm above `limits`.
    """

    latches: bool = True
    limits: Tensor | None = None
    """fp64 [2] on the device: the largest loss and gradient norm that are no spike."""
    refuses_spikes: bool = False
    spikes_latch: bool = False


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step's outcome, still on the device: 0-dim fp32 `loss` (NaN without labels), `grad_norm` (before clipping)."""

    loss: Tensor
    grad_norm: Tensor
    agreed: Tensor
    """float64 [5], the summed step vector."""
    scale: Tensor
    """0-dim fp32, what fp16 multiplied the loss by; 1 without fp16."""
    memory: Tensor
    """fp32 [ranks], GiB of each rank at the step's end."""
    verdict: Tensor
    """0-dim fp32, a sum of NOT_FINITE, SPIKE and NO_LABELS; 0: nothing was found."""
    losses: Tensor
    """float64 [ranks, micro-batches], each one's sum of token losses."""


def step_vector(
    batches: Sequence[Batch], stop: bool, device: torch.device, *, save: bool = False, failed: bool = False
) -> Tensor:
    """This rank's share of what is agreed on, float64 [5]: made on the host, so that nothing asks the device."""
    shares = [sum(b.count for b in batches), sum(b.tokens for b in batches), int(stop), int(save), int(failed)]
    return queued(torch.tensor(shares, dtype=torch.float64), device)


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    agreed: Tensor,
    optimizer: Optimizer,
    place: Place,
    *,
    clip: float | None,
    memory: Callable[[], float],
    guard: Guard = Guard(),
    pieces: int = 1,
    smaller: Callable[[Exception], Sequence[Batch]] | None = None,
) -> StepReport:
    """One optimizer step over this rank's micro-batches: as many on every rank, an empty one where rows ran out.

    `agreed` is `step_vector`'s tensor, not yet summed. `memory` gives this rank's GiB once the step has been queued.
    `batches` are micro-batches in so many `pieces` each. Out of memory, this rank's gradients are made afresh from what
    `smaller` gives, the same rows in more pieces; without it, or if it raises, the error is the caller's. That is safe
    where a micro-batch has no collective: on one rank, and where the model is not sharded.
    """
    sum_(agreed, place)
    scale = optimizer.scale(torch.ones((), device=place.device))
    losses = torch.zeros(place.world_size, len(batches) // pieces, dtype=torch.float64, device=place.device)
    mine = losses[place.rank]
    while (error := _gradients(model, batches, agreed, optimizer, mine)) is not None:
        if smaller is None:
            raise error
        optimizer.zero_grad()
        batches = smaller(error)
    gradients = optimizer.gradients(fp32=sums_after(model, place))
    reduce_gradients(model, gradients, place)
    norm = grad_norm(gradients, model, place, beside=losses)
    factor = None if clip is None else clip_factor(norm, clip)
    loss = losses.sum() / agreed[LABELS]
    verdict = _update(optimizer, guard, loss, norm, factor, agreed[LABELS])
    optimizer.zero_grad()
    tail = torch.zeros(place.world_size)
    tail[place.rank] = memory()
    tail = queued(tail, place.device)  # a number written into a tensor there would be waited for
    sum_(tail, place)
    return StepReport(
        loss=loss.float(), grad_norm=norm, agreed=agreed, scale=scale, memory=tail, verdict=verdict, losses=losses
    )


def _gradients(
    model: nn.Module, batches: Sequence[Batch], agreed: Tensor, optimizer: Optimizer, losses: Tensor
) -> Exception | None:
    """Forward and backward of all; each micro-batch's loss into its place of `losses`. Returns a want of memory.

    The error comes without its traceback, whose frames would keep the very activations alive.
    """
    losses.zero_()
    pieces = len(batches) // len(losses)
    labels = agreed[LABELS].clamp(min=1).float()
    try:
        for i, batch in enumerate(batches):
            set_gradient_sync(model, last=i == len(batches) - 1)
            part = model(batch)
            torch.autograd.backward(optimizer.scale(part / labels))
            losses[i // pieces] += part.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)
    return None


def _update(
    optimizer: Optimizer, guard: Guard, loss: Tensor, norm: Tensor, factor: Tensor | None, labels: Tensor
) -> Tensor:
    """Take the update, unless the numbers that all ranks share forbid it; returns the verdict, 0-dim fp32."""
    empty = (labels == 0).float()
    infinite = torch.maximum(not_finite(norm), not_finite(loss) * (1 - empty))
    spike = torch.zeros_like(empty)
    if guard.limits is not None:
        above = torch.stack([loss, norm.double()]) > guard.limits  # a NaN is above nothing
        spike = above.any().float() * (1 - infinite) * (1 - empty)
    optimizer.step(
        found_inf=infinite,
        factor=factor,
        latches=guard.latches,
        refused=torch.maximum(empty, spike) if guard.refuses_spikes else empty,
        stands=spike if guard.spikes_latch else None,
    )
    return NOT_FINITE * infinite + SPIKE * spike + NO_LABELS * empty
