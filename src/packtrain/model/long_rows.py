"""Fused layers over rows so long that what is between two products must never exist in whole.

    LongLayer       a fused layer that goes over pieces of rows once a micro-batch has more than LONG tokens
    pieces          those pieces
    working_bytes   what one such layer takes beside what is kept

All of a layer but attention belongs to one row of the stream, so that its two halves run piece by piece: gate_up's
output, 22 GiB of 400,000 tokens of an 8B model, is never there. In whole exist the stream, q with k and v, attention's
output, and the gradients of these (that of q, k and v over q, k and v). The backward makes the layer again, its second
half just before it goes back through each piece, so that no piece is kept. What learns is summed over pieces in fp32.

The stream is one tensor here: the sum is rounded as the next norm would round it. A layer that keeps everything
(recompute none) has no use for pieces and takes the usual form.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from packtrain.batch import Batch
from packtrain.kernels import rows
from packtrain.kernels.adapter_gradients import Gradients
from packtrain.kernels.attend import AttendedLong, attend_long, attend_long_backward
from packtrain.kernels.attend import groups as head_groups
from packtrain.kernels.lowrank import Float8, Wide
from packtrain.kernels.operations import again
from packtrain.model.fast_layer import FastLayer, Operands, Stream, Sums, heads
from packtrain.model.kept import Kept

LONG = 65_536
"""Tokens of a micro-batch beyond which layers go in pieces."""
PIECE = 16_384
"""Rows of a piece: products are as fast as whole ones from some 8,192 on."""

Place = tuple[Tensor, Tensor, Batch]
"""Rope's tables and the batch."""


def pieces(tokens: int) -> list[slice]:
    """[0, tokens) in pieces."""
    return [slice(start, min(start + PIECE, tokens)) for start in range(0, tokens, PIECE)]


def working_bytes(config: Any, size: int, tokens: int, whole_layer: int) -> int:
    """Bytes that a layer's backward takes at most: `size` an element, `whole_layer` a token of one kept in whole."""
    width, head = int(config.hidden_size), int(config.head_dim)
    queries, keys = int(config.num_attention_heads) * head, int(config.num_key_value_heads) * head
    stand = size * (2 * width + 3 * queries + 2 * keys)
    attends = size * 4 * (queries + keys) + 4 * (queries + 2 * keys)
    parts = head_groups(config.num_attention_heads, config.num_key_value_heads, head, tokens)
    return tokens * stand + tokens * attends // parts + 2 * min(PIECE, tokens) * whole_layer


class LongLayer(FastLayer):
    """The fast form of one layer, of rows of any length."""

    __slots__ = ()

    def __call__(self, layer: Any, stream: Stream, rope: tuple[Tensor, Tensor], batch: Batch) -> Stream:
        """The residual stream after the layer: of long rows one tensor."""
        keeps_all = torch.is_grad_enabled() and (self.recompute == "none" or not layer.training)
        if batch.ids.numel() <= LONG or keeps_all:
            return super().__call__(layer, stream, rope, batch)
        x = stream if isinstance(stream, Tensor) else stream[0] + stream[1]
        cos, sin = (table.flatten(1) for table in rope)
        made = _LongLayer.apply(self, layer, cos, sin, batch, x, *self.learning(layer))  # type: ignore[no-untyped-call]
        return cast(Tensor, made)

    def projected_long(self, layer: Any, operands: Operands, x: Tensor, place: Place) -> Tensor:
        """q, k and v of all rows, turned by rope."""
        made = torch.empty(len(x), operands[0].plan.n, dtype=x.dtype, device=x.device)
        for piece in pieces(len(x)):
            some = _at(operands, piece)
            kept = self.before(layer, some[0], (x[piece], None))
            made[piece] = self.projected(layer, some[0], cast(rows.Rows, kept.y1), _place_at(place, piece))
        return made

    def after_long(self, layer: Any, operands: Operands, x: Tensor, out: Tensor) -> Tensor:
        """The stream after the layer, from that before it and attention's output."""
        made = torch.empty_like(x)
        for piece in pieces(len(x)):
            kept = self._with_mixed(x[piece], out[piece])
            last = self.after(layer, _at(operands, piece), kept, None)
            torch.add(cast(Tensor, kept.z2), cast(Tensor, last), out=made[piece])
        return made

    def backward_long(
        self, layer: Any, operands: Operands, place: Place, x: Tensor, known: AttendedLong | None, gradient: Tensor,
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """Gradients of the layer's input x [T, D] and of what learns; `known` is attention if it was kept."""
        with again():
            qkv = self.projected_long(layer, operands, x, place)
            attended = known or attend_long(*heads(layer, qkv), place[2])
        dz, mixed, after = self._after_backward_long(layer, operands, x, attended.out, gradient)
        mixed = mixed.view(len(x), -1, layer.self_attn.head_dim)
        attend_long_backward(mixed, *heads(layer, qkv), attended, place[2])
        del mixed, attended, known
        before = self._before_backward_long(layer, operands, place, x, qkv, dz, needs_input)
        return dz if needs_input else None, self._gradients(layer, after, before)

    def _after_backward_long(
        self, layer: Any, operands: Operands, x: Tensor, out: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, _Total]:
        """Back through the second half: gradients of the stream in its midst and of attention's output, and sums."""
        dz, mixed, total = torch.empty_like(x), torch.empty_like(out.flatten(1)), _Total(self, x.device)
        for piece in pieces(len(x)):
            some, known = _at(operands, piece), Kept(x[piece])
            with again():
                kept = self._with_mixed(x[piece], out[piece])
                self.after(layer, some, kept, known)
            both = gradient[piece], gradient[piece]
            dz[piece], mixed[piece], dnorm = self.after_backward(layer, some, kept, both, total.piece())
            total.add(dnorm)
        return dz, mixed, total

    def _before_backward_long(
        self, layer: Any, operands: Operands, place: Place, x: Tensor, dqkv: Tensor, dz: Tensor, needs_input: bool
    ) -> _Total:
        """Back through the first half: `dz` becomes the gradient of x."""
        total = _Total(self, x.device)
        for piece in pieces(len(x)):
            some = _at(operands, piece)
            with again():
                kept = self.before(layer, some[0], (x[piece], None))
            dy = self.turned_back(layer, dqkv[piece], _place_at(place, piece))
            made, dnorm = self.before_backward(layer, some, kept, dy, dz[piece], total.piece(), needs_input)
            dz[piece] = made
            self.shared.handed = None  # the layer before takes its gradient in pieces too
            total.add(dnorm)
        return total

    def _gradients(self, layer: Any, after: _Total, before: _Total) -> list[Tensor]:
        if not self.trains:
            return [one + other for one, other in zip(after.sums, before.sums, strict=True)]
        *weights, norm2 = after.sums
        first, norm1 = before.sums
        dtype = layer.input_layernorm.weight.dtype
        return [made.to(dtype) for made in (first, *weights[::-1], norm1, norm2)]

    def _with_mixed(self, x: Tensor, out: Tensor) -> Kept:
        return Kept(x, mixed=rows.copy(out.flatten(1), self.shared.form, self.plans[1].columns))


class _Total:
    """Gradients of what learns, fp32, summed over pieces: as `FastLayer.backward` finds them, then a norm's if any."""

    def __init__(self, form: FastLayer, device: torch.device) -> None:
        self._plans = form.plans
        self._partial = None if form.trains else Gradients(form.plans, device)
        if self._partial is not None:
            self._partial.partial.zero_()  # each half writes its own part only
        self._of_weights: list[Tensor] = []
        self.sums: list[Tensor] = []

    def piece(self) -> Sums:
        """Where the next piece's gradients are to go."""
        self._of_weights = []
        return self._of_weights if self._partial is None else self._partial

    def add(self, norm: Tensor | None) -> None:
        """Take in what the piece has left."""
        if self._partial is not None:
            found = self._partial.sums(self._plans)
        else:
            found = [gradient.float() for gradient in (*self._of_weights, cast(Tensor, norm))]
        if not self.sums:
            self.sums = found
        else:
            torch._foreach_add_(self.sums, found)


def _at(operands: Operands, piece: slice) -> Operands:
    """The four products for a piece of the rows: a dropout knows its tokens by their keys."""
    return [_of_rows(operand, piece) for operand in operands]


def _of_rows(operand: Wide | Float8, piece: slice) -> Wide | Float8:
    if operand.drop is None:
        return operand
    twin = copy(operand)
    twin.drop = replace(operand.drop, keys=operand.drop.keys[piece])
    return twin


def _place_at(place: Place, piece: slice) -> Place:
    return place[0][piece], place[1][piece], place[2]


class _LongLayer(torch.autograd.Function):
    """(form, layer, cos, sin, batch, x, what learns) -> x."""

    @staticmethod
    def forward(
        ctx: Any, form: LongLayer, layer: Any, cos: Tensor, sin: Tensor, batch: Batch, x: Tensor, *learning: Tensor
    ) -> Tensor:
        adapters = () if form.trains else learning
        operands = form.operands(layer, adapters, batch)
        qkv = form.projected_long(layer, operands, x, (cos, sin, batch))
        attended = attend_long(*heads(layer, qkv), batch, keep=False)
        del qkv
        if any(ctx.needs_input_grad):
            ctx.form, ctx.layer, ctx.batch = form, layer, batch
            keeps = form.recompute == "selective" and attended.lse is not None
            ctx.save_for_backward(cos, sin, x, *((attended.out, attended.lse) if keeps else (None, None)), *adapters)
        return form.after_long(layer, operands, x, attended.out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        form: LongLayer = ctx.form
        cos, sin, x, out, lse, *adapters = ctx.saved_tensors
        operands = form.operands(ctx.layer, adapters, ctx.batch, again=True)
        known = None if lse is None else AttendedLong(out, lse, [])
        dx, sums = form.backward_long(
            ctx.layer, operands, (cos, sin, ctx.batch), x, known, gradient, ctx.needs_input_grad[5]
        )
        return None, None, None, None, None, dx, *sums
