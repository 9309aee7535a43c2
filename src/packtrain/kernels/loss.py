"""The head and its cross-entropy as one operation that never holds all logits.

    linear_cross_entropy(hidden, weight, targets, ...)     sum of the tokens' losses

Rows go through in chunks: logits, log-softmax, loss, and at once the gradients by every input that needs one, so
that a chunk's logits are gone before the next chunk's are made (the idea of Liger Kernel's fused linear
cross-entropy). The backward only scales those gradients. On a GPU a chunk's
softmax, loss and gradient are one kernel in place.

Products are in the weight's dtype, but for a float8 base's gradient through the head (kernels/head.py); softmax, loss
and the sums over chunks are fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from packtrain.kernels.head import FEW, UNIT, Float8Head
from packtrain.kernels.product import times
from packtrain.kernels.rows import RUNS_TRITON, by_triton

if RUNS_TRITON:
    from packtrain.kernels import crossentropy_triton

CHUNK_LOGITS = 2**26
"""Logits made at a time, 256 MiB in fp32: rows enough for a GPU's matrix product, little beside a model's weights."""

CHUNK_LOGITS_CPU = 6 * 2**20
"""The most on a CPU, 24 MiB: from 32 on malloc takes new pages of the system for every chunk."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Sum over N tokens of -log softmax(hidden weight^T + bias)[target], 0-dim fp32.

    hidden [N, D], weight [V, D], targets int64 [N] in [0, V), bias [V]. `low_rank` is an adapter's (columns [N, r],
    B [V, r]), whose product adds to the logits: the same as columns appended to hidden and B to weight, without the
    copy, and without a gradient of the weight when only B is trained. With the weight's `scale` (kernels/head.py)
    hidden's gradient is a product in float8 where nothing else needs one. N = 0 gives 0, and gradients of zeros.
    """
    inputs = [None if t is None else t.to(weight.dtype) for t in (bias, hidden, weight, *(low_rank or ()))]
    if not torch.is_grad_enabled():
        inputs = [None if t is None else t.detach() for t in inputs]
    return cast(Tensor, _LinearCrossEntropy.apply(scale, targets, *inputs))  # type: ignore[no-untyped-call]


class _Product(NamedTuple):
    """x weight^T, a term of the logits, and its gradients so far: None where none is needed."""

    x: Tensor
    weight: Tensor
    x_gradient: Tensor | None
    weight_gradient: Tensor | None  # fp32, whatever the weight is
    head: Float8Head | None = None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, x_needed: bool, weight_needed: bool) -> _Product:
        return cls(
            x,
            weight,
            torch.empty_like(x) if x_needed else None,
            torch.zeros_like(weight, dtype=torch.float32) if weight_needed else None,
        )

    def backward(self, rows: slice, gradient: Tensor) -> None:
        """Take in a chunk's gradient by the logits, [rows, V] in the weight's dtype or as `head` has it."""
        if self.x_gradient is not None and self.head is not None:
            self.head.backward(gradient, self.x_gradient[rows])
        elif self.x_gradient is not None:
            times(gradient, self.weight.t(), out=self.x_gradient[rows])
        summed = self.weight_gradient
        if summed is not None and gradient.dtype == torch.float32:
            summed.addmm_(gradient.t(), self.x[rows])
        elif summed is not None and summed.is_cuda:  # summed by the product itself
            torch.addmm(summed, gradient.t(), self.x[rows], out_dtype=torch.float32, out=summed)
        elif summed is not None:
            summed.add_(gradient.t() @ self.x[rows])


class _LinearCrossEntropy(torch.autograd.Function):
    """(scale, targets, bias, x, weight[, columns, B]) -> loss."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor | None, targets: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        bias_needed, *needed = ctx.needs_input_grad[2:]
        products = list(map(_Product.of, factors[::2], factors[1::2], needed[::2], needed[1::2]))
        vocabulary, dtype = factors[1].shape[0], factors[1].dtype
        bias_gradient = torch.zeros(vocabulary, dtype=torch.float32, device=targets.device) if bias_needed else None
        loss = torch.zeros((), dtype=torch.float32, device=targets.device)
        fused = by_triton(factors[0])
        if scale is not None and ctx.needs_input_grad[2:] == (False, True, False) and _pays(factors[0]):
            products[0] = products[0]._replace(head=Float8Head.of(factors[1], scale))
        head, training = products[0].head, any(ctx.needs_input_grad)
        chunk = _chunk(targets.device, vocabulary, fused, needed[1])
        for start in range(0, targets.shape[0], chunk):
            rows = slice(start, start + chunk)
            chunk_loss, gradient = _cross_entropy(_logits(products, bias, rows), targets[rows], training, fused, head)
            loss += chunk_loss
            if gradient is not None:
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0, dtype=torch.float32)
                gradient = gradient if head is not None else gradient.to(dtype)
                for product in products:
                    product.backward(rows, gradient)
                del gradient  # else it would be there beside the next chunk's
        ctx.save_for_backward(bias_gradient, *(g for p in products for g in (p.x_gradient, p.weight_gradient)))
        ctx.dtype = dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else _scaled(gradient, scale, ctx.dtype) for gradient in ctx.saved_tensors)
        return None, None, *scaled


def _pays(hidden: Tensor) -> bool:
    return hidden.shape[0] >= (FEW if hidden.is_cuda else 1)


def _chunk(device: torch.device, vocabulary: int, fused: bool, weight_needed: bool) -> int:
    """Rows whose logits are made at a time."""
    most = min(CHUNK_LOGITS, CHUNK_LOGITS_CPU) if device.type == "cpu" else CHUNK_LOGITS
    chunk = max(1, most // vocabulary)
    if not fused or chunk < 128:
        return chunk
    # Made in 16 bits and in place; a product's tiles are of 128 rows. A gradient of the weight is read and written once
    # a chunk, so that fewer chunks are better then.
    return chunk * (8 if weight_needed else 2) // 128 * 128


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`, rounded once, by one kernel."""
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _logits(products: list[_Product], bias: Tensor | None, rows: slice) -> Tensor:
    """[rows, V] in the weight's dtype."""
    logits = times(products[0].x[rows], products[0].weight)
    for x, weight, *_ in products[1:]:
        logits.addmm_(x[rows], weight.t())
    if bias is not None:
        logits += bias
    return logits


def _cross_entropy(
    logits: Tensor, targets: Tensor, training: bool, fused: bool, head: Float8Head | None
) -> tuple[Tensor, Tensor | None]:
    """(sum of the rows' losses, gradient by the logits: softmax, less one at the target); logits are used up.

    With a `head` the gradient is as that takes it.
    """
    small = None if head is None else head.empty(logits.shape[0])
    if fused:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        crossentropy_triton.cross_entropy(logits, targets, losses, training, small, UNIT)
        return losses.sum(), (logits if small is None else small) if training else None
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    log_p_target = log_p.gather(1, targets[:, None])
    gradient = log_p.exp_().scatter_(1, targets[:, None], log_p_target.expm1()) if training else None
    if small is not None and gradient is not None:
        small.view(torch.uint8)[:, logits.shape[1] :] = 0
        small[:, : logits.shape[1]] = gradient.mul_(UNIT).to(small.dtype)
        gradient = small
    return -log_p_target.sum(), gradient
