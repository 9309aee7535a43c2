"""x W^T by the fastest product that the machine has.

    linear(x, weight, bias)       torch's linear, with its gradients
    times(x, weight)              the product alone, for those who write out their own backward

In fp32 on a CPU torch asks MKL. oneDNN, which torch also has, was 1.1 to 1.6 times as fast on an AMD EPYC
(docs/LOG.md), and takes a transposed weight as it is. Everything else, and whoever watches through one of torch's
modes, gets torch's own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_ONEDNN: Any = None
"""oneDNN's linear, if torch was built with it."""
if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _ONEDNN = torch.ops.mkldnn._linear_pointwise.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, k], weight [n, k], bias [n] or none -> x weight^T + bias [T, n]."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


def times(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x [T, k] weight^T [k, n] -> [T, n], in `out` if given; weight may be a transposed view."""
    if not _by_onednn(x, weight):
        return torch.mm(x, weight.t(), out=out)
    made = cast(Tensor, _ONEDNN(x, weight, None, "none", [], ""))
    return made if out is None else out.copy_(made)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 2
        and x.numel() > 0
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch.compiler.is_compiling()
    )


_PLAIN = (Tensor, nn.Parameter)
"""Not a subclass, which may be sharded or fake."""


class _Linear(torch.autograd.Function):
    """(x, weight, bias) -> x weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_needed, weight_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if weight_needed else None, weight if x_needed else None)
        return cast(Tensor, _ONEDNN(x, weight, bias, "none", [], ""))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # a sum's is one number, expanded
        return (
            None if weight is None else times(gradient, weight.t()),
            None if x is None else gradient.t() @ x,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )
