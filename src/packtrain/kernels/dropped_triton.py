"""Triton kernels of adapters with a dropout; kernels/dropped.py is their seam and says what they compute.

Which element is dropped is kernels/random.py's hash, with the same constants, of unsigned numbers here.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.adapter_gradients_triton import DOT
from packtrain.kernels.operations import operation
from packtrain.kernels.rows_triton import launch


@triton.jit
def _words(keys, number):
    """Two 32-bit words of each token's key and a name's number."""
    x = (keys ^ number).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _kept(first, second, c, threshold):
    """Whether an element stays: words [BT, 1] and columns int32 [1, BK]; two columns share a hash."""
    h = first ^ ((c // 2).to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B + second
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    half = ((h >> ((c & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)
    return (half ^ 0x8000) >= threshold


@triton.jit(do_not_specialize=["number"])
def _down(
    x, a, keys, number, h, T, K, R, ldx, ldh, threshold, factor,
    RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    t64 = t.to(tl.int64)
    r = tl.arange(0, RP)
    first, second = _words(tl.load(keys + t, mask=t < T, other=0), number)
    acc = tl.zeros((BT, RP), tl.float32)
    for start in range(0, K, BK):
        c = start + tl.arange(0, BK)
        inside = (t[:, None] < T) & (c[None, :] < K)
        values = tl.load(x + t64[:, None] * ldx + c[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.where(_kept(first[:, None], second[:, None], c[None, :], threshold), values, 0.0)
        small = tl.load(a + r[:, None] * K + c[None, :], mask=(r[:, None] < R) & (c[None, :] < K), other=0.0)
        acc = tl.dot(values.to(DOT), tl.trans(small).to(DOT), acc)
    to = h + t64[:, None] * ldh + r[None, :]
    tl.store(to, (acc * factor).to(h.dtype.element_ty), mask=(t[:, None] < T) & (r[None, :] < R))


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def _add_up(
    dx, dh, a, keys, n0, n1, n2, T, K, R, ldx, ldh, threshold, factor,
    PARTS: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    t64 = t.to(tl.int64)
    r = tl.arange(0, RP)
    key = tl.load(keys + t, mask=t < T, other=0)
    at = dx + t64[:, None] * ldx + c[None, :]
    inside = (t[:, None] < T) & (c[None, :] < K)
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        if part == 0:
            first, second = _words(key, n0)
        elif part == 1:
            first, second = _words(key, n1)
        else:
            first, second = _words(key, n2)
        row = part * R + r
        small = tl.load(dh + t64[:, None] * ldh + row[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)
        matrix = tl.load(a + row[:, None] * K + c[None, :], mask=(r[:, None] < R) & (c[None, :] < K), other=0.0)
        up = tl.dot(small.to(DOT), matrix.to(DOT)) * factor
        total += tl.where(_kept(first[:, None], second[:, None], c[None, :], threshold), up, 0.0)
    tl.store(at, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["number"])
def _gradient(
    x, s, dh, keys, number, out, T, K, R, ldx, ldh, so, threshold, factor, span,
    SCALED: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BK + tl.arange(0, BK)
    r = tl.arange(0, RP)
    t0 = tl.program_id(1) * span
    acc = tl.zeros((RP, BK), tl.float32)
    for step in range(0, span, BT):
        t = t0 + step + tl.arange(0, BT)
        t64 = t.to(tl.int64)
        first, second = _words(tl.load(keys + t, mask=t < T, other=0), number)
        inside = (t[:, None] < T) & (c[None, :] < K)
        values = tl.load(x + t64[:, None] * ldx + c[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.where(_kept(first[:, None], second[:, None], c[None, :], threshold), values, 0.0)
        small = tl.load(dh + t64[:, None] * ldh + r[None, :], mask=(t[:, None] < T) & (r[None, :] < R), other=0.0)
        if SCALED:
            small = small.to(tl.float32) * tl.load(s + t, mask=t < T, other=0.0)[:, None]
        acc = tl.dot(tl.trans(small.to(DOT)), values.to(DOT), acc)
    to = out + tl.program_id(1).to(tl.int64) * so + r[:, None] * K + c[None, :]
    tl.store(to, acc * factor, mask=(r[:, None] < R) & (c[None, :] < K))


def _chance(p: float) -> tuple[int, float]:
    """(16 bits below which an element goes, what the others are multiplied by)."""
    return round(p * 2**16), 1.0 / (1.0 - p)


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


@operation(
    "dropped_down(Tensor x, Tensor a, Tensor keys, int number, float p, Tensor(a!) h) -> ()",
    flops=lambda x, a, *_: 2 * x[0] * x[1] * a[0],
)
def down(x: Tensor, a: Tensor, keys: Tensor, number: int, p: float, h: Tensor) -> None:
    """h [T, r] = dropout(x [T, K]) a^T, a fp32 [r, K]."""
    count, columns = x.shape
    launch(
        _down, (triton.cdiv(count, 32),), x, a, keys, number, h, count, columns, a.shape[0], x.stride(0), h.stride(0),
        *_chance(p), RP=_padded(a.shape[0]), BT=32, BK=128, num_warps=4, num_stages=3,
    )  # fmt: skip


@operation(
    "dropped_add_up(Tensor(a!) dx, Tensor dh, Tensor a, int rank, Tensor keys, int[] numbers, float p) -> ()",
    flops=lambda dx, dh, a, *_: 2 * dx[0] * dx[1] * a[0],
)
def add_up(dx: Tensor, dh: Tensor, a: Tensor, rank: int, keys: Tensor, numbers: list[int], p: float) -> None:
    """dx [T, K] += dropout(dh a) over up to three adapters: dh [T, >= parts * r], a fp32 [parts * r, K]."""
    count, columns = dx.shape
    names = [numbers[min(i, len(numbers) - 1)] for i in range(3)]
    launch(
        _add_up, (triton.cdiv(count, 64), triton.cdiv(columns, 128)), dx, dh, a, keys, *names, count, columns, rank,
        dx.stride(0), dh.stride(0), *_chance(p), PARTS=len(numbers), RP=_padded(rank), BT=64, BK=128, num_warps=4,
    )  # fmt: skip


@operation(
    "dropped_gradient(Tensor x, Tensor? scale, Tensor dh, Tensor keys, int number, float p, Tensor(a!) out) -> ()",
    flops=lambda x, scale, dh, *_: 2 * x[0] * x[1] * dh[1],
)
def gradient(x: Tensor, scale: Tensor | None, dh: Tensor, keys: Tensor, number: int, p: float, out: Tensor) -> None:
    """out [splits, r * K] gets partial sums of dh^T dropout(x), dh [T, r]."""
    (count, columns), rank = x.shape, dh.shape[1]
    span = triton.cdiv(triton.cdiv(count, out.shape[0]), 64) * 64
    launch(
        _gradient, (triton.cdiv(columns, 128), out.shape[0]), x, dh if scale is None else scale, dh, keys, number, out,
        count, columns, rank, x.stride(0), dh.stride(0), out.stride(0), *_chance(p), span, SCALED=scale is not None,
        RP=_padded(rank), BT=64, BK=128, num_warps=4, num_stages=3,
    )  # fmt: skip
