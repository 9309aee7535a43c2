"""Figures of a whole gradient that stay on the device: its norm, whether it is finite, and what clips it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from packtrain.distributed.collectives import sum_
from packtrain.distributed.parallelize import copies
from packtrain.distributed.place import Place


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor], model: nn.Module, place: Place, beside: Tensor | None = None) -> Tensor:
    """2-norm of the whole gradient, 0-dim fp32, the same bits on every rank: one all-reduce, of the squares.

    `beside`, float64 on the place's device, is summed over the ranks in the same one, in place; the norm is then there.
    """
    # In float64, whatever they are in: torch's fp32 norm of 30 million numbers is off by 0.16 % on a CPU.
    squares = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64)).square().sum() / copies(model, place)
    if beside is None:
        return sum_(squares, place).sqrt().float()
    shared = sum_(torch.cat([squares.to(beside.device).view(1), beside.flatten()]), place)
    beside.copy_(shared[1:].view_as(beside))
    return shared[0].sqrt().float()


def not_finite(norm: Tensor) -> Tensor:
    """1.0 if a 0-dim norm is NaN or infinite, else 0.0; on the device, fp32."""
    return (~norm.isfinite()).float()


def clip_factor(norm: Tensor, threshold: float) -> Tensor:
    """What gradients of this 0-dim norm are multiplied by so that it is at most `threshold`, as clip_grad_norm_ does.

    A number for the update, which does it in fp32: bf16 gradients multiplied in place would be rounded once more.
    """
    return (threshold / (norm + 1e-6)).clamp(max=1.0)
