"""Numbers of 8 bits (e4m3) with few scales: what a frozen base is stored and multiplied in.

    quantise_rows, quantise_matrix     numbers and scales of activations (one a row) and of weights (one a matrix)
    split                              a number as the sum of two e4m3 ones
    product                            x w^T of two such operands
    supported                          whether a device multiplies them

The largest number a scale allows is 28 of e4m3's 448. It is a floating format, so the headroom costs next to no
precision, and it leaves room for an adapter's columns under the row's scale; with one scale a matrix, no scale has to
be folded into gradients (measured: docs/LOG.md). Format: Micikevicius et al., arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
TOP = 28.0
"""Largest magnitude of a quantised row or matrix, in units of its scale."""
LIMIT = 448.0
"""Largest magnitude that e4m3 holds; beyond it is NaN."""
TINY = 1e-10
"""Least magnitude a scale is made for: a row of zeros has a scale too."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> (e4m3 [T, K], fp32 [T]) with x = numbers * scale."""
    scale = x.abs().amax(1).float().clamp(min=TINY) / TOP
    return (x.float() / scale[:, None]).to(E4M3), scale


def quantise_matrix(weight: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (e4m3 [N, K], fp32 [1]). `amax` is the largest magnitude if more than these rows share it."""
    amax = weight.abs().amax() if amax is None else amax
    scale = (amax.float().clamp(min=TINY) / TOP).view(1)
    return (weight.float() / scale).to(E4M3), scale


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (hi, lo) e4m3 whose sum is x to about 8 bits; beyond +-448 it is cut."""
    x = x.clamp(-LIMIT, LIMIT)
    hi = x.to(E4M3)
    return hi, (x - hi.float()).to(E4M3)


def raw_product(
    x: Tensor, w: Tensor, one: Tensor, w_scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """x w^T * one * w_scale, both of one number, fp32 [1]: [T, N], in `out` if given. x's rows are without scales.

    On an H100 3 % faster than `product` (performance of cuBLAS, 8192 rows: 1,287 to 1,366 TFLOP/s for 1,250 to 1,330).
    """
    if x.is_cuda:
        return torch._scaled_mm(x, w.t(), one, w_scale, out_dtype=dtype, use_fast_accum=True, out=out)
    made = ((x.float() @ w.float().t()) * (one * w_scale)).to(dtype)
    return made if out is None else out.copy_(made)


def product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x w^T) * x_scale[:, None] * w_scale: e4m3 [T, K] and [N, K], contiguous; scales fp32 [T] and [N] -> [T, N]."""
    if x.is_cuda:
        scales = x_scale[:, None], w_scale[None]
        return torch._scaled_mm(x, w.t(), *scales, out_dtype=dtype, use_fast_accum=True)
    return ((x.float() @ w.float().t()) * x_scale[:, None] * w_scale).to(dtype)


def supported(device: torch.device) -> bool:
    """Whether there are float8 products: compute capability 8.9 or 9.0 and up. A CPU emulates them."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)
