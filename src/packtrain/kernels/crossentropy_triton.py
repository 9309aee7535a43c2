"""Cross-entropy of a chunk of logits in two sweeps of each row, and a head's weight in float8.

kernels/loss.py and kernels/head.py are their seams.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.rows_triton import launch


@triton.jit
def _cross_entropy(
    logits, targets, loss, q, V, width, ld, unit, GRADIENT: tl.constexpr, FLOAT8: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * ld
    target = tl.load(targets + row)
    wanted = tl.load(at + target).to(tl.float32)
    c = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(at + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    most = tl.max(top, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    tl.store(loss + row, lse - wanted)
    if GRADIENT:
        for start in range(0, width, BLOCK):
            m = start + c < V
            x = tl.load(at + start + c, mask=m, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(start + c == target, 1.0, 0.0)
            if FLOAT8:
                to = q + row * width + start + c
                tl.store(to, (p * unit).to(q.dtype.element_ty), mask=start + c < width)
            else:
                tl.store(at + start + c, p.to(logits.dtype.element_ty), mask=m)


def cross_entropy(
    logits: Tensor, targets: Tensor, loss: Tensor, gradient: bool, small: Tensor | None = None, unit: float = 1.0
) -> None:
    """Losses fp32 [rows] of logits [rows, V]; with `gradient` the logits become their gradient.

    With `small` e4m3 [rows, V or more] it gets `unit` times the gradient instead, and zeros beyond V.
    One program fills a multiprocessor, so that the rows in work fit in the L2 cache: the second sweep reads them there.
    """
    rows, vocabulary = logits.shape
    to, width = (logits, vocabulary) if small is None else (small, small.shape[1])
    launch(
        _cross_entropy, (rows,), logits, targets, loss, to, vocabulary, width, logits.stride(0), unit,
        GRADIENT=gradient, FLOAT8=small is not None, BLOCK=16384, num_warps=32,
    )  # fmt: skip


@triton.jit
def _quantise_transposed(w, times, to, N, K, width, ldw, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    at = w + n[:, None].to(tl.int64) * ldw + k[None, :]
    x = tl.load(at, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0).to(tl.float32)
    x = (x * tl.load(times)).to(to.dtype.element_ty)
    to += k[:, None].to(tl.int64) * width + n[None, :]
    tl.store(to, tl.trans(x), mask=(k[:, None] < K) & (n[None, :] < width))


def quantise_transposed(weight: Tensor, times: Tensor, to: Tensor) -> None:
    """to[k, n] = weight[n, k] * times, fp32 [1]; weight [N, K], to e4m3 [K, N or more], zeros beyond N."""
    (n, k), width = weight.shape, to.shape[1]
    grid = triton.cdiv(width, 128), triton.cdiv(k, 128)
    launch(_quantise_transposed, grid, weight, times, to, n, k, width, weight.stride(0), BN=128, BK=128, num_warps=8)
