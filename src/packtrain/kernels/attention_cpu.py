"""Causal attention in fp32 on a CPU, with a backward of large products.

    suits(q, k, v)       whether these are tensors for it
    causal(q, k, v)      torch's fused attention; its gradients, block of queries by block of queries

torch's fused backward for CPUs makes many small products. Here a block's queries of all heads that share a key are one
operand, its scores against all the keys it sees are made again, and five products follow: less time on one or two
threads, from some hundred tokens on (docs/LOG.md). The forward's log-sum-exp and output are not kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST = 256
"""Tokens below which torch's own backward is as fast."""

MOST_THREADS = 2
"""Threads up to which this was seen to be faster: torch's own has more that can be done side by side."""

BLOCK = 48
"""Queries of a head at a time: their scores stay in a core's cache."""


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """fp32 on a CPU with few threads, a gradient is wanted, rows long enough, and no mode of torch's watches."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[1] >= LEAST
        and torch.get_num_threads() <= MOST_THREADS
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (q, k, v))
        and not torch._C._len_torch_dispatch_stack()
    )


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [R, L, Hq, d], k and v [R, L, Hkv, d] fp32 -> [R, L, Hq, d]; scores are over sqrt(d)."""
    return cast(Tensor, _Causal.apply(q, k, v))  # type: ignore[no-untyped-call]


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        grouped = q.shape[2] > k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        keys, group, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[3] ** -0.5
        gradient, scaled, by_key, values = (_by_key(x, keys) for x in (gradient, q * scale, k, v))
        dq, dk, dv = _gradients(gradient, scaled, by_key, values, group)
        return _by_token(dq.mul_(scale), q), _by_token(dk, k), _by_token(dv, v)


def _by_key(x: Tensor, keys: int) -> Tensor:
    """[R, L, H, d] -> [R * keys, L * H / keys, d]: the heads of a key are rows of one matrix, token after token."""
    rows, length, heads, width = x.shape
    x = x.reshape(rows, length, keys, heads // keys, width).transpose(1, 2)
    return x.reshape(rows * keys, length * heads // keys, width)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """`_by_key`, undone."""
    rows, length, _, width = like.shape
    return x.view(rows, len(x) // rows, length, -1, width).transpose(1, 2).reshape(like.shape)


def _gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of q (scaled), k and v: [B, L * group, d] and twice [B, L, d]."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    later = torch.full((BLOCK, BLOCK), -torch.inf, device=q.device).triu_(1).unsqueeze(1)
    for start in range(0, k.shape[1], BLOCK):
        stop = min(start + BLOCK, k.shape[1])
        block, count = slice(start * group, stop * group), stop - start
        scores = torch.bmm(q[:, block], k[:, :stop].transpose(1, 2))
        scores.view(-1, count, group, stop)[..., start:] += later[:count, :, :count]
        shares = torch.softmax(scores, -1)
        dv[:, :stop].baddbmm_(shares.transpose(1, 2), gradient[:, block])
        dshares = torch.bmm(gradient[:, block], v[:, :stop].transpose(1, 2))
        dscores = torch._softmax_backward_data(dshares, shares, -1, q.dtype)
        dk[:, :stop].baddbmm_(dscores.transpose(1, 2), q[:, block])
        torch.bmm(dscores, k[:, :stop], out=dq[:, block])
    return dq, dk, dv
