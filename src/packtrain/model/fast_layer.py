"""One decoder layer's fast form: its forward and its backward, written out over few kernels.

    FastLayer           called by a layer in place of its plain forward
    Shared              what the layers of a model have in common
    linears             a layer's four products

model/fast.py decides who takes it, and why it is faster. What learns is either the adapters of a frozen base or all of
a layer's own weights. Weights are read from their modules in the forward and again in the backward, so that sharding
may gather them for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from packtrain.batch import Batch
from packtrain.kernels import rows
from packtrain.kernels.adapter_gradients import Gradients, up_and_gradient
from packtrain.kernels.attend import Attended, attend, attend_backward
from packtrain.kernels.dropped import Drop
from packtrain.kernels.lowrank import Float8, Plan, Scratch, Wide, transpose
from packtrain.kernels.operations import again
from packtrain.kernels.rows import Form, Rows
from packtrain.model.linear import Linear

Recompute = Literal["none", "selective", "full"]
Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream [T, D], or two tensors whose sum it is."""


def linears(layer: Any) -> list[Linear]:
    """qkv, o, gate_up, down."""
    return [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]


@dataclass(slots=True)
class Shared:
    """What the layers of a model have in common."""

    form: Form
    keeps_transposed: bool
    scratch: dict[Plan, Scratch] = field(default_factory=dict)
    handed: tuple[Tensor, Rows] | None = None
    """A gradient on its way to the layer before, and the same as rows: both are made by one kernel."""

    def take(self, gradient: Tensor, columns: int) -> Rows:
        """A gradient as rows for a product with so many adapter columns."""
        handed, self.handed = self.handed, None
        width = self.form.width(gradient.shape[1], columns)
        if handed is not None and _same(handed[0], gradient) and handed[1].data.shape[1] == width:
            return handed[1]
        return rows.copy(gradient, self.form, columns)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one in memory; of fake ones the storages say so."""
    memory = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return memory and one.shape == other.shape and one.storage_offset() == other.storage_offset()


Operands = Sequence[Wide | Float8]


@dataclass(slots=True)
class _Kept:
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
    def unflat(cls, tensors: Sequence[Tensor | None], columns: Sequence[int | None]) -> _Kept:
        """`flat`, undone."""
        left = iter(tensors)
        values: list[Any] = [
            next(left) if count is None else Rows(cast(Tensor, next(left)), next(left), count) for count in columns
        ]
        return cls(*values)


@dataclass(slots=True)
class FastLayer:
    """The fast form of one layer."""

    shared: Shared
    plans: tuple[Plan, ...]
    """qkv, o, gate_up, down."""
    recompute: Recompute
    trains: bool = False
    """The layer's own weights learn: then it has no adapters."""
    names: tuple[tuple[str, ...], ...] = ((), (), (), ())
    """Hugging Face's, of the adapted parts of each product."""
    dropout: float = 0.0
    """The adapters'."""
    lasting: bool = False
    """Weights stay where they are between forward and backward: the model is not sharded."""
    transposed: list[Tensor | None] = field(default_factory=lambda: [None] * 4)

    def __call__(self, layer: Any, stream: Stream, rope: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The residual stream after the layer, as a pair."""
        x, delta = stream if isinstance(stream, tuple) else (stream, None)
        cos, sin = (t.flatten(1) for t in rope)
        learning = self._learning(layer)
        made = _Layer.apply(self, layer, cos, sin, batch, x, delta, *learning)  # type: ignore[no-untyped-call]
        return cast(tuple[Tensor, Tensor], made)

    def _learning(self, layer: Any) -> list[Tensor]:
        """A and B of each adapter; or the four weights and those of the two norms."""
        if self.trains:
            norms: list[Tensor] = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
            return [linear.weight for linear in linears(layer)] + norms
        return [
            cast(Tensor, parameter)
            for linear in linears(layer)
            for part in linear.parts
            if part.name in linear.adapters
            for parameter in (linear.adapters[part.name].lora_A, linear.adapters[part.name].lora_B)
        ]

    def operands(self, layer: Any, adapters: Sequence[Tensor], batch: Batch) -> Operands:
        """The four products of a layer, weights read now."""
        form = self.shared.form
        products = linears(layer)
        tops = _largest(adapters) if form.float8 else []
        pairs = list(zip(adapters[::2], adapters[1::2], strict=True))
        pairs_of_tops = list(zip(tops[::2], tops[1::2], strict=True))
        made: list[Wide | Float8] = []
        for i, (linear, plan) in enumerate(zip(products, self.plans, strict=True)):
            mine, pairs = pairs[: len(plan.spans)], pairs[len(plan.spans) :]
            dropping = self.dropout > 0 and layer.training and plan.spans
            drop = Drop(batch.keys.view(-1), self.names[i], self.dropout) if dropping else None
            if not form.float8:
                made.append(Wide(plan, form, linear.matrix(), mine, drop))
                continue
            their_tops, pairs_of_tops = pairs_of_tops[: len(plan.spans)], pairs_of_tops[len(plan.spans) :]
            scale = cast(Tensor, linear.weight_scale)
            made.append(
                Float8(
                    plan,
                    form,
                    linear.weight,
                    scale,
                    mine,
                    their_tops,
                    self._scratch(plan, scale),
                    self._turned(i, linear),
                    drop,
                )
            )
        return made

    def _scratch(self, plan: Plan, scale: Tensor) -> Scratch:
        shared = self.shared
        if plan not in shared.scratch:
            shared.scratch[plan] = Scratch(plan, shared.form, scale.device)
        return shared.scratch[plan]

    def _turned(self, place: int, linear: Linear) -> Tensor | None:
        """The transposed weight, if it is kept: made at its first use."""
        if not (self.shared.keeps_transposed and self.lasting):
            return None
        if self.transposed[place] is None:
            scratch = Scratch(self.plans[place], self.shared.form, linear.weight.device)
            transpose(linear.weight.detach(), scratch.turned())
            self.transposed[place] = scratch.turned()
        return self.transposed[place]

    def forward(
        self,
        layer: Any,
        operands: Operands,
        place: tuple[Tensor, Tensor, Batch],
        stream: tuple[Tensor, Tensor | None],
        attended: Attended | None,
        keep: bool,
        known: _Kept | None = None,
    ) -> tuple[_Kept, Tensor | None, Attended]:
        """The layer. If it is done again, some is `known`, attention too if given, and the last product left out."""
        form = self.shared.form
        qkv, output, gate_up, down = operands
        norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
        x, delta = stream
        if known is not None and known.y1 is not None:
            kept = _Kept(known.z1, rstd1=known.rstd1, y1=known.y1, h1=known.h1)
            qkv.pack()
        else:
            z1, rstd1, y1 = rows.add_norm(x, delta, norm1.weight, norm1.eps, form, qkv.plan.columns)
            kept = _Kept(z1, rstd1=rstd1, y1=y1, h1=qkv.down(y1))
        kept.qkv = self._turned_qkv(layer, qkv.forward(cast(Rows, kept.y1)), place)
        mixed, attended = self._attend(layer, kept.qkv, place[2], attended, keep)
        kept.out, kept.lse, kept.mixed = attended.out, attended.lse, mixed
        kept.h_out = output.down(mixed)
        z2 = None if known is None else known.z2
        x, delta = (kept.z1, output.forward(mixed)) if z2 is None else (z2, None)
        kept.z2, kept.rstd2, kept.y2 = rows.add_norm(x, delta, norm2.weight, norm2.eps, form, gate_up.plan.columns)
        kept.h2 = gate_up.down(kept.y2)
        kept.gate_up = gate_up.forward(kept.y2)
        kept.gated = rows.silu_mul(kept.gate_up, form, down.plan.columns)
        kept.h_down = down.down(kept.gated)
        return kept, None if known is not None else down.forward(kept.gated), attended

    def _turned_qkv(self, layer: Any, qkv: Tensor, place: tuple[Tensor, Tensor, Batch]) -> Tensor:
        head = layer.self_attn.head_dim
        q, k, _ = layer.self_attn.qkv_proj.parts
        rows.rope_(qkv, place[0], place[1], (q.stop + k.stop - k.start) // head)
        return qkv

    def _attend(
        self, layer: Any, qkv: Tensor, batch: Batch, attended: Attended | None, keep: bool
    ) -> tuple[Rows, Attended]:
        """Attention's output as rows; in 16 bits it is written into them."""
        form, plan = self.shared.form, self.plans[1]
        if form.float8 or attended is not None:
            attended = attended or attend(*heads(layer, qkv), batch, keep=keep)
            return rows.copy(attended.out.flatten(1), form, plan.columns), attended
        mixed = form.empty(qkv, qkv.shape[0], plan.k, plan.columns)
        attended = attend(
            *heads(layer, qkv), batch, out=mixed.values.view(len(qkv), -1, layer.self_attn.head_dim), keep=keep
        )
        return mixed, attended

    def backward(
        self,
        layer: Any,
        operands: Operands,
        place: tuple[Tensor, Tensor, Batch],
        kept: Any,
        attended: Attended,
        gradients: tuple[Tensor, Tensor],
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the stream's two tensors (they are one) and of what learns."""
        form, shared = self.shared.form, self.shared
        qkv, output, gate_up, down = operands
        norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
        sums: Gradients | list[Tensor] = [] if self.trains else Gradients(self.plans, kept.z1.device)

        dy = shared.take(gradients[1], down.plan.columns)
        _learn(sums, 3, down, dy, kept.gated, kept.h_down)
        kept.gated = None
        dy = rows.silu_mul_backward(kept.gate_up, down.backward(dy), form, gate_up.plan.columns)
        kept.gate_up = None
        _learn(sums, 2, gate_up, dy, kept.y2, kept.h2)
        dx, dnorm1 = gate_up.backward(dy), None
        dz, dy, dnorm2 = rows.norm_backward(
            dx, kept.z2, norm2.weight, kept.rstd2, gradients[0], form, output.plan.columns
        )
        _learn(sums, 1, output, dy, kept.mixed, kept.h_out)
        dy = self._attention_backward(layer, place, kept, attended, output.backward(dy))
        _learn(sums, 0, qkv, dy, kept.y1, kept.h1)
        if needs_input or self.trains:
            dx = qkv.backward(dy)
            dz, dy, dnorm1 = rows.norm_backward(dx, kept.z1, norm1.weight, kept.rstd1, dz, form, down.plan.columns)
            shared.handed = dz, dy
        if isinstance(sums, Gradients):
            return dz if needs_input else None, sums.sums(self.plans)
        norms = [cast(Tensor, made).to(norm1.weight.dtype) for made in (dnorm1, dnorm2)]
        return dz if needs_input else None, sums[::-1] + norms

    def _attention_backward(
        self, layer: Any, place: tuple[Tensor, Tensor, Batch], kept: Any, attended: Attended, gradient: Tensor
    ) -> Rows:
        cos, sin, batch = place
        head = layer.self_attn.head_dim
        q, k, _ = layer.self_attn.qkv_proj.parts
        dqkv = torch.empty_like(kept.qkv)
        attend_backward(
            gradient.view(len(gradient), -1, head), *heads(layer, kept.qkv), attended, batch, heads(layer, dqkv)
        )
        return rows.rope_backward(
            dqkv, cos, sin, (q.stop + k.stop - k.start) // head, self.shared.form, self.plans[0].columns
        )


def _learn(sums: Gradients | list[Tensor], place: int, operand: Wide | Float8, dy: Rows, x: Rows, h: Tensor) -> None:
    """The gradients of one product's adapters, or of its weight, into `sums`; dy is ready for `backward` then."""
    if not isinstance(sums, Gradients):
        sums.append(dy.values.t() @ x.values)
        return
    dh = up_and_gradient(operand, dy, h, sums, place)
    sums.add_a(place, operand.plan, x, dh, operand.drop)


def heads(layer: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, H, d] of [T, rows of qkv_proj], views."""
    attention = layer.self_attn
    sizes = [part.stop - part.start for part in attention.qkv_proj.parts]
    q, k, v = (part.view(len(qkv), -1, attention.head_dim) for part in torch.split(qkv, sizes, dim=1))
    return q, k, v


def _largest(adapters: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitude in each, 0-dim, by one kernel for all."""
    if not adapters:
        return []
    return list(torch._foreach_norm([adapter.detach() for adapter in adapters], float("inf")))


def _few(kept: _Kept, form: Form) -> _Kept:
    """What selective recomputation keeps: attention, if it can go back without its graph, and both norms' inputs.

    And what is small beside what it saves: the first norm's output where it has 8 bits.
    """
    few = _Kept(kept.z1, z2=kept.z2)
    if form.float8:
        few.rstd1, few.y1, few.h1 = kept.rstd1, kept.y1, kept.h1
    if kept.lse is not None:
        few.out, few.lse = kept.out, kept.lse
    return few


class _Layer(torch.autograd.Function):
    """(form, layer, cos, sin, batch, x, delta, what learns) -> (x, delta)."""

    @staticmethod
    def forward(
        ctx: Any, form: FastLayer, layer: Any, cos: Tensor, sin: Tensor, batch: Batch,
        x: Tensor, delta: Tensor | None, *learning: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        adapters = () if form.trains else learning
        operands = form.operands(layer, adapters, batch)
        recompute = form.recompute if layer.training else "none"
        kept, last, attended = form.forward(
            layer, operands, (cos, sin, batch), (x, delta), None, keep and recompute == "none"
        )
        assert kept.z2 is not None
        assert last is not None
        out = kept.z2
        if keep:
            ctx.form, ctx.layer, ctx.batch, ctx.recompute = form, layer, batch, recompute
            ctx.graph = attended.graph
            if recompute != "none":
                kept = _few(kept, form.shared.form) if recompute == "selective" else _Kept(kept.z1)
            ctx.operands = operands if recompute == "none" and form.lasting else None
            tensors, ctx.columns = kept.flat()
            ctx.save_for_backward(cos, sin, *adapters, *tensors)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, ddelta: Tensor) -> tuple[Tensor | None, ...]:
        form: FastLayer = ctx.form
        count = 2 * sum(len(plan.spans) for plan in form.plans)
        cos, sin, *left = ctx.saved_tensors
        adapters, kept = left[:count], _Kept.unflat(left[count:], ctx.columns)
        del left
        place = cos, sin, ctx.batch
        operands = ctx.operands or form.operands(ctx.layer, adapters, ctx.batch)
        attended = Attended(cast(Tensor, kept.out), kept.lse, ctx.graph)
        if ctx.recompute != "none":
            done = attended if kept.lse is not None else None
            with again():
                kept, _, attended = form.forward(ctx.layer, operands, place, (kept.z1, None), done, True, kept)
        ctx.graph = ctx.operands = None
        dx, sums = form.backward(
            ctx.layer, operands, place, kept, attended, (dz, ddelta), ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        )
        both = dx if ctx.needs_input_grad[5] else None, dx if ctx.needs_input_grad[6] else None
        return None, None, None, None, None, *both, *sums
