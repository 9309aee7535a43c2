"""Triton kernels around products with adapter columns; kernels/lowrank.py is their seam and says what they compute."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.packs_triton import _halves
from packtrain.kernels.rows_triton import launch


@triton.jit
def _split(
    o, unit, s, factor, h, q, K, ldq, T, times, most,
    FILLS: tl.constexpr, SCALED: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    c = tl.arange(0, CP)[None, :]
    m = (c < C) & (t < T)
    t64 = t.to(tl.int64)
    value = tl.load(o + t64 * 2 * C + c, mask=m, other=0.0).to(tl.float32)
    value += tl.load(o + t64 * 2 * C + C + c, mask=m, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(unit + c, mask=c < C, other=0.0) * times
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


def split(
    o: Tensor, unit: Tensor | None, times: float, scale: Tensor, factor: Tensor, h: Tensor, data: Tensor | None,
    values: int, most: float,
) -> None:  # fmt: skip
    """h = (the two halves of o [T, 2 C], summed) * scale; over factor instead, as hi, lo, hi, into data's columns.

    With `unit` [C] o counts so many `times` it. Rows whose columns would be beyond e4m3 get a larger scale, by a power
    of two, and smaller values; beyond `most` times as large h is NaN.
    """
    count, columns = h.shape
    to = h if data is None else data
    launch(
        _split, (triton.cdiv(count, 32),), o, factor if unit is None else unit, scale, factor, h, to, values,
        to.stride(0), count, times, most, FILLS=data is not None, SCALED=unit is not None, C=columns,
        CP=triton.next_power_of_2(columns), BT=32, BK=64, num_warps=4,
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
