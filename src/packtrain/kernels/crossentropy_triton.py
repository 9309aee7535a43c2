"""Cross-entropy of a chunk of logits in two sweeps of each row; kernels/loss.py is its seam."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from packtrain.kernels.rows_triton import launch


@triton.jit
def _cross_entropy(logits, targets, loss, V, ld, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
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
        for start in range(0, V, BLOCK):
            m = start + c < V
            x = tl.load(at + start + c, mask=m, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(start + c == target, 1.0, 0.0)
            tl.store(at + start + c, p.to(logits.dtype.element_ty), mask=m)


def cross_entropy(logits: Tensor, targets: Tensor, loss: Tensor, gradient: bool) -> None:
    """Losses fp32 [rows] of logits [rows, V]; with `gradient` the logits become their gradient.

    One program fills a multiprocessor, so that the rows in work fit in the L2 cache: the second sweep reads them there.
    """
    rows, vocabulary = logits.shape
    launch(
        _cross_entropy, (rows,), logits, targets, loss, vocabulary, logits.stride(0), GRADIENT=gradient, BLOCK=16384,
        num_warps=32,
    )  # fmt: skip
