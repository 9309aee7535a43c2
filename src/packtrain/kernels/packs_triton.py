"""Triton kernels that put adapters in their places; kernels/packs.py is their seam and says what they compute."""

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
    y's (see packs.Columns8), `reaches` of `packs.reach`; a place has x's first row, y's first column, the adapter's.
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
def _at(row, place, like):
    """A pointer of a table's row, to numbers of the kind that `like` points to."""
    return tl.load(row + place).to(tl.pointer_type(like.dtype.element_ty))


@triton.jit
def _pack8_all(m, x, table, numbers, RP: tl.constexpr, BLOCK: tl.constexpr):
    job = tl.program_id(1)
    row = table + job * 23
    reach = tl.load(numbers + job * 3)
    _pack8_one(
        _at(row, 0, m), _at(row, 1, x), _at(row, 2, x), _at(row, 3, numbers), _at(row, 4, numbers), tl.load(row + 9),
        tl.load(row + 10), tl.load(row + 11), tl.load(row + 12), tl.load(row + 13), reach, _at(row, 5, numbers),
        _at(row, 6, m), _at(row, 7, numbers), _at(row, 8, numbers), tl.load(row + 14), tl.load(row + 15),
        tl.load(row + 16), tl.load(row + 17), tl.load(row + 18), tl.load(row + 19), tl.load(row + 20),
        tl.load(row + 21), tl.load(row + 22), tl.load(numbers + job * 3 + 1), tl.load(numbers + job * 3 + 2), RP, BLOCK,
    )  # fmt: skip


def pack8_all(matrix: Tensor, adapter: Tensor, table: Tensor, numbers: Tensor, rank: int, longest: int) -> None:
    """For each row of a table of `packs.Packs` what `pack8` does.

    Matrices are of the kind of `matrix`, adapters of that of `adapter`; `rank` is the largest, `longest` the most rows
    and columns that the two factors of one have together.
    """
    launch(
        _pack8_all, (triton.cdiv(longest, 128) + 1, table.shape[0]), matrix, adapter, table, numbers,
        RP=triton.next_power_of_2(rank), BLOCK=128, num_warps=4,
    )  # fmt: skip


@triton.jit
def _largest(x, table, out, BLOCK: tl.constexpr):
    job = tl.program_id(0)
    at = _at(table + job * 2, 0, x)
    count = tl.load(table + job * 2 + 1)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(at + place, mask=place < count, other=0.0).to(tl.float32)))
    tl.store(out + job, tl.max(most, 0))


def largest(tensor: Tensor, table: Tensor, out: Tensor) -> None:
    """out [N] = the largest magnitude of each tensor of a table [N, 2] of addresses and lengths, all like `tensor`."""
    launch(_largest, (table.shape[0],), tensor, table, out, BLOCK=8192, num_warps=8)
