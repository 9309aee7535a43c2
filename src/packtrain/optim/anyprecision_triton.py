"""AnyPrecision AdamW's update as one Triton kernel: each number is read once and written once.

`anyprecision.py` is its seam, with the same in plain PyTorch, and says what remainder, rounding and chance are;
`codes.py` says what a code is.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packtrain.optim import codes

TILE = 1024
"""Elements of a program."""

ONE, LEAST = tl.constexpr(codes.ONE), tl.constexpr(codes.LEAST)
TOP_SIGNED, TOP = tl.constexpr(codes.LARGEST_SIGNED), tl.constexpr(codes.LARGEST)


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
def _decoded(code, scale, SIGNED: tl.constexpr):
    if SIGNED:
        size = code & TOP_SIGNED
        part = ((size + (ONE - TOP_SIGNED)) << 20).to(tl.float32, bitcast=True)
        part = tl.where(size == 0, 0.0, tl.where(code > TOP_SIGNED, -part, part))
    else:
        part = ((code + (ONE - TOP)) << 20).to(tl.float32, bitcast=True)
    return part * scale[:, None]


@triton.jit
def _encoded(value, scale, chance, SIGNED: tl.constexpr):
    part = tl.where(scale[:, None] > 0, tl.abs(value) / scale[:, None], 0.0)
    chance = chance.to(tl.int32, bitcast=True)
    grown = (part.to(tl.int32, bitcast=True) + chance) >> 20
    if SIGNED:
        grown = tl.minimum(tl.maximum(grown - (ONE - TOP_SIGNED), 1), TOP_SIGNED)
        up = part > chance.to(tl.float32) * (LEAST / 1048576)
        code = tl.where(part < LEAST, up.to(tl.int32), grown)
        return tl.where(value < 0, code + (TOP_SIGNED + 1), code).to(tl.uint8)
    return tl.minimum(tl.maximum(grown - (ONE - TOP), 0), TOP).to(tl.uint8)


@triton.jit
def _update(
    weight, remainder, exp_avg, exp_avg_sq, scales, scales_sq, gradient, factors, step, refused, count,
    decay, rest1, beta2, rest2, eps,
    REMAINDER: tl.constexpr, CODES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    moving = tl.where(tl.load(refused) > 0, 0, count)
    moves = at < moving
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factors + 2)
    if CODES:
        blocks = row * BLOCK < count
        old = tl.load(exp_avg + at, mask=inside, other=0).to(tl.int32)
        old = _decoded(old, tl.load(scales + row, mask=blocks, other=0.0), True)
        old_sq = tl.load(exp_avg_sq + at, mask=inside, other=0).to(tl.int32)
        old_sq = _decoded(old_sq, tl.load(scales_sq + row, mask=blocks, other=0.0), False)
    else:
        old = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        old_sq = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    mean = old + rest1 * (g - old)
    square = old_sq * beta2 + rest2 * g * g
    update = mean / (tl.sqrt(square * tl.load(factors + 1)) + eps) * tl.load(factors)

    stored = tl.load(weight + at, mask=inside, other=0.0)
    if REMAINDER:
        low = tl.load(remainder + at, mask=inside, other=0).to(tl.int32)
        value = ((stored.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
        bits = (value * decay - update).to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(remainder + at, (bits - (high << 16)).to(tl.int16), mask=moves)
        tl.store(weight + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=moves)
    else:
        tl.store(weight + at, (stored.to(tl.float32) * decay - update).to(weight.dtype.element_ty), mask=moves)

    chance = _hash(mean, tl.load(step))
    if CODES:
        scale, scale_sq = tl.max(tl.abs(mean), 1), tl.max(square, 1)
        tl.store(exp_avg + at, _encoded(mean, scale, chance & 0xFFFFF, True), mask=moves)
        tl.store(exp_avg_sq + at, _encoded(square, scale_sq, chance >> 12, False), mask=moves)
        tl.store(scales + row, scale, mask=row * BLOCK < moving)
        tl.store(scales_sq + row, scale_sq, mask=row * BLOCK < moving)
    else:
        tl.store(exp_avg + at, _rounded(mean, chance & 0xFFFF).to(exp_avg.dtype.element_ty), mask=moves)
        tl.store(exp_avg_sq + at, _rounded(square, chance >> 16).to(exp_avg_sq.dtype.element_ty), mask=moves)


def update(
    weight: Tensor,
    remainder: Tensor | None,
    exp_avg: tuple[Tensor, Tensor | None],
    exp_avg_sq: tuple[Tensor, Tensor | None],
    gradient: Tensor,
    factors: Tensor,
    step: Tensor,
    refused: Tensor,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One value, flat tensors of one length, in place; of a moment in 8 bits the codes and their blocks' scales.

    `factors` fp32 [3]: lr and 1, over the bias corrections, and what gradients (bf16 or fp32) are multiplied by.
    """
    kept = weight if remainder is None else remainder
    (mean, scales), (square, scales_sq) = exp_avg, exp_avg_sq
    block = TILE if scales is None else weight.numel() // scales.numel()
    rest1, beta2, rest2 = 1 - betas[0], betas[1], 1 - betas[1]
    _update[(triton.cdiv(weight.numel(), TILE),)](
        weight, kept, mean, square, mean if scales is None else scales, square if scales is None else scales_sq,
        gradient, factors, step, refused, weight.numel(), decay, rest1, beta2, rest2, eps,
        REMAINDER=remainder is not None, CODES=scales is not None, ROWS=TILE // block, BLOCK=block,
    )  # fmt: skip
