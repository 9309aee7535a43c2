"""What a fused layer keeps of its forward for its backward.

Kept          every activation that the backward reads, and the same as a flat list for autograd
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor

from packtrain.kernels.rows import Rows


@dataclass(slots=True)
class Kept:
    """One layer's activations: what the backward reads. Kept by a recomputed layer: z1 and what attention left."""

    z1: Tensor
    """The layer's input, summed."""
    out: Tensor | None = None
    """Attention's output [T, H, d]."""
    lse: Tensor | None = None
    rstd1: Tensor | None = None
    y1: Rows | None = None
    h1: Tensor | None = None
    qkv: Tensor | None = None
    mixed: Rows | None = None
    h_out: Tensor | None = None
    z2: Tensor | None = None
    rstd2: Tensor | None = None
    y2: Rows | None = None
    h2: Tensor | None = None
    gate_up: Tensor | None = None
    gated: Rows | None = None
    h_down: Tensor | None = None

    def flat(self) -> tuple[list[Tensor | None], list[int | None]]:
        """Its tensors, and for each field the columns of its rows if it is rows."""
        tensors: list[Tensor | None] = []
        columns: list[int | None] = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            is_rows = isinstance(value, Rows)
            tensors += [value.data, value.scale] if is_rows else [value]
            columns.append(value.columns if is_rows else None)
        return tensors, columns

    @classmethod
    def unflat(cls, tensors: Sequence[Tensor | None], columns: Sequence[int | None]) -> Kept:
        """`flat`, undone."""
        left = iter(tensors)
        values: list[Any] = [
            next(left) if count is None else Rows(cast(Tensor, next(left)), next(left), count) for count in columns
        ]
        return cls(*values)
