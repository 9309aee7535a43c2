"""What stands between a plain layer's products, in few passes, backwards written out.

    rms_norm        x over its root mean square, times a frozen weight
    swiglu          silu(gate) * up of one product
    turn            rotary embedding

Autograd's own form of each makes and reads more tensors, and puts the gradients of halves together by a copy.
kernels/rows.py has the same for layers that write out all of their backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x fp32 [T, D], weight fp32 [D], which gets no gradient -> fp32 [T, D]."""
    return cast(Tensor, _Norm.apply(x, weight, eps))  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = x.square().mean(1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        g = gradient * weight
        share = (g * x).mean(1, keepdim=True).mul_(rstd.square()).neg_()
        return g.addcmul_(x, share).mul_(rstd), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 F], gate and then up -> silu(gate) * up [T, F]."""
    return cast(Tensor, _SwiGLU.apply(gate_up))  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        silu = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, 1)
        made = torch.empty_like(gate_up)
        by_gate, by_up = made.chunk(2, 1)
        torch.mul(gradient, silu, out=by_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=by_gate)
        return made


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, d] with its pairs (i, i + d / 2) turned by cos, sin [T, 1, d / 2] -> [T, H, d], contiguous."""
    return cast(Tensor, _Turn.apply(x, cos, sin))  # type: ignore[no-untyped-call]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (low, high) = x.chunk(2, -1), out.chunk(2, -1)
    # Not one operation that rounds once: transformers rounds each product.
    torch.mul(first, cos, out=low).sub_(second * sin)
    torch.mul(second, cos, out=high).add_(first * sin)
    return out
