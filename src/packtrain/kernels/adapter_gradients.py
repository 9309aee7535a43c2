"""Gradients of a layer's adapters, and what reads a gradient together with them.

    Gradients             dA = dh^T x, dB = s dy^T h of several layers, in memory of their own
    up_and_gradient       dh and B's gradient, in one pass over dy where its parts allow

kernels/lowrank.py has the products; sums over tokens are made in parts of always the same size, so that they are the
same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from packtrain.kernels.dropped import Drop, gradient
from packtrain.kernels.lowrank import Float8, Plan, Wide
from packtrain.kernels.rows import RUNS_TRITON, Rows, by_triton

if RUNS_TRITON:
    from packtrain.kernels import adapter_gradients_triton as triton_kernels

SPLITS = 8
"""Parts of the token axis in which gradients of adapters are summed: always the same, so the sum is."""


class Gradients:
    """Gradients of adapters of several layers, summed at once: in parts of the token axis, then in order."""

    def __init__(self, plans: Sequence[Plan], device: torch.device) -> None:
        self.partial = torch.empty(SPLITS, sum(plan.elements for plan in plans), dtype=torch.float32, device=device)
        self.edges = [0]
        for plan in plans:
            self.edges.append(self.edges[-1] + plan.elements)

    def of_a(self, place: int) -> Tensor:
        """Where A's partial sums go, [SPLITS, r each span * k, ...]."""
        return self.partial[:, self.edges[place] :]

    def of_b(self, place: int, plan: Plan) -> Tensor:
        """Where B's go, [SPLITS, span after span, ...]."""
        return self.partial[:, self.edges[place] + plan.rank * len(plan.spans) * plan.k :]

    def add_a(self, place: int, plan: Plan, x: Rows, dh: Tensor, drop: Drop | None = None) -> None:
        """A's of the plan at `place`: x rows of k from the forward, dh [T, C]."""
        if drop is not None:
            gradient(x, dh, plan.rank, drop, self.of_a(place)[:, : plan.rank * len(plan.spans) * plan.k])
        elif plan.spans:
            small = dh[:, : plan.rank * len(plan.spans)]
            _gradient(x.values, x.scale, small, small.shape[1], self.of_a(place), (plan.k, 1), 1.0)

    def add_b(self, place: int, plan: Plan, dy: Rows, h: Tensor) -> None:
        """B's: dy rows of n, h [T, C] from the forward."""
        rank, out = plan.rank, self.of_b(place, plan)
        ends = [0, *(span.stop for span in plan.spans)]
        starts = [span.start for span in plan.spans]
        if starts == ends[:-1] and len(starts) <= 3 and all(start % 128 == 0 for start in starts):
            _gradient(dy.values[:, : ends[-1]], dy.scale, h, rank, out, (1, rank), plan.scale, tuple(starts[1:]))
            return
        for span in plan.spans:
            part, small = dy.values[:, span.start : span.stop], h[:, span.column : span.column + rank]
            _gradient(part, dy.scale, small, rank, out, (1, rank), plan.scale)
            out = out[:, rank * (span.stop - span.start) :]

    def sums(self, plans: Sequence[Plan]) -> list[Tensor]:
        """A's and B's gradient of every span of every plan, fp32."""
        flat = self.partial.sum(0)
        found: list[Tensor] = []
        for plan, at in zip(plans, self.edges, strict=False):
            top = at + plan.rank * len(plan.spans) * plan.k
            for i, span in enumerate(plan.spans):
                start = at + i * plan.rank * plan.k
                rows = span.stop - span.start
                found.append(flat[start : start + plan.rank * plan.k].view(plan.rank, plan.k))
                found.append(flat[top : top + rows * plan.rank].view(rows, plan.rank))
                top += rows * plan.rank
        return found


def up_and_gradient(operand: Wide | Float8, dy: Rows, h: Tensor, sums: Gradients, place: int) -> Tensor:
    """operand.up(dy), and B's gradient into `sums`: in one pass over dy where its parts allow."""
    plan = operand.plan
    if isinstance(operand, Wide) and by_triton(h) and _tiles(plan):
        edges, dh = tuple(span.start for span in plan.spans[1:]), dy.data[:, plan.n : plan.n + plan.columns]
        b, out = operand.whole[: plan.n, plan.k : plan.k + plan.columns], sums.of_b(place, plan)
        triton_kernels.up_gradient(dy.values, h, b, plan.rank, edges, dh, out, plan.scale)
        return dh
    sums.add_b(place, plan, dy, h)  # first: for large adapters the other rounds dy's numbers
    return operand.up(dy)


def _tiles(plan: Plan) -> bool:
    """Whether the adapted parts are the whole layer, at most three of them, with edges that `up_gradient` can take."""
    edges = (0, *(span.stop for span in plan.spans))
    whole = edges[:-1] == tuple(span.start for span in plan.spans) and edges[-1] == plan.n and len(plan.spans) <= 3
    return whole and plan.columns == plan.rank * len(plan.spans) and not any(e % triton_kernels.UP_EDGE for e in edges)


def _gradient(
    x: Tensor,
    scale: Tensor | None,
    h: Tensor,
    rank: int,
    out: Tensor,
    strides: tuple[int, int],
    factor: float,
    edges: tuple[int, ...] = (),
) -> None:
    """Partial sums of factor * h^T x into out [SPLITS, ...], element (r, n) at `strides`.

    From each of `edges` on, columns of x meet the next `rank` columns of h.
    """
    if by_triton(x):
        triton_kernels.gradient(x, scale, h, rank, out, strides, factor, edges)
        return
    values = x.float() if scale is None else x.float() * scale[:, None]
    starts = (0, *edges, x.shape[1])
    parts = [h[:, i * rank : (i + 1) * rank].float().t() @ values[:, a:b] for i, (a, b) in enumerate(pairwise(starts))]
    out[0].as_strided((rank, x.shape[1]), strides, out[0].storage_offset()).copy_(factor * torch.cat(parts, 1))
    for split in range(1, out.shape[0]):
        out[split].as_strided((rank, x.shape[1]), strides, out[split].storage_offset()).zero_()
