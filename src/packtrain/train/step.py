"""One optimizer step, whole: a function of its inputs that knows no config, no clock and no print.

    step_vector     what all ranks agree on before the step: labelled tokens, input tokens, stop
    train_step      forward and backward over this rank's micro-batches, one update
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
from packtrain.distributed.parallelize import reduce_gradients, set_gradient_sync
from packtrain.distributed.place import Place
from packtrain.optim import Optimizer, clip_, grad_norm, not_finite

LABELS, INPUTS, STOP = range(3)
VECTOR = 3
"""Places in the step vector, and how many: labelled tokens, tokens that are not padding, ranks asked to stop."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step's outcome, still on the device: 0-dim fp32 `loss` and `grad_norm` (before clipping)."""

    loss: Tensor
    grad_norm: Tensor
    agreed: Tensor
    """float64 [3], the summed step vector."""
    scale: Tensor
    """0-dim fp32, what fp16 multiplied the loss by; 1 without fp16."""
    memory: Tensor
    """fp32 [ranks], GiB of each rank at the step's end."""


def step_vector(batches: Sequence[Batch], stop: bool, device: torch.device) -> Tensor:
    """This rank's share of what is agreed on, float64 [3]: made on the host, so that nothing asks the device."""
    shares = [sum(b.count for b in batches), sum(b.tokens for b in batches), int(stop)]
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
) -> StepReport:
    """One optimizer step over this rank's micro-batches: as many on every rank, an empty one where rows ran out.

    `agreed` is `step_vector`'s tensor, not yet summed. `memory` gives this rank's GiB once the step has been queued.
    """
    sum_(agreed, place)
    labels = agreed[LABELS].float()
    scale = optimizer.scale(torch.ones((), device=place.device))
    loss = torch.zeros((), device=place.device)
    for i, batch in enumerate(batches):
        set_gradient_sync(model, last=i == len(batches) - 1)
        part = model(batch) / labels
        torch.autograd.backward(optimizer.scale(part))
        loss += part.detach()
    gradients = optimizer.gradients()
    reduce_gradients(model, gradients, place)
    norm = grad_norm(gradients, model, place)
    if clip is not None:
        clip_(gradients, norm, clip)
    optimizer.step(found_inf=not_finite(norm))
    optimizer.zero_grad()
    tail = torch.zeros(1 + place.world_size, device=place.device)
    tail[0] = loss
    tail[1 + place.rank] = memory()
    sum_(tail, place)
    norm = norm.to(place.device)  # of gradients that may be in host memory
    return StepReport(loss=tail[0], grad_norm=norm, agreed=agreed, scale=scale, memory=tail[1:])
