"""Causal attention inside documents.

    attention(q, k, v, batch)     one call over rows when each row is one document, else one call a document

Every call is torch's scaled_dot_product_attention, which picks the machine's best kernel. A document's tokens meet
no other document's, so nothing is masked, and what stands beside a document cannot change its result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from packtrain.batch import Batch


def attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """q [T, Hq, d], k and v [T, Hkv, d] of one dtype, Hq a multiple of Hkv -> [T, Hq, d]; scores are over sqrt(d)."""
    if batch.whole_rows:
        rows, length = batch.ids.shape
        return _causal(*(x.view(rows, length, *x.shape[1:]) for x in (q, k, v))).reshape(q.shape)
    documents = zip(*(torch.split(x, list(batch.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(*(x.unsqueeze(0) for x in parts)).squeeze(0) for parts in documents])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[R, L, H, d] three times -> [R, L, Hq, d]."""
    group = q.shape[2] // k.shape[2]
    if group > 1 and q.is_cuda and q.dtype == torch.float32:
        # No fused fp32 kernel on CUDA has grouped heads; torch would fall back to one that makes all L x L scores.
        k, v, group = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1).transpose(1, 2)
