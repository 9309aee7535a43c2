"""AnyPrecision AdamW's update as one Triton kernel: each number is read once and written once.

`anyprecision.py` is its seam, with the same in plain PyTorch, and says what remainder, rounding and chance are.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _hash(value, step):
    bits = value.to(tl.uint32, bitcast=True) + step.to(tl.int32).to(tl.uint32, bitcast=True) * 0x9E3779B1
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _rounded(value, chance):
    return ((value.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _update(
    weight, remainder, exp_avg, exp_avg_sq, gradient, factors, step, refused, count, decay, rest1, beta2, rest2, eps,
    REMAINDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    stays = tl.load(refused) > 0
    g = tl.load(gradient + at, mask=inside, other=0.0)
    old = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
    old_sq = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.where(stays, old, old + rest1 * (g - old))
    square = tl.where(stays, old_sq, old_sq * beta2 + rest2 * g * g)
    update = mean / (tl.sqrt(square * tl.load(factors + 1)) + eps) * tl.load(factors)

    stored = tl.load(weight + at, mask=inside, other=0.0)
    if REMAINDER:
        low = tl.load(remainder + at, mask=inside, other=0).to(tl.int32)
        value = ((stored.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        value = stored.to(tl.float32)
    value = tl.where(stays, value, value * decay - update)
    if REMAINDER:
        bits = value.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(remainder + at, (bits - (high << 16)).to(tl.int16), mask=inside)
        tl.store(weight + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(weight + at, value.to(weight.dtype.element_ty), mask=inside)

    chance = _hash(mean, tl.load(step))
    tl.store(exp_avg + at, _rounded(mean, chance & 0xFFFF).to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, _rounded(square, chance >> 16).to(exp_avg_sq.dtype.element_ty), mask=inside)


def update(
    weight: Tensor,
    remainder: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    factors: Tensor,
    step: Tensor,
    refused: Tensor,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One piece, flat tensors of one length, in place. `factors` fp32 [2]: lr and 1, over the bias corrections."""
    kept = weight if remainder is None else remainder
    rest1, beta2, rest2 = 1 - betas[0], betas[1], 1 - betas[1]
    _update[(triton.cdiv(weight.numel(), BLOCK),)](
        weight, kept, exp_avg, exp_avg_sq, gradient, factors, step, refused, weight.numel(),
        decay, rest1, beta2, rest2, eps,
        REMAINDER=remainder is not None, BLOCK=BLOCK,
    )  # fmt: skip
