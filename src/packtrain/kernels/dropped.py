"""What adapters with a dropout add to a frozen product: their input is x with elements dropped, for each its own.

    Drop          which elements: by the tokens' keys and the adapters' names (kernels/random.py)
    down          h = dropout(x) A^T
    add_up        dx += dropout(dh A)
    gradient      dA = dh^T dropout(x)

No dropped x is ever in memory: its mask is made again wherever x passes by. The plain form below is the definition;
kernels/dropped_triton.py is the same for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packtrain.kernels.random import dropout, number
from packtrain.kernels.rows import RUNS_TRITON, Rows, by_triton

if RUNS_TRITON:
    from packtrain.kernels import dropped_triton


@dataclass(frozen=True, slots=True)
class Drop:
    """The dropout of one layer's adapters."""

    keys: Tensor
    """int64 [T], the tokens'."""
    names: tuple[str, ...]
    """Hugging Face's, of each adapted part."""
    p: float

    @property
    def numbers(self) -> list[int]:
        """What the names are to the random bits."""
        return [number(name) for name in self.names]


def down(x: Rows, a: Sequence[Tensor], drop: Drop, to: Tensor) -> None:
    """to [T, C] = dropout(x) A^T, adapter by adapter, zero beyond them; of float8 rows' numbers, without their scale.

    a: fp32 [r, K] of each adapter.
    """
    rank = a[0].shape[0]
    if to.shape[1] > rank * len(a):
        to[:, rank * len(a) :] = 0
    for i, (name, matrix) in enumerate(zip(drop.names, a, strict=True)):
        mine = to[:, i * rank : (i + 1) * rank]
        if by_triton(x.data):
            dropped_triton.down(x.values, matrix, drop.keys, number(name), drop.p, mine)
        else:
            mine.copy_(dropout(x.values.float(), drop.keys, name, drop.p) @ matrix.t())


def add_up(dx: Tensor, dh: Tensor, a: Sequence[Tensor], drop: Drop) -> None:
    """dx [T, K] += dropout(dh A), over all adapters and rounded once; dh [T, C]."""
    rank = a[0].shape[0]
    if by_triton(dx):
        dropped_triton.add_up(dx, dh, torch.cat(list(a)), rank, drop.keys, drop.numbers, drop.p)
        return
    total = dx.float()
    for i, (name, matrix) in enumerate(zip(drop.names, a, strict=True)):
        total += dropout(dh[:, i * rank : (i + 1) * rank].float() @ matrix, drop.keys, name, drop.p)
    dx.copy_(total)


def gradient(x: Rows, dh: Tensor, rank: int, drop: Drop, out: Tensor) -> None:
    """Partial sums of dh^T dropout(x) into out [splits, ...]: [r, K] of each adapter, one after the other."""
    size = rank * x.columns
    for i, name in enumerate(drop.names):
        mine, small = out[:, i * size : (i + 1) * size], dh[:, i * rank : (i + 1) * rank]
        if by_triton(x.data):
            dropped_triton.gradient(x.values, x.scale, small, drop.keys, number(name), drop.p, mine)
            continue
        values = x.values.float() if x.scale is None else x.values.float() * x.scale[:, None]
        mine.zero_()
        mine[0] = (small.float().t() @ dropout(values, drop.keys, name, drop.p)).flatten()
