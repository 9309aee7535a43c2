"""Triton kernels around products with adapter columns; kernels/lowrank.py is their seam and says what they compute."""

# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.rows_triton import launch

Place = tuple[int, int, int]
"""Where an adapter's two factors go."""


@triton.jit
def _pack16(
    m, all_a, all_b, ns, firsts, starts, columns, K, R, ld, scale, RP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    for i in tl.static_range(len(all_a)):
        if tl.program_id(1) == i:
            _pack16_one(m, all_a[i], all_b[i], ns[i], firsts[i], starts[i], columns[i], K, R, ld, scale, RP, BLOCK)


@triton.jit
def _pack16_one(m, a, b, N, first, start, column, K, R, ld, scale, RP: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tiles = tl.cdiv(K, BLOCK)
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


def pack16(adapters: Sequence[tuple[Tensor, Tensor]], whole: Tensor, places: Sequence[Place], scale: float) -> None:
    """Each A [r, k] into r rows of `whole`, and scale * B [n, r] into n of its rows and r columns, all by one kernel.

    A place has A's first row, B's first row, B's first column.
    """
    rank, k = adapters[0][0].shape
    rows = tuple(b.shape[0] for _, b in adapters)
    grid = triton.cdiv(k, 128) + triton.cdiv(max(rows), 128), len(adapters)
    launch(
        _pack16, grid, whole, *zip(*adapters, strict=True), rows, *zip(*places, strict=True), k, rank, whole.stride(0),
        scale, RP=triton.next_power_of_2(rank), BLOCK=128, num_warps=4,
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
    m, xs, ys, xtops, ytops, ns, ks, xrows, yrows, columns, reaches, ws, p, pscale, factor, R, xn, xr, yr, yk, C, ldm,
    ldp, at, scale_x, scale_y, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(len(xs)):
        if tl.program_id(1) == i:
            _pack8_one(
                m, xs[i], ys[i], xtops[i], ytops[i], ns[i], ks[i], xrows[i], yrows[i], columns[i], reaches[i], ws, p,
                pscale, factor, R, xn, xr, yr, yk, C, ldm, ldp, at, scale_x, scale_y, RP, BLOCK,
            )  # fmt: skip


@triton.jit
def _pack8_one(
    m, x, y, xtop, ytop, N, K, xrow, yrow, column, reach, ws, p, pscale, factor, R, xn, xr, yr, yk, C, ldm, ldp, at,
    scale_x, scale_y, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK)
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
    pairs: Sequence[tuple[Tensor, Tensor]], tops: Sequence[tuple[Tensor, Tensor]], reaches: Sequence[float],
    scales: tuple[float, float], weight_scale: Tensor, matrix: Tensor, skinny: Tensor, skinny_scale: Tensor,
    factor: Tensor, places: Sequence[Place], values: int,
) -> None:  # fmt: skip
    """Each x [n, r] into `matrix`'s columns beside its `values`, and y [r, k] into rows of `skinny`.

    One kernel does all. Pairs are alike in rank and strides. `tops` are their largest magnitudes, `scales` x's and
    y's (see lowrank.Float8), `reaches` of `lowrank.reach`; a place has x's first row, y's first column, the adapter's.
    """
    x, y = pairs[0]
    ns, ks = tuple(x.shape[0] for x, _ in pairs), tuple(y.shape[1] for _, y in pairs)
    tiles = max(triton.cdiv(n, 128) + triton.cdiv(k, 128) for n, k in zip(ns, ks, strict=True))
    launch(
        _pack8, (tiles, len(pairs)), matrix, *zip(*pairs, strict=True), *zip(*tops, strict=True), ns, ks,
        *zip(*places, strict=True), tuple(reaches), weight_scale, skinny, skinny_scale, factor, x.shape[1], *x.stride(),
        *y.stride(), factor.shape[0], matrix.stride(0), skinny.stride(0), values, *scales,
        RP=triton.next_power_of_2(x.shape[1]), BLOCK=128, num_warps=4,
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
        FILLS=data is not None, C=columns, CP=triton.next_power_of_2(columns), BT=32,
        BK=64, num_warps=4,
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
