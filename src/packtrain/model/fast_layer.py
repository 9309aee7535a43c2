"""One decoder layer's fast form: its forward and its backward, written out over few kernels.

    FastLayer           called by a layer in place of its plain forward

model/fast.py decides who takes it, and why it is faster. What learns is either the adapters of a frozen base or all of
a layer's own weights. Weights are read from their modules in the forward and again in the backward, so that sharding
may gather them for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from packtrain.kernels.rows import Form, Raw, Rows
from packtrain.model.kept import Kept
from packtrain.model.linear import Linear
from packtrain.model.shared import Packed, Shared, largest, linears, of_products

Recompute = Literal["none", "selective", "full", "offload"]
"""What a backward computes again; with offload whole layers, whose inputs wait on the host (model/offload.py)."""
Stream = Tensor | tuple[Tensor, Tensor]
"""The residual stream [T, D], or two tensors whose sum it is."""


def _where_they_are(layer: Any) -> list[Tensor]:
    return [linear.matrix() for linear in linears(layer)]


Operands = Sequence[Wide | Float8]
Sums = Gradients | list[Tensor]
"""Where gradients of what learns go: of adapters, or of the four weights, the last one first."""


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
    number: int | None = None
    """Its place in `shared.layers`."""
    transposed: list[Tensor | None] = field(default_factory=lambda: [None] * 4)
    weights: Callable[[Any], Sequence[Tensor]] = _where_they_are
    """The layer -> its four weights on the device; if they are copied there they are good until the next layer's."""

    def __call__(self, layer: Any, stream: Stream, rope: tuple[Tensor, Tensor], batch: Batch) -> Stream:
        """The residual stream after the layer, as a pair."""
        x, delta = stream if isinstance(stream, tuple) else (stream, None)
        cos, sin = (t.flatten(1) for t in rope)
        learning = self.learning(layer)
        made = _Layer.apply(self, layer, cos, sin, batch, x, delta, *learning)  # type: ignore[no-untyped-call]
        return cast(tuple[Tensor, Tensor], made)

    def learning(self, layer: Any) -> list[Tensor]:
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

    def operands(self, layer: Any, adapters: Sequence[Tensor], batch: Batch, again: bool = False) -> Operands:
        """The four products of a layer, weights read now; in a backward they are made `again`."""
        form, number = self.shared.form, self.number
        if number == 0 and not again:
            self.shared.look()
        tops: Sequence[Tensor] = ()
        packed: Sequence[Packed] | None = None
        if form.float8 and number is not None:
            tops, packed = self.shared.tops[number], self.shared.packed[number]
        elif form.float8:
            tops = largest(adapters)
        pairs, pairs_of_tops = of_products(self.plans, adapters), of_products(self.plans, tops)
        made: list[Wide | Float8] = []
        products = zip(linears(layer), self.weights(layer), self.plans, strict=True)
        for i, (linear, weight, plan) in enumerate(products):
            dropping = self.dropout > 0 and layer.training and plan.spans
            drop = Drop(batch.keys.view(-1), self.names[i], self.dropout) if dropping else None
            if not form.float8:
                made.append(Wide(plan, form, weight, pairs[i], drop))
                continue
            scale, small = cast(Tensor, linear.weight_scale), (None, None) if packed is None else packed[i]
            scratch, turned = self.scratch(plan, scale), self.turned(i, linear)
            made.append(Float8(plan, form, weight, scale, pairs[i], pairs_of_tops[i], scratch, turned, drop, small))
        return made

    def scratch(self, plan: Plan, scale: Tensor) -> Scratch:
        """Memory for a plan's products, which layers share."""
        shared = self.shared
        if plan not in shared.scratch:
            shared.scratch[plan] = Scratch(plan, shared.form, scale.device)
        return shared.scratch[plan]

    def turned(self, place: int, linear: Linear) -> Tensor | None:
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
        known: Kept | None = None,
    ) -> tuple[Kept, Tensor | None, Attended]:
        """The layer. If it is done again, some is `known`, attention too if given, and the last product left out."""
        kept = self.before(layer, operands[0], stream, known)
        kept.qkv = self.projected(layer, operands[0], cast(Rows, kept.y1), place)
        kept.mixed, attended = self._attend(layer, kept.qkv, place[2], attended, keep)
        kept.out, kept.lse = attended.out, attended.lse
        return kept, self.after(layer, operands, kept, known), attended

    def before(
        self, layer: Any, qkv: Wide | Float8, stream: tuple[Tensor, Tensor | None], known: Kept | None = None
    ) -> Kept:
        """The first half, as far as it is row by row: the product's input."""
        norm = layer.input_layernorm
        if known is not None and known.y1 is not None:
            qkv.pack()
            return Kept(known.z1, rstd1=known.rstd1, y1=known.y1, h1=known.h1)
        x, delta = stream[0], None if stream[1] is None else Raw(stream[1])
        z1, rstd1, y1 = rows.add_norm(x, delta, norm.weight, norm.eps, self.shared.form, qkv.plan.columns)
        return Kept(z1, rstd1=rstd1, y1=y1, h1=qkv.down(y1))

    def after(self, layer: Any, operands: Operands, kept: Kept, known: Kept | None) -> Tensor | None:
        """The second half, from attention's output as rows; its last product unless it is done again."""
        form, norm, mixed = self.shared.form, layer.post_attention_layernorm, cast(Rows, kept.mixed)
        _, output, gate_up, down = operands
        kept.h_out = output.down(mixed)
        z2 = None if known is None else known.z2
        x, delta = (kept.z1, output.raw_forward(mixed)) if z2 is None else (z2, None)
        kept.z2, kept.rstd2, kept.y2 = rows.add_norm(x, delta, norm.weight, norm.eps, form, gate_up.plan.columns)
        kept.h2 = gate_up.down(kept.y2)
        made = gate_up.raw_forward(kept.y2)
        kept.gate_up = made.values
        kept.gated = rows.silu_mul(made, form, down.plan.columns)
        kept.h_down = down.down(kept.gated)
        return None if known is not None else down.forward(kept.gated)

    def projected(self, layer: Any, qkv: Wide | Float8, y: Rows, place: tuple[Tensor, Tensor, Batch]) -> Tensor:
        """q, k and v of the first half's rows, turned by rope."""
        made = qkv.forward(y)
        rows.rope_(made, place[0], place[1], self._turning(layer))
        return made

    def _turning(self, layer: Any) -> int:
        """Heads that rope turns: queries' and keys'."""
        q, k, _ = layer.self_attn.qkv_proj.parts
        return int((q.stop + k.stop - k.start) // layer.self_attn.head_dim)

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
        sums: Sums = [] if self.trains else Gradients(self.plans, kept.z1.device)
        dz, mixed, dnorm2 = self.after_backward(layer, operands, kept, gradients, sums)
        dy = self.turned_back(layer, self._attention_backward(layer, place, kept, attended, mixed), place)
        del mixed
        dz, dnorm1 = self.before_backward(layer, operands, kept, dy, dz, sums, needs_input)
        if isinstance(sums, Gradients):
            return dz if needs_input else None, sums.sums(self.plans)
        norms = [cast(Tensor, made).to(layer.input_layernorm.weight.dtype) for made in (dnorm1, dnorm2)]
        return dz if needs_input else None, sums[::-1] + norms

    def after_backward(
        self, layer: Any, operands: Operands, kept: Any, gradients: tuple[Tensor, Tensor], sums: Sums
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Back through the second half: gradients of the stream in its midst, of attention's output, of the norm."""
        form, norm = self.shared.form, layer.post_attention_layernorm
        _, output, gate_up, down = operands
        dy = self.shared.take(gradients[1], down.plan.columns)
        _learn(sums, 3, down, dy, kept.gated, kept.h_down)
        kept.gated = None
        made = Raw(kept.gate_up, kept.y2.scale)  # as `after` left it
        dy = rows.silu_mul_backward(made, down.raw_backward(dy), form, gate_up.plan.columns)
        del made
        kept.gate_up = None
        _learn(sums, 2, gate_up, dy, kept.y2, kept.h2)
        dx = gate_up.raw_backward(dy)
        dz, dy, dnorm = rows.norm_backward(
            dx, kept.z2, norm.weight, kept.rstd2, gradients[0], form, output.plan.columns
        )
        _learn(sums, 1, output, dy, kept.mixed, kept.h_out)
        return dz, output.backward(dy), dnorm

    def before_backward(
        self, layer: Any, operands: Operands, kept: Any, dy: Rows, dz: Tensor, sums: Sums, needs_input: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Back through the first half, from dqkv as rows: gradients of the stream, and of the norm."""
        qkv, norm, shared = operands[0], layer.input_layernorm, self.shared
        _learn(sums, 0, qkv, dy, kept.y1, kept.h1)
        if not (needs_input or self.trains):
            return dz, None
        dx, columns = qkv.raw_backward(dy), operands[3].plan.columns
        dz, dy, dnorm = rows.norm_backward(dx, kept.z1, norm.weight, kept.rstd1, dz, shared.form, columns)
        shared.handed = dz, dy
        return dz, dnorm

    def _attention_backward(
        self, layer: Any, place: tuple[Tensor, Tensor, Batch], kept: Any, attended: Attended, gradient: Tensor
    ) -> Tensor:
        dqkv, qkv = torch.empty_like(kept.qkv), heads(layer, kept.qkv)
        gradient = gradient.view(len(gradient), -1, layer.self_attn.head_dim)
        attend_backward(gradient, *qkv, attended, place[2], heads(layer, dqkv))
        return dqkv

    def turned_back(self, layer: Any, dqkv: Tensor, place: tuple[Tensor, Tensor, Batch]) -> Rows:
        """The gradient of q, k and v before rope, as rows."""
        columns = self.plans[0].columns
        return rows.rope_backward(dqkv, place[0], place[1], self._turning(layer), self.shared.form, columns)


def _learn(sums: Sums, place: int, operand: Wide | Float8, dy: Rows, x: Rows, h: Tensor) -> None:
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


def _few(kept: Kept, form: Form) -> Kept:
    """What selective recomputation keeps: attention, if it can go back without its graph, and both norms' inputs.

    And what is small beside what it saves: the first norm's output where it has 8 bits.
    """
    few = Kept(kept.z1, z2=kept.z2)
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
                kept = _few(kept, form.shared.form) if recompute == "selective" else Kept(kept.z1)
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
        adapters, kept = left[:count], Kept.unflat(left[count:], ctx.columns)
        del left
        place = cos, sin, ctx.batch
        operands = ctx.operands or form.operands(ctx.layer, adapters, ctx.batch, again=True)
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
