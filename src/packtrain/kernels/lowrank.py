"""A frozen linear layer's products with low-rank adapters inside them: no pass over the outputs adds the adapters.

    Plan                  one layer's shapes: its rows, which parts have an adapter, ranks
    Wide, Float8          the operand of a layer in 16 (or 32) bits, and in e4m3
    .down, .forward       h = x A^T, and y = x W^T + s h B^T as one product
    .up, .backward        dh = dy s B, and dx = dy W + dh A as one product

kernels/adapter_gradients.py has the adapters' own gradients.

The adapters of the parts stand side by side: C columns, r for each, rounded up to a multiple of 8 by zeros.

Wide: one matrix [W | s B] over [A | 0] serves both ways, [N, K + C] forward and [N + C, K] backward, and the rows that
go in carry h (dh) in the columns beside their values. In the part of s B that belongs to another adapter's rows are
zeros, so that adapters do not meet.

Float8: h and s B (dh and A) go as two e4m3 each, hi + lo, in 3 C columns (hi, lo, hi against hi, hi, lo): about the
precision of bf16. The backward's operand is the transposed matrix, since Hopper multiplies float8 only along
contiguous axes: it is kept where memory allows, else made for each use. x A^T itself is a float8 product with A as hi
and lo rows. `factor` moves a power of the scale from the columns of s B to those of h: fresh adapters are small, and
large ones make a large h. Where h is beyond e4m3 all the same, the row's scale grows by a power of two, and its values
shrink: what the output loses of them is nothing beside the adapters' part. From `GROWN_MOST` on (the adapters' output
is thousands of times the base's) A's gradient would lose too much as well: h, and with it a gradient, is NaN then.

kernels/packs.py puts adapters in these places: for each product, or for all of a model's before its forward.

With a dropout A's input is not x (kernels/dropped.py): h is a product of its own, B's columns stay where they are, and
dx is the product without A's columns, to which dropout(dh A) is added.

LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from packtrain.kernels import dropped, float8
from packtrain.kernels.packs import Columns8, Columns16, Pairs, Place8, Place16, Skinny
from packtrain.kernels.rows import RUNS_TRITON, Form, Raw, Rows, by_triton

if RUNS_TRITON:
    from packtrain.kernels import lowrank_triton as triton_kernels

SHRUNK = 2.0**12
"""Small products come out by so much smaller: of numbers up to 448 they would be beyond what fp16 holds."""
GROWN_MOST = 512.0
"""A row's scale may grow so much: its e4m3 values, of 28 at first, then have lost 2 % of their norm."""


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


Adapters = Pairs
"""(A fp32 [r, k], B fp32 [rows, r]) of each span."""


def stored(plan: Plan, form: Form) -> tuple[int, int]:
    """Rows and columns of a weight's memory with the adapters' columns."""
    return plan.n + (0 if form.float8 else plan.columns), form.width(plan.k, plan.columns)


def storage(plan: Plan, form: Form, device: torch.device) -> Tensor:
    """Memory for a layer's weight with its columns, zero beside the weight, which is its [:n, :k]."""
    whole = torch.empty(stored(plan, form), dtype=float8.E4M3 if form.float8 else form.dtype, device=device)
    _bytes(whole)[plan.n :].zero_()
    _bytes(whole)[:, plan.k :].zero_()
    return whole


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == float8.E4M3 else x


def _whole(weight: Tensor, plan: Plan, form: Form) -> Tensor:
    """The storage a weight is a view of; a weight gathered without its columns is copied into one."""
    weight = weight.detach()
    shape = stored(plan, form)
    room = weight.untyped_storage().nbytes() // weight.element_size() - weight.storage_offset()
    if weight.stride() == (shape[1], 1) and room >= shape[0] * shape[1]:
        return weight.as_strided(shape, weight.stride())
    whole = storage(plan, form, weight.device)
    _bytes(whole)[: plan.n, : plan.k].copy_(_bytes(weight))
    return whole


class Wide:
    """[W | s B] over [A | 0] in the dtype of W."""

    def __init__(
        self,
        plan: Plan,
        form: Form,
        weight: Tensor,
        adapters: Adapters,
        drop: dropped.Drop | None = None,
    ) -> None:
        self.plan, self.adapters, self.drop = plan, adapters, drop
        self.whole = _whole(weight, plan, form)
        places = [Place16(plan.n + span.column, span.start, plan.k + span.column) for span in plan.spans]
        Columns16(self.whole, adapters, places, plan.scale).pack()

    def pack(self) -> None:
        """As `Float8.pack`; it is done."""

    def down(self, x: Rows) -> Tensor:
        """x A^T [T, C], a view of x's own columns, which it fills."""
        plan = self.plan
        h = x.data[:, plan.k : plan.k + plan.columns]
        if self.drop is not None:
            dropped.down(x, [a for a, _ in self.adapters], self.drop, h)
            return h
        return torch.mm(x.values, self.whole[plan.n :, : plan.k].t(), out=h) if plan.columns else h

    def forward(self, x: Rows) -> Tensor:
        """x W^T + s h B^T [T, n]; `down` comes first."""
        plan = self.plan
        width = plan.k + plan.columns
        return x.data[:, :width] @ self.whole[: plan.n, :width].t()

    def raw_forward(self, x: Rows) -> Raw:
        """As `Float8.raw_forward`: there are no scales."""
        return Raw(self.forward(x))

    def up(self, dy: Rows) -> Tensor:
        """dy s B [T, C], a view of dy's own columns, which it fills."""
        plan = self.plan
        dh = dy.data[:, plan.n : plan.n + plan.columns]
        return torch.mm(dy.values, self.whole[: plan.n, plan.k : plan.k + plan.columns], out=dh) if plan.columns else dh

    def backward(self, dy: Rows) -> Tensor:
        """dy W + dh A [T, k]; `up` comes first."""
        plan = self.plan
        if self.drop is not None:
            dx = dy.values @ self.whole[: plan.n, : plan.k]
            dropped.add_up(dx, dy.data[:, plan.n :], [a for a, _ in self.adapters], self.drop)
            return dx
        rows = plan.n + plan.columns
        return dy.data[:, :rows] @ self.whole[:rows, : plan.k]

    def raw_backward(self, dy: Rows) -> Raw:
        """As `Float8.raw_backward`."""
        return Raw(self.backward(dy))


class Scratch:
    """Memory that float8 layers of one plan share, zero where nobody writes."""

    def __init__(self, plan: Plan, form: Form, device: torch.device) -> None:
        self.transposed: Tensor | None = None
        self.shape = plan.k, form.width(plan.n, plan.columns)
        self.skinny = skinny(plan, form, device, 0), skinny(plan, form, device, 1)
        self.one, self.shrinks = torch.ones(1, device=device), torch.full((1,), 1 / SHRUNK, device=device)
        self.device = device

    def turned(self) -> Tensor:
        """For a transposed weight, made when first asked for."""
        if self.transposed is None:
            self.transposed = torch.zeros(*self.shape, dtype=torch.uint8, device=self.device).view(float8.E4M3)
        return self.transposed


def skinny(plan: Plan, form: Form, device: torch.device, way: int) -> Skinny:
    """The small matrix of a float8 layer's forward (0) or backward (1)."""
    return Skinny.of(plan.columns, form.width((plan.k, plan.n)[way], plan.columns), device)


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
        drop: dropped.Drop | None = None,
        packed: Sequence[Skinny | None] = (None, None),
    ) -> None:
        """`tops` are the largest magnitudes, 0-dim, of each adapter's A and B.

        `packed` are the small matrices of forward and backward where adapters are in their places.
        """
        self.plan, self.form, self.weight, self.scale = plan, form, weight, scale
        self.adapters, self.tops, self.scratch, self.transposed = adapters, tops, scratch, transposed
        self.drop, self.packed = drop, packed

    def down(self, x: Rows) -> Tensor:
        """x A^T [T, C] in the compute dtype; fills x's own columns."""
        self.pack()
        return self._skinny(x, 0)

    def pack(self) -> None:
        """Put s B beside W: what `forward` needs of `down` for rows whose columns are filled."""
        self.whole = _whole(self.weight, self.plan, self.form)
        if self.packed[0] is None:
            self.columns(0, self.whole).pack()

    def columns(self, way: int, whole: Tensor) -> Columns8:
        """The adapters, and where they go in the forward (0) or the backward (1): into `whole`, W or W^T with room."""
        plan = self.plan
        if way == 0:
            pairs, tops = [(b, a) for a, b in self.adapters], [(b, a) for a, b in self.tops]
            places = [Place8(span.start, 0, span.column) for span in plan.spans]
            values, scales = plan.k, (plan.scale, 1.0)
        else:
            pairs, tops = [(a.t(), b.t()) for a, b in self.adapters], list(self.tops)
            places = [Place8(0, span.start, span.column) for span in plan.spans]
            values, scales = plan.n, (1.0, plan.scale)
        return Columns8(whole, self._small(way), pairs, tops, scales, self.scale, places, values)

    def _small(self, way: int) -> Skinny:
        return self.packed[way] or self.scratch.skinny[way]

    def forward(self, x: Rows) -> Tensor:
        """x W^T + s h B^T [T, n]; `down` comes first."""
        return self._product(x, self.whole)

    def raw_forward(self, x: Rows) -> Raw:
        """The same with the rows' scale still to come."""
        return self._raw(x, self.whole)

    def up(self, dy: Rows) -> Tensor:
        """dy s B [T, C] in the compute dtype; fills dy's own columns."""
        if self.transposed is None:
            self.whole = self.scratch.turned()
            transpose(self.weight.detach(), self.whole)
        else:
            self.whole = self.transposed
        if self.packed[1] is None:
            self.columns(1, self.whole).pack()
        self.dh = self._skinny(dy, 1)
        return self.dh

    def backward(self, dy: Rows) -> Tensor:
        """dy W + dh A [T, k]; `up` comes first."""
        dx = self._product(dy, self.whole)
        if self.drop is not None:
            dropped.add_up(dx, self.dh, [a for a, _ in self.adapters], self.drop)
        return dx

    def raw_backward(self, dy: Rows) -> Raw:
        """The same with the rows' scale still to come, unless something was added."""
        return self._raw(dy, self.whole) if self.drop is None else Raw(self.backward(dy))

    def _raw(self, x: Rows, matrix: Tensor) -> Raw:
        made = float8.raw_product(x.data, matrix, self.scratch.one, self.scale[:1], self.form.dtype)
        return Raw(made, x.scale)

    def _product(self, x: Rows, matrix: Tensor) -> Tensor:
        assert x.scale is not None
        return float8.product(x.data, matrix, x.scale, self.scale[: matrix.shape[0]], self.form.dtype)

    def _skinny(self, x: Rows, way: int) -> Tensor:
        """x's values times the skinny rows, [T, C]; x gets its columns. With a dropout, dy has none."""
        c, count, small = self.plan.columns, x.data.shape[0], self._small(way)
        assert x.scale is not None
        h = torch.empty(count, c, dtype=self.form.dtype, device=x.data.device)
        if c == 0:
            return h
        unit: Tensor | None = None
        if self.drop is not None and way == 0:
            o = h.new_zeros(count, 2 * c)
            dropped.down(x, [a for a, _ in self.adapters], self.drop, o[:, :c])
        else:
            unit, scratch = small.scale, self.scratch
            o = float8.raw_product(x.data, small.rows, scratch.one, scratch.shrinks, self.form.dtype)
        fills = self.drop is None or way == 0
        if by_triton(o):
            most = GROWN_MOST if way == 0 else math.inf
            to = x.data if fills else None
            triton_kernels.split(o, unit, SHRUNK, x.scale, small.factor, h, to, x.columns, most)
            return h
        exact = o[:, :c].float() + o[:, c:].float()
        if unit is not None:
            exact *= unit * SHRUNK
        h.copy_(exact * x.scale[:, None])
        if not fills:
            return h
        numbers, grown = _within(x, exact / small.factor)
        if way == 0:
            h.masked_fill_((grown > GROWN_MOST)[:, None], math.nan)
        hi, lo = float8.split(numbers)
        for at, half in ((0, hi), (c, lo), (2 * c, hi)):
            x.data[:, x.columns + at : x.columns + at + c] = half
        return h


def _within(x: Rows, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What x's columns are to hold, fp32 [T, C], and by how much [T] the scales grew of rows where it was too large."""
    assert x.scale is not None
    grown = torch.exp2(torch.log2(numbers.abs().amax(1) / float8.LIMIT).ceil().clamp(min=0))
    x.scale.mul_(grown)
    x.values.copy_(x.values.float() / grown[:, None])
    return numbers / grown[:, None], grown


def transpose(weight: Tensor, to: Tensor) -> None:
    """to[:, :n] = weight^T, e4m3 [n, k] and [k, n or more]."""
    if by_triton(weight):
        triton_kernels.transpose(_bytes(weight), _bytes(to))
    else:
        _bytes(to)[:, : weight.shape[0]] = _bytes(weight).t()
