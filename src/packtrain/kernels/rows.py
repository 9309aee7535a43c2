"""Operations on a token's row, each one kernel on a GPU: what stands between a layer's products.

    Rows                                   rows that a product takes: values, then room for an adapter's columns
    Raw                                    what a product gives, its rows' scale still to come
    add_norm, norm_backward                residual + RMS norm
    copy                                   any rows as `Rows`
    silu_mul, silu_mul_backward            SwiGLU's gate
    rope_, rope_backward                   rotary embedding of the first heads

`Rows` of float8 have one scale a row (kernels/float8.py). Everything is computed in fp32 and rounded once. The plain
form below is the definition; kernels/rows_triton.py is the same for GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packtrain.kernels import float8

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on a CPU, for tests."""

RUNS_TRITON = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)

if RUNS_TRITON:
    from packtrain.kernels import rows_triton as triton_rows


def by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take this tensor; where none can run, fake ones of a GPU go the plain way."""
    return RUNS_TRITON and (x.is_cuda or INTERPRETED)


@dataclass(frozen=True, slots=True)
class Form:
    """How rows are laid out before a product."""

    dtype: torch.dtype
    """What is computed in."""

    float8: bool
    """Rows are e4m3 with a scale each; else they are of `dtype`."""

    def room(self, columns: int) -> int:
        """Columns an adapter's `columns` (a multiple of 8) take beside the values."""
        return 3 * columns if self.float8 else columns

    def width(self, values: int, columns: int) -> int:
        """Columns of a row in all: rows whose length is not a multiple of 128 bytes cost a product up to 30 %."""
        unit = 128 if self.float8 else 64
        return -(-(values + self.room(columns)) // unit) * unit if columns or self.float8 else values

    def empty(self, like: Tensor, count: int, values: int, columns: int) -> Rows:
        """Memory for `count` rows."""
        width = self.width(values, columns)
        data = torch.empty(count, width, dtype=float8.E4M3 if self.float8 else self.dtype, device=like.device)
        scale = torch.empty(count, dtype=torch.float32, device=like.device) if self.float8 else None
        return Rows(data, scale, values)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a product takes, [T, width]: `columns` values a row, then the adapter's columns (kernels/lowrank.py)."""

    data: Tensor
    scale: Tensor | None
    """fp32 [T] if the rows are float8: a value is its number times the row's."""
    columns: int

    @property
    def values(self) -> Tensor:
        """[T, columns] without the scale, a view."""
        return self.data[:, : self.columns]

    def put(self, values: Tensor) -> None:
        """The plain way to fill all of `values` fp32 [T, columns]."""
        if self.scale is None:
            self.values.copy_(values)
            return
        numbers, scale = float8.quantise_rows(values)
        self.scale.copy_(scale)
        self.data.view(torch.uint8).zero_()
        self.values.copy_(numbers)


class Raw(NamedTuple):
    """What a product gives, [T, N]: a value is its number times the row's scale, if there is one, fp32 [T].

    Whoever reads it multiplies, in a kernel that is there anyway: a product without scales of rows is faster.
    """

    values: Tensor
    scale: Tensor | None = None

    def exact(self) -> Tensor:
        """The values in fp32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale[:, None]


def _scale_or(rows: Rows, other: Tensor) -> Tensor:
    return other if rows.scale is None else rows.scale


def add_norm(
    x: Tensor,
    delta: Raw | None,
    weight: Tensor,
    eps: float,
    form: Form,
    columns: int,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Rows]:
    """z = x + delta, rounded; its RMS norm times weight [D], as rows.

    x and delta [T, D]. With `index` int64 [N] only those rows, in that order. Returns z [N, D], 1 / rms fp32 [N], rows.
    """
    change, change_scale = (None, None) if delta is None else delta
    if delta is None and index is not None:
        x, index = x.index_select(0, index), None
    count, width = x.shape[0] if index is None else index.shape[0], x.shape[1]
    rows = form.empty(x, count, width, columns)
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    z = x if delta is None else torch.empty(count, width, dtype=x.dtype, device=x.device)
    if by_triton(x):
        triton_rows.add_norm(x, change, change_scale, weight, index, eps, z, rstd, rows.data, _scale_or(rows, rstd))
        return z, rstd, rows
    if delta is not None:
        first, second = (t if index is None else t.index_select(0, index) for t in (x.float(), delta.exact()))
        z.copy_(first + second)
    wide = z.float()
    torch.rsqrt(wide.square().mean(1).add_(eps), out=rstd)
    rows.put(wide * rstd[:, None] * weight.float())
    return z, rstd, rows


def norm_backward(
    dy: Raw,
    z: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    form: Form,
    columns: int,
) -> tuple[Tensor, Rows, Tensor | None]:
    """Gradient of z: through the norm, plus `residual` [T, D], as a tensor [T, D] and as rows.

    Rows that are not float8 are the tensor: it is a view of them. Last, the gradient fp32 [D] of a weight that learns.
    """
    rows = form.empty(z, z.shape[0], z.shape[1], columns)
    dz = torch.empty_like(z) if form.float8 else rows.values
    learns = weight.requires_grad
    if by_triton(z):
        numbers = rows.data if form.float8 else None
        scale = _scale_or(rows, rstd)
        return dz, rows, triton_rows.norm_backward(*dy, z, weight, rstd, residual, None, dz, numbers, scale, learns)
    exact = _norm_gradient(dy.exact(), z, weight, rstd)
    if residual is not None:
        exact += residual.float()
    dz.copy_(exact)
    if form.float8:
        rows.put(exact)
    return dz, rows, _norm_weight_gradient(dy.exact(), z, rstd) if learns else None


def norm_backward_at(
    dy: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, index: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    """The same of all `count` rows where the norm saw only those of `index`: zero in the others."""
    dz = torch.zeros(count, z.shape[1], dtype=z.dtype, device=z.device)
    learns = weight.requires_grad
    if by_triton(z):
        return dz, triton_rows.norm_backward(dy, None, z, weight, rstd, None, index, dz, None, rstd, learns)
    dz.index_copy_(0, index, _norm_gradient(dy, z, weight, rstd).to(z.dtype))
    return dz, _norm_weight_gradient(dy, z, rstd) if learns else None


def _norm_gradient(dy: Tensor, z: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    g, unit = dy.float() * weight.float(), z.float() * rstd[:, None]
    return rstd[:, None] * (g - unit * (g * unit).mean(1, keepdim=True))


def _norm_weight_gradient(dy: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    return (dy.float() * z.float() * rstd[:, None]).sum(0)


def copy(x: Tensor, form: Form, columns: int) -> Rows:
    """x [T, K] as rows."""
    rows = form.empty(x, x.shape[0], x.shape[1], columns)
    if by_triton(x):
        triton_rows.copy(x, rows.data, x if rows.scale is None else rows.scale)
    else:
        rows.put(x.float())
    return rows


def silu_mul(gate_up: Raw, form: Form, columns: int) -> Rows:
    """silu(gate) * up of [T, 2 F] contiguous -> rows of F."""
    values = gate_up.values
    count, width = values.shape
    rows = form.empty(values, count, width // 2, columns)
    if by_triton(values):
        triton_rows.silu_mul(*gate_up, rows.data, _scale_or(rows, values))
    else:
        gate, up = gate_up.exact().chunk(2, 1)
        rows.put(gate * torch.sigmoid(gate) * up)
    return rows


def silu_mul_backward(gate_up: Raw, gradient: Raw, form: Form, columns: int) -> Rows:
    """From the gradient [T, F] of `silu_mul`, contiguous -> that of gate_up, as rows of 2 F."""
    count, width = gate_up.values.shape
    rows = form.empty(gate_up.values, count, width, columns)
    if by_triton(gate_up.values):
        triton_rows.silu_mul_backward(*gate_up, *gradient, rows.data, _scale_or(rows, gate_up.values))
        return rows
    gate, up = gate_up.exact().chunk(2, 1)
    d, sigmoid = gradient.exact(), torch.sigmoid(gate)
    rows.put(torch.cat([d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid], 1))
    return rows


def rope_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Turn the first `heads` heads of x [T, H * d] in place by cos, sin [T, d / 2], contiguous."""
    if by_triton(x):
        triton_rows.rope_(x, cos, sin, heads)
        return
    half = cos.shape[1]
    x[:, : heads * 2 * half] = _turned(x[:, : heads * 2 * half].float(), cos.float(), sin.float()).to(x.dtype)


def rope_backward(x: Tensor, cos: Tensor, sin: Tensor, heads: int, form: Form, columns: int) -> Rows:
    """The gradient x [T, H * d] turned back in its first `heads` heads, as rows."""
    rows = form.empty(x, x.shape[0], x.shape[1], columns)
    if by_triton(x):
        triton_rows.rope_backward(x, cos, sin, heads, rows.data, _scale_or(rows, x))
        return rows
    edge = heads * 2 * cos.shape[1]
    wide = x.float()
    rows.put(torch.cat([_turned(wide[:, :edge], cos.float(), -sin.float()), wide[:, edge:]], 1))
    return rows


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fp32 [T, H * d] turned by cos, sin fp32 [T, d / 2]."""
    first, second = x.view(x.shape[0], -1, 2 * cos.shape[1]).chunk(2, 2)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], 2).flatten(1)


__all__: list[Any] = ["Form", "Rows", "add_norm", "copy", "norm_backward", "norm_backward_at"]
__all__ += ["rope_", "rope_backward", "silu_mul", "silu_mul_backward"]
