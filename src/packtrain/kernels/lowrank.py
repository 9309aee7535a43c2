"""A frozen linear layer's products with low-rank adapters inside them: no pass over the outputs adds the adapters.

    Plan                  one layer's shapes: its rows, which parts have an adapter, ranks
    Wide, Float8          the operand of a layer in 16 (or 32) bits, and in e4m3
    .down, .forward       h = x A^T, and y = x W^T + s h B^T as one product
    .up, .backward        dh = dy s B, and dx = dy W + dh A as one product
    Gradients             dA = dh^T x, dB = s dy^T h

The adapters of the parts stand side by side: C columns, r for each, rounded up to a multiple of 8 by zeros.

Wide: one matrix [W | s B] over [A | 0] serves both ways, [N, K + C] forward and [N + C, K] backward, and the rows that
go in carry h (dh) in the columns beside their values. In the part of s B that belongs to another adapter's rows are
zeros, so that adapters do not meet.

Float8: h and s B (dh and A) go as two e4m3 each, hi + lo, in 3 C columns (hi, lo, hi against hi, hi, lo): about the
precision of bf16. The backward's operand is the transposed matrix, since Hopper multiplies float8 only along
contiguous axes: it is kept where memory allows, else made for each use. x A^T itself is a float8 product with A as hi
and lo rows. `factor` moves a power of the scale from the columns of s B to those of h: fresh adapters are small.

LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from packtrain.kernels import float8
from packtrain.kernels.rows import HAS_TRITON, INTERPRETED, Form, Rows, by_triton

if HAS_TRITON and (torch.cuda.is_available() or INTERPRETED):
    from packtrain.kernels import lowrank_triton as triton_kernels

SPLITS = 8
"""Parts of the token axis in which gradients of adapters are summed: always the same, so the sum is."""

SKINNY_TOP = 224.0
FACTOR_MOST = 16.0


class Span(NamedTuple):
    """A part with an adapter: rows [start, stop) of the layer, and the first of the adapter's columns."""

    start: int
    stop: int
    column: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A linear layer [n, k] with adapters of one rank on some of its parts."""

    n: int
    k: int
    spans: tuple[Span, ...]
    rank: int
    scale: float
    """s, what an adapter's output is multiplied by."""

    @property
    def columns(self) -> int:
        """C: the adapters' columns with their padding."""
        return -(-self.rank * len(self.spans) // 8) * 8

    @property
    def elements(self) -> int:
        """Numbers in all its adapters."""
        return sum(self.rank * (self.k + span.stop - span.start) for span in self.spans)


Adapters = Sequence[tuple[Tensor, Tensor]]
"""(A fp32 [r, k], B fp32 [rows, r]) of each span."""


def storage(plan: Plan, form: Form, device: torch.device) -> Tensor:
    """Memory for a layer's weight with its columns, zero beside the weight, which is its [:n, :k]."""
    if form.float8:
        whole = torch.empty(plan.n, form.width(plan.k, plan.columns), dtype=float8.E4M3, device=device)
    else:
        width = form.width(plan.k, plan.columns)
        whole = torch.empty(plan.n + plan.columns, width, dtype=form.dtype, device=device)
        whole[plan.n :].zero_()
    _bytes(whole)[:, plan.k :].zero_()
    return whole


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == float8.E4M3 else x


def _whole(weight: Tensor, plan: Plan, form: Form) -> Tensor:
    """The storage a weight is a view of; a weight gathered without its columns is copied into one."""
    weight = weight.detach()
    shape = plan.n + (0 if form.float8 else plan.columns), form.width(plan.k, plan.columns)
    room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if weight.stride() == (shape[1], 1) and room >= shape[0] * shape[1]:
        return weight.as_strided(shape, weight.stride())
    whole = storage(plan, form, weight.device)
    _bytes(whole)[: plan.n, : plan.k].copy_(_bytes(weight))
    return whole


class Wide:
    """[W | s B] over [A | 0] in the dtype of W."""

    def __init__(self, plan: Plan, form: Form, weight: Tensor, adapters: Adapters) -> None:
        self.plan = plan
        self.whole = _whole(weight, plan, form)
        for span, (a, b) in zip(plan.spans, adapters, strict=True):
            row = plan.n + span.column
            if by_triton(weight):
                triton_kernels.pack16(a, b, self.whole, row, span.start, plan.k + span.column, plan.scale)
                continue
            self.whole[row : row + plan.rank, : plan.k] = a
            at = plan.k + span.column
            self.whole[span.start : span.stop, at : at + plan.rank] = plan.scale * b

    def down(self, x: Rows) -> Tensor:
        """x A^T [T, C], a view of x's own columns, which it fills."""
        plan = self.plan
        h = x.data[:, plan.k : plan.k + plan.columns]
        return torch.mm(x.values, self.whole[plan.n :, : plan.k].t(), out=h) if plan.columns else h

    def forward(self, x: Rows) -> Tensor:
        """x W^T + s h B^T [T, n]; `down` comes first."""
        plan = self.plan
        width = plan.k + plan.columns
        return x.data[:, :width] @ self.whole[: plan.n, :width].t()

    def up(self, dy: Rows) -> Tensor:
        """dy s B [T, C], a view of dy's own columns, which it fills."""
        plan = self.plan
        dh = dy.data[:, plan.n : plan.n + plan.columns]
        return torch.mm(dy.values, self.whole[: plan.n, plan.k : plan.k + plan.columns], out=dh) if plan.columns else dh

    def backward(self, dy: Rows) -> Tensor:
        """dy W + dh A [T, k]; `up` comes first."""
        plan = self.plan
        rows = plan.n + plan.columns
        return dy.data[:, :rows] @ self.whole[:rows, : plan.k]


class Scratch:
    """Memory that float8 layers of one plan share, zero where nobody writes."""

    def __init__(self, plan: Plan, form: Form, device: torch.device) -> None:
        c = plan.columns
        self.transposed: Tensor | None = None
        self.shape = plan.k, form.width(plan.n, c)
        self.skinny = tuple(_zeros8(2 * c, form.width(values, c), device) for values in (plan.k, plan.n))
        self.skinny_scale = torch.ones(2 * c, device=device)
        self.factor = torch.ones(c, device=device)
        self.ones = torch.ones(0, device=device)
        self.device = device

    def ones_like(self, scale: Tensor) -> Tensor:
        """fp32 ones of a length, made once."""
        if self.ones.shape != scale.shape:
            self.ones = torch.ones_like(scale)
        return self.ones

    def turned(self) -> Tensor:
        """For a transposed weight, made when first asked for."""
        if self.transposed is None:
            self.transposed = _zeros8(*self.shape, self.device)
        return self.transposed


def _zeros8(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.uint8, device=device).view(float8.E4M3)


class Float8:
    """W in e4m3 with one scale, and what its adapters add.

    The scale is fp32 and stands max(n, k) times, for a product wants it for each row. `transposed` is W^T's storage if
    it is kept.
    """

    def __init__(
        self,
        plan: Plan,
        form: Form,
        weight: Tensor,
        scale: Tensor,
        adapters: Adapters,
        tops: Sequence[tuple[Tensor, Tensor]],
        scratch: Scratch,
        transposed: Tensor | None,
    ) -> None:
        """`tops` are the largest magnitudes, 0-dim, of each adapter's A and B."""
        self.plan, self.form, self.weight, self.scale = plan, form, weight, scale
        self.adapters, self.tops, self.scratch, self.transposed = adapters, tops, scratch, transposed

    def down(self, x: Rows) -> Tensor:
        """x A^T [T, C] in the compute dtype; fills x's own columns."""
        plan = self.plan
        self.whole = _whole(self.weight, plan, self.form)
        for span, (a, b), (top_a, top_b) in zip(plan.spans, self.adapters, self.tops, strict=True):
            self._pack(self.whole, 0, b, a, (top_b, top_a), (plan.scale, 1.0), (span.start, 0, span.column), plan.k)
        return self._skinny(x, 0)

    def forward(self, x: Rows) -> Tensor:
        """x W^T + s h B^T [T, n]; `down` comes first."""
        return self._product(x, self.whole)

    def up(self, dy: Rows) -> Tensor:
        """dy s B [T, C] in the compute dtype; fills dy's own columns."""
        plan = self.plan
        turned = self.transposed
        if turned is None:
            turned = self.scratch.turned()
            transpose(self.weight.detach(), turned)
        self.whole = turned
        for span, (a, b), (top_a, top_b) in zip(plan.spans, self.adapters, self.tops, strict=True):
            places = (0, span.start, span.column)
            self._pack(self.whole, 1, a.t(), b.t(), (top_a, top_b), (1.0, plan.scale), places, plan.n)
        return self._skinny(dy, 1)

    def backward(self, dy: Rows) -> Tensor:
        """dy W + dh A [T, k]; `up` comes first."""
        return self._product(dy, self.whole)

    def _product(self, x: Rows, matrix: Tensor) -> Tensor:
        assert x.scale is not None
        return float8.product(x.data, matrix, x.scale, self.scale[: matrix.shape[0]], self.form.dtype)

    def _pack(
        self,
        matrix: Tensor,
        way: int,
        x: Tensor,
        y: Tensor,
        tops: tuple[Tensor, Tensor],
        scales: tuple[float, float],
        places: tuple[int, int, int],
        values: int,
    ) -> None:
        """x [n, r] into the matrix's columns, y [r, k] into the skinny rows."""
        scratch, c = self.scratch, self.plan.columns
        skinny = scratch.skinny[way]
        if by_triton(x):
            triton_kernels.pack8(
                x, y, tops, scales, self.scale, matrix, skinny, scratch.skinny_scale, scratch.factor, places, values
            )
            return
        xrow, yrow, column = places
        rank = slice(column, column + x.shape[1])
        scale = self.scale[:1]
        factor = (SKINNY_TOP * scale / (tops[0] * scales[0]).clamp(min=1e-30)).clamp(max=FACTOR_MOST)
        top = (tops[1] * scales[1]).clamp(min=1e-30) / SKINNY_TOP
        hi, lo = float8.split(x * (scales[0] * factor / scale))
        rows = matrix[xrow : xrow + x.shape[0], values:]
        for at, half in ((0, hi), (c, hi), (2 * c, lo)):
            rows[:, at + rank.start : at + rank.stop] = half
        hi, lo = float8.split(y * (scales[1] / top))
        for at, half in ((0, hi), (c, lo)):
            skinny[at + rank.start : at + rank.stop, yrow : yrow + y.shape[1]] = half
            scratch.skinny_scale[at + rank.start : at + rank.stop] = top
        scratch.factor[rank] = factor

    def _skinny(self, x: Rows, way: int) -> Tensor:
        """x's values times the skinny rows, [T, C]; x gets its columns."""
        c, count, scratch = self.plan.columns, x.data.shape[0], self.scratch
        assert x.scale is not None
        h = torch.empty(count, c, dtype=self.form.dtype, device=x.data.device)
        if c == 0:
            return h
        ones = scratch.ones_like(x.scale)
        o = float8.product(x.data, scratch.skinny[way], ones, scratch.skinny_scale, self.form.dtype)
        if by_triton(o):
            triton_kernels.split(o, x.scale, scratch.factor, h, x.data, x.columns)
            return h
        exact = o[:, :c].float() + o[:, c:].float()
        h.copy_(exact * x.scale[:, None])
        hi, lo = float8.split(exact / scratch.factor)
        for at, half in ((0, hi), (c, lo), (2 * c, hi)):
            x.data[:, x.columns + at : x.columns + at + c] = half
        return h


def transpose(weight: Tensor, to: Tensor) -> None:
    """to[:, :n] = weight^T, e4m3 [n, k] and [k, n or more]."""
    if by_triton(weight):
        triton_kernels.transpose(_bytes(weight), _bytes(to))
    else:
        _bytes(to)[:, : weight.shape[0]] = _bytes(weight).t()


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

    def add_a(self, place: int, plan: Plan, x: Rows, dh: Tensor) -> None:
        """A's of the plan at `place`: x rows of k from the forward, dh [T, C]."""
        if plan.spans:
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
