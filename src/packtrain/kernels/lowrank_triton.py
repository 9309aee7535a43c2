"""Triton kernels around products with adapter columns; kernels/lowrank.py is their seam and says what they compute."""

# mypy: ignore-errors

from __future__ import annotations

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
    (True, "wide"): (64, 256, 4, 3),
    (True, "plain"): (64, 128, 4, 4),
    (True, "ranks"): (128, 128, 4, 3),
    (False, "wide"): (128, 128, 8, 2),
    (False, "plain"): (64, 128, 4, 4),
    (False, "ranks"): (64, 128, 4, 3),
}
"""(tokens and columns a tile, warps, stages) of `gradient`, by float8 and kind of shape; measured on an H100."""

UP_GRADIENT = 64, 256, 8, 3
"""The same of `up_gradient`."""
UP_EDGE = 512
"""Parts that begin and end at multiples of it can take `up_gradient`."""

NEVER = 2**31 - 1


@triton.jit
def _gradient(
    x, s, h, out, T, N, ldx, ldh, R, E1, E2, sr, sn, so, factor, span,
    FLOAT8: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
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
        # e4m3 to fp16 is one instruction for two numbers, to bf16 it would be five: so h is brought into fp16's range
        # by the largest magnitude of what this program reads of it.
        most = tl.zeros((BT, RP), dtype=tl.float32)
        for step in range(0, span, BT):
            t = t0 + step + tl.arange(0, BT)
            small = tl.load(
                h + t.to(tl.int64)[:, None] * ldh + r[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0
            )
            most = tl.maximum(most, tl.abs(small.to(tl.float32)) * tl.load(s + t, mask=t < T, other=0.0)[:, None])
        top = tl.maximum(tl.max(tl.max(most, 1), 0), 1e-30)
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
    wide = columns > 8192 and all(edge % 256 == 0 for edge in edges)
    tokens, block, warps, stages = GRADIENT[scale is not None, "wide" if wide else "ranks" if rank > 16 else "plain"]
    span = triton.cdiv(triton.cdiv(count, out.shape[0]), tokens) * tokens
    first, second = (*edges, NEVER, NEVER)[:2]
    launch(
        _gradient, (triton.cdiv(columns, block), out.shape[0]), x, h if scale is None else scale, h, out, count,
        columns, x.stride(0), h.stride(0), rank, first, second, *strides, out.stride(0), factor, span,
        FLOAT8=scale is not None, RP=max(16, triton.next_power_of_2(rank)), BN=block, BT=tokens, num_warps=warps,
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
    tokens, block, warps, stages = UP_GRADIENT
    partial = torch.empty(columns // block, count, rank, dtype=dh.dtype, device=x.device)
    span = triton.cdiv(triton.cdiv(count, out.shape[0]), tokens) * tokens
    first, second = (*edges, NEVER, NEVER)[:2]
    padded = max(16, triton.next_power_of_2(rank))
    launch(
        _up_gradient, (columns // block, out.shape[0]), x, h, b, partial, out, count, x.stride(0), h.stride(0),
        b.stride(0), rank, first, second, out.stride(0), factor, span, RP=padded, BN=block, BT=tokens,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    tiles = [edge // block for edge in (*edges, columns)]
    launch(
        _sum_up, (triton.cdiv(count, 32), len(tiles)), partial, dh, count, rank, dh.stride(0), *(*tiles, 0, 0)[:3],
        RP=padded, BT=32, num_warps=4,
    )  # fmt: skip


@triton.jit
def _pack16(a, b, m, K, N, R, first, start, column, ld, scale, tiles, RP: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    r = tl.arange(0, RP)
    if pid < tiles:
        k = pid * BLOCK + tl.arange(0, BLOCK)
        mask = (r[:, None] < R) & (k[None, :] < K)
        value = tl.load(a + r[:, None] * K + k[None, :], mask=mask, other=0.0)
        tl.store(m + (first + r[:, None]).to(tl.int64) * ld + k[None, :], value.to(m.dtype.element_ty), mask=mask)
    else:
        n = (pid - tiles) * BLOCK + tl.arange(0, BLOCK)
        mask_b = (n[:, None] < N) & (r[None, :] < R)
        value_b = tl.load(b + n[:, None] * R + r[None, :], mask=mask_b, other=0.0) * scale
        at = m + (start + n[:, None]).to(tl.int64) * ld + column + r[None, :]
        tl.store(at, value_b.to(m.dtype.element_ty), mask=mask_b)


def pack16(a: Tensor, b: Tensor, whole: Tensor, first: int, start: int, column: int, scale: float) -> None:
    """A [r, K] into rows `first`.. of `whole`, scale * B [n, r] into its rows `start`.. and columns `column`.."""
    (rank, k), n = a.shape, b.shape[0]
    tiles = triton.cdiv(k, 128)
    launch(
        _pack16, (tiles + triton.cdiv(n, 128),), a, b, whole, k, n, rank, first, start, column, whole.stride(0), scale,
        tiles, RP=triton.next_power_of_2(rank), BLOCK=128, num_warps=4,
    )  # fmt: skip


@triton.jit
def _cut(value):
    """To what e4m3 holds; NaN stays."""
    value = tl.maximum(value, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _halves(value):
    """(hi, lo) of e4m3. hi is rounded by hand: Triton 3.6 miscompiles a value's way to e4m3 and back in one kernel."""
    value = _cut(value)
    bits = value.to(tl.int32, bitcast=True)
    rounded = _cut(((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True))
    return rounded.to(tl.float8e4nv), (value - rounded).to(tl.float8e4nv)


@triton.jit
def _pack8(
    x, y, xtop, ytop, ws, m, p, pscale, factor, N, K, R, xn, xr, yr, yk, xrow, yrow, column, C, ldm, ldp, at, scale_x,
    scale_y, reach, tiles, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    r = tl.arange(0, RP)
    w = tl.load(ws)
    most = tl.load(ytop) * scale_y
    f = tl.minimum(tl.maximum(16.0, reach * most), 224.0 * w / tl.maximum(tl.load(xtop) * scale_x, 1e-30))
    top = tl.maximum(most, 1e-30) / 224.0
    if pid == 0:
        tl.store(factor + column + r, f + tl.zeros((RP,), tl.float32), mask=r < R)
        tl.store(pscale + column + r, top + tl.zeros((RP,), tl.float32), mask=r < R)
        tl.store(pscale + C + column + r, top + tl.zeros((RP,), tl.float32), mask=r < R)
    if pid < tiles:
        n = pid * BLOCK + tl.arange(0, BLOCK)
        mask = (n[:, None] < N) & (r[None, :] < R)
        value = tl.load(x + n[:, None].to(tl.int64) * xn + r[None, :] * xr, mask=mask, other=0.0) * (scale_x * f / w)
        hi, lo = _halves(value)
        to = m + (xrow + n[:, None]).to(tl.int64) * ldm + at + column + r[None, :]
        tl.store(to, hi, mask=mask)
        tl.store(to + C, hi, mask=mask)
        tl.store(to + 2 * C, lo, mask=mask)
    else:
        k = (pid - tiles) * BLOCK + tl.arange(0, BLOCK)
        mask_p = (r[:, None] < R) & (k[None, :] < K)
        value_p = tl.load(y + r[:, None] * yr + k[None, :].to(tl.int64) * yk, mask=mask_p, other=0.0) * (scale_y / top)
        hi_p, lo_p = _halves(value_p)
        to_p = p + (column + r[:, None]) * ldp + yrow + k[None, :]
        tl.store(to_p, hi_p, mask=mask_p)
        tl.store(to_p + C * ldp, lo_p, mask=mask_p)


def pack8(
    x: Tensor, y: Tensor, tops: tuple[Tensor, Tensor], scales: tuple[float, float, float], weight_scale: Tensor,
    matrix: Tensor, skinny: Tensor, skinny_scale: Tensor, factor: Tensor, places: tuple[int, int, int], values: int,
) -> None:  # fmt: skip
    """x [n, r] into `matrix`'s columns beside its `values`, y [r, k] into the rows of `skinny` (see lowrank.Float8).

    Scales are x's, y's, and `lowrank.reach`.
    """
    (n, rank), k = x.shape, y.shape[1]
    xrow, yrow, column = places
    tiles = triton.cdiv(n, 128)
    launch(
        _pack8, (tiles + triton.cdiv(k, 128),), x, y, *tops, weight_scale, matrix, skinny, skinny_scale, factor, n, k,
        rank, *x.stride(), *y.stride(), xrow, yrow, column, factor.shape[0], matrix.stride(0), skinny.stride(0), values,
        *scales, tiles, RP=triton.next_power_of_2(rank), BLOCK=128, num_warps=4,
    )  # fmt: skip


@triton.jit
def _split(
    o, s, factor, h, q, K, ldq, T, most, FILLS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    c = tl.arange(0, CP)[None, :]
    m = (c < C) & (t < T)
    t64 = t.to(tl.int64)
    value = tl.load(o + t64 * 2 * C + c, mask=m, other=0.0).to(tl.float32)
    value += tl.load(o + t64 * 2 * C + C + c, mask=m, other=0.0).to(tl.float32)
    scale = tl.load(s + t, mask=t < T, other=0.0)
    small = value * scale
    if FILLS:
        value = value / tl.load(factor + c, mask=c < C, other=1.0)
        ratio = tl.max(tl.abs(value), 1)[:, None] / 448.0
        grown = ((ratio.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        grown = tl.where(ratio > 1.0, grown, 1.0)  # the next power of two
        if tl.max(tl.max(grown, 1), 0) > 1.0:
            tl.debug_barrier()  # every thread has read the scale
            tl.store(s + t, scale * grown, mask=t < T)
            for start in range(0, K, BK):
                k = start + tl.arange(0, BK)[None, :]
                inside = (k < K) & (t < T) & (grown > 1.0)
                row = tl.load(q + t64 * ldq + k, mask=inside, other=0.0).to(tl.float32) / grown
                tl.store(q + t64 * ldq + k, row.to(q.dtype.element_ty), mask=inside)
            value = value / grown
            small = tl.where(grown > most, float("nan"), small)
        hi, lo = _halves(value)
        to = q + t64 * ldq + K + c
        tl.store(to, hi, mask=m)
        tl.store(to + C, lo, mask=m)
        tl.store(to + 2 * C, hi, mask=m)
    tl.store(h + t64 * C + c, small.to(h.dtype.element_ty), mask=m)


def split(o: Tensor, scale: Tensor, factor: Tensor, h: Tensor, data: Tensor | None, values: int, most: float) -> None:
    """h = (the two halves of o [T, 2 C], summed) * scale; over factor instead, as hi, lo, hi, into data's columns.

    Rows whose columns would be beyond e4m3 get a larger scale, by a power of two, and smaller values; beyond `most`
    times as large h is NaN.
    """
    count, columns = h.shape
    to = h if data is None else data
    launch(
        _split, (triton.cdiv(count, 32),), o, scale, factor, h, to, values, to.stride(0), count, most,
        FILLS=data is not None, C=columns, CP=triton.next_power_of_2(columns), BT=32, BK=64, num_warps=4,
    )  # fmt: skip


@triton.jit
def _transpose(w, to, N, K, ldw, ldt, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    x = tl.load(w + n[:, None].to(tl.int64) * ldw + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
    at = to + k[:, None].to(tl.int64) * ldt + n[None, :]
    tl.store(at, tl.trans(x), mask=(k[:, None] < K) & (n[None, :] < N))


def transpose(weight: Tensor, to: Tensor) -> None:
    """to[k, n] = weight[n, k], bytes [N, K] and [K, >= N]."""
    n, k = weight.shape
    grid = triton.cdiv(n, 128), triton.cdiv(k, 128)
    launch(_transpose, grid, weight, to, n, k, weight.stride(0), to.stride(0), BN=128, BK=128, num_warps=8)
