"""Triton kernels of adapters' gradients; kernels/adapter_gradients.py is their seam and says what they compute."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.operations import operation
from packtrain.kernels.rows_triton import INTERPRETED, launch

DOT = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
"""What small products are computed in; the interpreter has no bf16 ones."""

DOT8 = tl.constexpr(tl.float32 if INTERPRETED else tl.float16)
"""The same where one side is float8."""

GRADIENT = {
    (True, "wide"): (32, 256, 4, 4),
    (True, "plain"): (64, 128, 4, 3),
    (True, "ranks"): (32, 256, 4, 4),
    (True, "high ranks"): (128, 128, 4, 3),
    (False, "wide"): (32, 256, 4, 3),
    (False, "plain"): (64, 128, 4, 4),
    (False, "ranks"): (64, 128, 4, 3),
    (False, "high ranks"): (64, 128, 4, 3),
}
"""(tokens and columns a tile, warps, stages) of `gradient`, by float8 and kind of shape; measured on an H100."""
FROM = {True: 16384, False: 8192}
"""Columns from which on a shape is wide, by float8."""

UP_GRADIENT = {"wide": (64, 512, 4, 2), "plain": (128, 256, 8, 2)}
"""The same of `up_gradient`."""
UP_EDGE = 512
"""Parts that begin and end at multiples of it can take it."""
UP_WIDE = 8192
"""Columns from which on it is wide."""

NEVER = 2**31 - 1


@triton.jit
def _top(s, h, T, ldh, R, t0, span, RP: tl.constexpr, BT: tl.constexpr):
    """The largest magnitude of a program's h [T, r] times rows' scales.

    e4m3 to fp16 is one instruction for two numbers, to bf16 it would be five: so h is brought into fp16's range by it.
    Many tokens at once: what this waits for is the way to memory.
    """
    r = tl.arange(0, RP)
    most = tl.zeros((BT, RP), dtype=tl.float32)
    for step in range(0, span, BT):
        place = step + tl.arange(0, BT)
        t = t0 + place
        m = (t < T) & (place < span)
        small = tl.load(h + t.to(tl.int64)[:, None] * ldh + r[None, :], mask=m[:, None] & (r[None, :] < R), other=0.0)
        most = tl.maximum(most, tl.abs(small.to(tl.float32)) * tl.load(s + t, mask=m, other=0.0)[:, None])
    return tl.maximum(tl.max(tl.max(most, 1), 0), 1e-30)


@triton.jit
def _gradient(
    x, s, h, out, T, N, ldx, ldh, R, E1, E2, sr, sn, so, factor, span,
    FLOAT8: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    r = tl.arange(0, RP)
    # which part's columns of h: a tile is in one part
    h += R * ((first >= E1).to(tl.int32) + (first >= E2).to(tl.int32))
    t0 = tl.program_id(1) * span
    acc = tl.zeros((RP, BN), dtype=tl.float32)
    inverse = 1.0
    top = 1.0
    if FLOAT8:
        top = _top(s, h, T, ldh, R, t0, span, RP, TOP)
        inverse = 1.0 / top
    for step in range(0, span, BT):
        t = t0 + step + tl.arange(0, BT)
        tm = t < T
        t64 = t.to(tl.int64)
        values = tl.load(x + t64[:, None] * ldx + n[None, :], mask=tm[:, None] & (n[None, :] < N), other=0.0)
        small = tl.load(h + t64[:, None] * ldh + r[None, :], mask=tm[:, None] & (r[None, :] < R), other=0.0)
        if FLOAT8:
            small = small.to(tl.float32) * (tl.load(s + t, mask=tm, other=0.0) * inverse)[:, None]
            acc = tl.dot(tl.trans(small.to(DOT8)), values.to(DOT8), acc)
        else:
            acc = tl.dot(tl.trans(small.to(DOT)), values.to(DOT), acc)
    at = out + tl.program_id(1).to(tl.int64) * so + r[:, None] * sr + n[None, :].to(tl.int64) * sn
    tl.store(at, acc * (factor * top), mask=(r[:, None] < R) & (n[None, :] < N))


@operation(
    "low_rank_gradient(Tensor x, Tensor? scale, Tensor h, int rank, Tensor(a!) out, int[] strides, float factor, "
    "int[] edges=[]) -> ()",
    flops=lambda x, scale, h, rank, *_: 2 * x[0] * x[1] * rank,
)
def gradient(
    x: Tensor, scale: Tensor | None, h: Tensor, rank: int, out: Tensor, strides: tuple[int, int], factor: float,
    edges: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """out [splits, ...] gets partial sums of factor * h^T x: element (r, n) at `strides`.

    Columns of x from edges[i] on, multiples of 128, meet the next `rank` columns of h.
    """
    count, columns = x.shape
    float8 = scale is not None
    padded = max(16, triton.next_power_of_2(rank))
    kind = "high ranks" if padded > 64 else "ranks" if padded > 16 else "wide" if columns > FROM[float8] else "plain"
    if any(edge % GRADIENT[float8, kind][1] for edge in edges):
        kind = "plain"
    tokens, block, warps, stages = GRADIENT[float8, kind]
    span = triton.cdiv(triton.cdiv(count, out.shape[0]), tokens) * tokens
    first, second = (*edges, NEVER, NEVER)[:2]
    launch(
        _gradient, (triton.cdiv(columns, block), out.shape[0]), x, h if scale is None else scale, h, out, count,
        columns, x.stride(0), h.stride(0), rank, first, second, *strides, out.stride(0), factor, span,
        FLOAT8=float8, RP=padded, BN=block, BT=tokens, TOP=max(16, min(256, 2**14 // padded)), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


@triton.jit
def _up_gradient(
    x, h, b, partial, out, T, ldx, ldh, ldb, R, E1, E2, so, factor, span,
    RP: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    r = tl.arange(0, RP)
    rm = r[None, :] < R
    part = R * ((first >= E1).to(tl.int32) + (first >= E2).to(tl.int32))
    small_b = tl.load(b + n[:, None].to(tl.int64) * ldb + part + r[None, :], mask=rm, other=0.0).to(DOT)
    t0 = tl.program_id(1) * span
    acc = tl.zeros((RP, BN), dtype=tl.float32)
    for step in range(0, span, BT):
        t = t0 + step + tl.arange(0, BT)
        tm = t[:, None] < T
        t64 = t.to(tl.int64)[:, None]
        values = tl.load(x + t64 * ldx + n[None, :], mask=tm, other=0.0).to(DOT)
        small = tl.load(h + t64 * ldh + part + r[None, :], mask=tm & rm, other=0.0).to(DOT)
        acc = tl.dot(tl.trans(small), values, acc)
        up = tl.dot(values, small_b)
        to = partial + (tl.program_id(0).to(tl.int64) * T + t64) * R + r[None, :]
        tl.store(to, up.to(partial.dtype.element_ty), mask=tm & rm)
    at = out + tl.program_id(1).to(tl.int64) * so + r[:, None] + n[None, :].to(tl.int64) * R
    tl.store(at, acc * factor, mask=r[:, None] < R)


@triton.jit
def _sum_up(partial, to, T, R, ldt, E1, E2, E3, RP: tl.constexpr, BT: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    r = tl.arange(0, RP)[None, :]
    part = tl.program_id(1)
    start = tl.where(part == 0, 0, tl.where(part == 1, E1, E2))
    stop = tl.where(part == 0, E1, tl.where(part == 1, E2, E3))
    m = (t < T) & (r < R)
    acc = tl.zeros((BT, RP), dtype=tl.float32)
    at = partial + (start.to(tl.int64) * T + t) * R + r
    for _ in range(start, stop):
        acc += tl.load(at, mask=m, other=0.0).to(tl.float32)
        at += T * R
    tl.store(to + t.to(tl.int64) * ldt + part * R + r, acc.to(to.dtype.element_ty), mask=m)


@operation(
    "low_rank_up_gradient(Tensor x, Tensor h, Tensor b, int rank, int[] edges, Tensor(a!) dh, Tensor(b!) out, "
    "float factor) -> ()",
    flops=lambda x, h, b, rank, *_: 4 * x[0] * x[1] * rank,
)
def up_gradient(
    x: Tensor, h: Tensor, b: Tensor, rank: int, edges: tuple[int, ...], dh: Tensor, out: Tensor, factor: float
) -> None:
    """dh [T, C] = x b, part by part, and out gets partial sums of factor * h^T x, in one pass over x [T, n].

    Parts begin at 0 and at `edges`, multiples of UP_EDGE; b is [n, C].
    """
    count, columns = x.shape
    tokens, block, warps, stages = UP_GRADIENT["wide" if columns > UP_WIDE else "plain"]
    partial = torch.empty(columns // block, count, rank, dtype=dh.dtype, device=x.device)
    span = triton.cdiv(triton.cdiv(count, out.shape[0]), tokens) * tokens
    first, second = (*edges, NEVER, NEVER)[:2]
    launch(
        _up_gradient, (columns // block, out.shape[0]), x, h, b, partial, out, count, x.stride(0), h.stride(0),
        b.stride(0), rank, first, second, out.stride(0), factor, span, RP=max(16, triton.next_power_of_2(rank)),
        BN=block, BT=tokens, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _sum(partial, dh, edges, columns)


def _sum(partial: Tensor, to: Tensor, edges: Sequence[int], columns: int) -> None:
    """Sums of `partial` [columns / block, T, r] over each part into its columns of `to` [T, C]."""
    tiles, count, rank = partial.shape
    ends = [edge * tiles // columns for edge in (*edges, columns)]
    launch(
        _sum_up, (triton.cdiv(count, 32), len(ends)), partial, to, count, rank, to.stride(0), *(*ends, 0, 0)[:3],
        RP=max(16, triton.next_power_of_2(rank)), BT=32, num_warps=4,
    )  # fmt: skip
