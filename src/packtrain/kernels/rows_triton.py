"""The row operations as Triton kernels: one read and one write of each number, a token's whole row in registers.

`kernels/rows.py` is their seam, with what each computes in plain PyTorch. A row of the output is `width` columns: the
values, then room for an adapter's columns; float8 rows are zero there, for a product reads them. Offsets are 64-bit.
"""

# mypy: ignore-errors

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TOP = tl.constexpr(28.0)
"""Largest value of a float8 row in units of its scale, of the format's 448 (kernels/float8.py says why)."""

NORM_ROWS = 16
"""Rows whose share of a norm's weight gradient one program sums."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel, unless there is nothing to do or its tensors are fake: outputs have been made by then."""
    if 0 in grid or isinstance(arguments[0], FakeTensor):
        return
    kernel[grid](*arguments, **settings)


@triton.jit
def _store_row(q, s, row, c, value, m, at, K, ld, top, FLOAT8: tl.constexpr, PAD: tl.constexpr):
    """value [BLOCK] into a row from column `at`; float8 rows with their scale, and zeros beyond column K."""
    if FLOAT8:
        scale = tl.maximum(top, 1e-10) / TOP
        tl.store(q + row * ld + at + c, (value * (1.0 / scale)).to(q.dtype.element_ty), mask=m)
        tl.store(s + row, scale)
        pad = tl.arange(0, PAD)
        tl.store(q + row * ld + K + pad, tl.zeros((PAD,), tl.float32).to(q.dtype.element_ty), mask=K + pad < ld)
    else:
        tl.store(q + row * ld + at + c, value.to(q.dtype.element_ty), mask=m)


@triton.jit
def _add_norm(
    x, delta, ds, w, index, z, rstd, q, s, D, ldx, ldd, ld, eps,
    ADD: tl.constexpr, SCALED: tl.constexpr, INDEXED: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if INDEXED:
        source = tl.load(index + row)
    c = tl.arange(0, BLOCK)
    m = c < D
    a = tl.load(x + source * ldx + c, mask=m, other=0.0).to(tl.float32)
    if ADD:
        change = tl.load(delta + source * ldd + c, mask=m, other=0.0).to(tl.float32)
        if SCALED:
            change *= tl.load(ds + source)
        a += change
        rounded = a.to(z.dtype.element_ty)
        tl.store(z + row * D + c, rounded, mask=m)
        a = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(a * a, 0) / D + eps)
    tl.store(rstd + row, r)
    y = a * r * tl.load(w + c, mask=m, other=0.0).to(tl.float32)
    _store_row(q, s, row, c, y, m, 0, D, ld, tl.max(tl.abs(y), 0), FLOAT8, PAD)


@triton.jit
def _norm_backward(
    dy, ds, z, w, rstd, residual, index, dz, q, s, partial, T, D, lddy, ldr, lddz, ld,
    SCALED: tl.constexpr, RESIDUAL: tl.constexpr, INDEXED: tl.constexpr, FLOAT8: tl.constexpr, LEARNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    m = c < D
    weight = tl.load(w + c, mask=m, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    top = tl.program_id(0) * ROWS
    for i in range(top, tl.minimum(top + ROWS, T)):
        row = tl.cast(i, tl.int64)
        r = tl.load(rstd + row)
        g = tl.load(dy + row * lddy + c, mask=m, other=0.0).to(tl.float32)
        if SCALED:
            g *= tl.load(ds + row)
        unit = tl.load(z + row * D + c, mask=m, other=0.0).to(tl.float32) * r
        if LEARNS:
            summed += g * unit
        g = g * weight
        out = r * (g - unit * (tl.sum(g * unit, 0) / D))
        if RESIDUAL:
            out += tl.load(residual + row * ldr + c, mask=m, other=0.0).to(tl.float32)
        target = row
        if INDEXED:
            target = tl.load(index + row)
        tl.store(dz + target * lddz + c, out.to(dz.dtype.element_ty), mask=m)
        if FLOAT8:
            _store_row(q, s, row, c, out, m, 0, D, ld, tl.max(tl.abs(out), 0), FLOAT8, PAD)
    if LEARNS:
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + c, summed, mask=m)


@triton.jit
def _copy(x, q, s, K, ldx, ld, FLOAT8: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    m = c < K
    a = tl.load(x + row * ldx + c, mask=m, other=0.0).to(tl.float32)
    _store_row(q, s, row, c, a, m, 0, K, ld, tl.max(tl.abs(a), 0), FLOAT8, PAD)


@triton.jit
def _silu_mul(
    gate_up, gs, q, s, F, ld, SCALED: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = c < F
    at = gate_up + row * 2 * F
    g = tl.load(at + c, mask=m, other=0.0).to(tl.float32)
    u = tl.load(at + F + c, mask=m, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(gs + row)
        g *= scale
        u *= scale
    a = g * tl.sigmoid(g) * u
    _store_row(q, s, row, c, a, m, 0, F, ld, tl.max(tl.abs(a), 0), FLOAT8, PAD)


@triton.jit
def _silu_mul_backward(
    gate_up, gs, da, ds, q, s, F, ld,
    SCALED: tl.constexpr, SCALED_BY: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = c < F
    at = gate_up + row * 2 * F
    g = tl.load(at + c, mask=m, other=0.0).to(tl.float32)
    u = tl.load(at + F + c, mask=m, other=0.0).to(tl.float32)
    d = tl.load(da + row * F + c, mask=m, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(gs + row)
        g *= scale
        u *= scale
    if SCALED_BY:
        d *= tl.load(ds + row)
    sigmoid = tl.sigmoid(g)
    du = d * g * sigmoid
    dg = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    if FLOAT8:
        top = tl.maximum(tl.max(tl.abs(du), 0), tl.max(tl.abs(dg), 0))
        dg = dg * (TOP / tl.maximum(top, 1e-10))
        tl.store(q + row * ld + c, dg.to(q.dtype.element_ty), mask=m)
        _store_row(q, s, row, c, du, m, F, 2 * F, ld, top, FLOAT8, PAD)
    else:
        tl.store(q + row * ld + c, dg.to(q.dtype.element_ty), mask=m)
        tl.store(q + row * ld + F + c, du.to(q.dtype.element_ty), mask=m)


@triton.jit
def _rope(x, cos, sin, ldx, ROTATED, HALF, HEADS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    m = (h < ROTATED) & (j < HALF)
    c = tl.load(cos + row * HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
    n = tl.load(sin + row * HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
    at = x + row * ldx + h * 2 * HALF + j
    a = tl.load(at, mask=m, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=m, other=0.0).to(tl.float32)
    tl.store(at, (a * c - b * n).to(x.dtype.element_ty), mask=m)
    tl.store(at + HALF, (b * c + a * n).to(x.dtype.element_ty), mask=m)


@triton.jit
def _rope_backward(
    x, cos, sin, q, s, ldx, ld, ROTATED, ALL, HALF,
    FLOAT8: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    m = (h < ALL) & (j < HALF)
    turned = h < ROTATED
    c = tl.where(turned, tl.load(cos + row * HALF + j, mask=j < HALF, other=0.0).to(tl.float32), 1.0)
    n = tl.where(turned, tl.load(sin + row * HALF + j, mask=j < HALF, other=0.0).to(tl.float32), 0.0)
    at = x + row * ldx + h * 2 * HALF + j
    a = tl.load(at, mask=m, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=m, other=0.0).to(tl.float32)
    first = a * c + b * n
    second = b * c - a * n
    to = q + row * ld + h * 2 * HALF + j
    if FLOAT8:
        scale = tl.maximum(tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second))), 1e-10) / TOP
        first = first * (1.0 / scale)
        second = second * (1.0 / scale)
        tl.store(s + row, scale)
        K = ALL * 2 * HALF
        pad = tl.arange(0, PAD)
        tl.store(q + row * ld + K + pad, tl.zeros((PAD,), tl.float32).to(q.dtype.element_ty), mask=K + pad < ld)
    tl.store(to, first.to(q.dtype.element_ty), mask=m)
    tl.store(to + HALF, second.to(q.dtype.element_ty), mask=m)


def _shape(columns: int, width: int, float8: bool) -> dict[str, Any]:
    """What a kernel is compiled for, from a row's columns of values and in all."""
    block = triton.next_power_of_2(columns)
    warps = 32 if block >= 16384 else 16 if block >= 8192 else 8 if block >= 2048 else 4
    return {
        "FLOAT8": float8,
        "BLOCK": block,
        "PAD": triton.next_power_of_2(max(width - columns, 1)),
        "num_warps": warps,
    }


def _tiles(columns: int, width: int, float8: bool) -> tuple[int, dict[str, Any]]:
    """(tiles a row, settings): float8 needs a row's largest value and takes it whole, the rest goes in tiles."""
    if float8:
        return 1, _shape(columns, width, float8)
    block = min(4096, triton.next_power_of_2(columns))
    return triton.cdiv(columns, block), {"FLOAT8": False, "BLOCK": block, "PAD": 1, "num_warps": 8}


def add_norm(
    x: Tensor, delta: Tensor | None, delta_scale: Tensor | None, weight: Tensor, index: Tensor | None, eps: float,
    z: Tensor, rstd: Tensor, q: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    float8, columns = q.element_size() == 1, x.shape[1]
    launch(
        _add_norm, (rstd.shape[0],), x, x if delta is None else delta, rstd if delta_scale is None else delta_scale,
        weight, rstd if index is None else index, z, rstd, q, scale, columns, x.stride(0),
        0 if delta is None else delta.stride(0), q.stride(0), eps,
        ADD=delta is not None, SCALED=delta_scale is not None, INDEXED=index is not None,
        **_shape(columns, q.shape[1], float8),
    )  # fmt: skip


def norm_backward(
    dy: Tensor, dy_scale: Tensor | None, z: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None,
    index: Tensor | None, dz: Tensor, q: Tensor | None, scale: Tensor, learns: bool,
) -> Tensor | None:  # fmt: skip
    """The gradient of the weight, fp32 [D], if it `learns`: summed over rows in parts of always the same size."""
    count, columns = z.shape
    rows = dz if q is None else q
    each = NORM_ROWS if learns else 1
    programs = triton.cdiv(count, each)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=z.device) if learns else rstd
    launch(
        _norm_backward, (programs,), dy, rstd if dy_scale is None else dy_scale, z, weight, rstd,
        dy if residual is None else residual, rstd if index is None else index, dz, rows, scale, partial, count,
        columns, dy.stride(0), 0 if residual is None else residual.stride(0), dz.stride(0), rows.stride(0),
        SCALED=dy_scale is not None, RESIDUAL=residual is not None, INDEXED=index is not None, LEARNS=learns, ROWS=each,
        **_shape(columns, rows.shape[1], q is not None),
    )  # fmt: skip
    return partial.sum(0) if learns else None


def copy(x: Tensor, q: Tensor, scale: Tensor) -> None:
    columns, float8 = x.shape[1], q.element_size() == 1
    launch(_copy, (x.shape[0],), x, q, scale, columns, x.stride(0), q.stride(0), **_shape(columns, q.shape[1], float8))


def silu_mul(gate_up: Tensor, scaled: Tensor | None, q: Tensor, scale: Tensor) -> None:
    columns = gate_up.shape[1] // 2
    tiles, settings = _tiles(columns, q.shape[1], q.element_size() == 1)
    launch(
        _silu_mul, (gate_up.shape[0], tiles), gate_up, scale if scaled is None else scaled, q, scale, columns,
        q.stride(0), SCALED=scaled is not None, **settings,
    )  # fmt: skip


def silu_mul_backward(
    gate_up: Tensor, scaled: Tensor | None, da: Tensor, da_scale: Tensor | None, q: Tensor, scale: Tensor
) -> None:
    columns = gate_up.shape[1] // 2
    tiles, settings = _tiles(columns, q.shape[1] - columns, q.element_size() == 1)
    launch(
        _silu_mul_backward, (gate_up.shape[0], tiles), gate_up, scale if scaled is None else scaled, da,
        scale if da_scale is None else da_scale, q, scale, columns, q.stride(0), SCALED=scaled is not None,
        SCALED_BY=da_scale is not None, **settings,
    )  # fmt: skip


def rope_(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    half = cos.shape[1]
    launch(
        _rope, (x.shape[0],), x, cos, sin, x.stride(0), rotated, half,
        HEADS=triton.next_power_of_2(rotated), WIDE=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


def rope_backward(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, q: Tensor, scale: Tensor) -> None:
    half, columns = cos.shape[1], x.shape[1]
    heads = columns // (2 * half)
    launch(
        _rope_backward, (x.shape[0],), x, cos, sin, q, scale, x.stride(0), q.stride(0), rotated, heads, half,
        FLOAT8=q.element_size() == 1, HEADS=triton.next_power_of_2(heads), WIDE=triton.next_power_of_2(half),
        PAD=triton.next_power_of_2(max(q.shape[1] - columns, 1)), num_warps=8,
    )  # fmt: skip
