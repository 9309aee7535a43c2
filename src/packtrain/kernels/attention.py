"""Causal attention inside documents, by the kernel that the batch names.

    attention(q, k, v, batch)       sdpa, eager, flex (flex.py) or flash (flash.py)
    attention_to_all(q, k, v)       every token to every key, which have no place: a learned prompt's
    prepared(batch, kernel, ...)    the batch with a kernel, and what that needs once for all layers; auto is flash if
                                    that can be, else flex for rows of short documents, else sdpa

sdpa is torch's scaled_dot_product_attention, which picks the machine's best kernel: one call over rows when each row
is one document, else one call a document. A document's tokens meet no other document's there, so nothing is masked,
and what stands beside a document cannot change its result. eager is the plain mathematics with a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from packtrain.batch import Batch
from packtrain.kernels import attention_cpu
from packtrain.kernels.flash import chosen, flash, obstacle
from packtrain.kernels.flex import document_mask, flex, suits

Kernel = Literal["auto", "sdpa", "flash", "flex", "eager"]
Prefix = tuple[Tensor, Tensor]
"""Keys and values [P, Hkv, d] that stand before every document."""


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, prefix: Prefix | None = None) -> Tensor:
    """q [T, Hq, d], k and v [T, Hkv, d] of one dtype, Hq a multiple of Hkv -> [T, Hq, d]; scores are over sqrt(d).

    Keys and values of a `prefix`, [P, Hkv, d] each, stand before every document: all its tokens see them.
    """
    kernel = "flash" if chosen(q, batch) else "sdpa" if batch.kernel == "auto" else batch.kernel
    return _KERNELS[kernel](q, k, v, batch, prefix)


def attention_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [T, Hq, d], k and v [P, Hkv, d] -> [T, Hq, d]: softmax over all P keys, whatever the document."""
    return _attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), is_causal=False).squeeze(0)


def prepared(batch: Batch, kernel: Kernel, places: int, dtype: torch.dtype, head_dim: int) -> Batch:
    """The batch for `kernel`, and for attention in `dtype` over heads of `head_dim`.

    `places` is the length of the prefix that attention will be given, 0 for none.
    """
    if kernel == "auto":
        kernel = "flash" if obstacle(batch.ids.device, dtype, head_dim) is None else "sdpa"
        kernel = "flex" if kernel == "sdpa" and suits(batch, dtype, head_dim) else kernel
    return replace(batch, kernel=kernel, mask=document_mask(batch, places) if kernel == "flex" else None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, batch: Batch, prefix: Prefix | None) -> Tensor:
    """`attention` by torch's scaled_dot_product_attention."""
    if batch.whole_rows:
        rows, length = batch.ids.shape
        q, k, v = (x.view(rows, length, *x.shape[1:]) for x in (q, k, v))
        return _causal(q, k, v, prefix=prefix).flatten(0, 1)
    documents = zip(*(torch.split(x.unsqueeze(0), list(batch.lengths), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(*parts, prefix=prefix).squeeze(0) for parts in documents])


def eager(q: Tensor, k: Tensor, v: Tensor, batch: Batch, prefix: Prefix | None) -> Tensor:
    """`attention` as it is written down: all scores of a row, a mask, an fp32 softmax. Memory of R x Hq x L x L."""
    rows, length = batch.ids.shape
    q, k, v = (x.view(rows, length, *x.shape[1:]) for x in (q, k, v))
    documents = batch.documents
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    if prefix is not None:
        k, v = (torch.cat([p.expand(rows, *p.shape), x], dim=1) for p, x in zip(prefix, (k, v), strict=True))
        seen = torch.cat([seen.new_ones(rows, length, k.shape[1] - length), seen], dim=2)
    q = q.reshape(rows, length, k.shape[2], -1, q.shape[-1])
    scores = torch.einsum("rlhgd,rshd->rhgls", q, k) * q.shape[-1] ** -0.5
    shares = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.einsum("rhgls,rshd->rlhgd", shares, v).flatten(2, 3).flatten(0, 1)


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Batch, Prefix | None], Tensor]] = {
    "sdpa": sdpa,
    "eager": eager,
    "flex": flex,
    "flash": flash,
}


def _causal(q: Tensor, k: Tensor, v: Tensor, *, prefix: Prefix | None) -> Tensor:
    """[R, L, H, d] three times -> [R, L, Hq, d]."""
    if prefix is None:
        return _attend(q, k, v, is_causal=True)
    # The prefix gets queries too, which nobody reads: so the mask stays the one that every kernel has.
    places = len(prefix[0])
    q = torch.cat([q.new_zeros(len(q), places, *q.shape[2:]), q], dim=1)
    k, v = (torch.cat([p.expand(len(x), *p.shape), x], dim=1) for p, x in zip(prefix, (k, v), strict=True))
    return _attend(q, k, v, is_causal=True)[:, places:]


def _attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """q [R, L, Hq, d], k and v [R, S, Hkv, d] -> [R, L, Hq, d]."""
    if is_causal and attention_cpu.suits(q, k, v):
        return attention_cpu.causal(q, k, v)
    group = q.shape[2] // k.shape[2]
    if group > 1 and q.is_cuda and q.dtype == torch.float32:
        # No fused fp32 kernel on CUDA has grouped heads; torch would fall back to one that makes all L x L scores.
        k, v, group = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=group > 1).transpose(1, 2)
