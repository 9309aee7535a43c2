"""Attention in two halves, for layers that write out their own backward.

    attend, attend_backward       kernels/attention.py's function, and its gradient from what the first half left

Without flash-attn-4 the halves are autograd's, over a graph of attention alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from packtrain.batch import Batch
from packtrain.kernels.attention import attention
from packtrain.kernels.flash import chosen, interface


class Attended(NamedTuple):
    """What `attend` leaves for its backward beside q, k and v."""

    out: Tensor
    """[T, Hq, d]."""
    lse: Tensor | None
    """flash-attn-4's log-sum-exp."""
    graph: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None
    """Where autograd goes back: the output, and q, k, v as its leaves."""


def attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, *, out: Tensor | None = None, keep: bool = True) -> Attended:
    """`attention` of tensors that autograd does not watch; written to `out` if given. `keep` for a backward."""
    if chosen(q, batch):
        found = interface()._flash_attn_fwd(q, k, v, **_documents(batch), return_lse=True, out=out)
        return Attended(found[0], found[1], None)
    if not keep:
        made, graph = attention(q, k, v, batch), None
    else:
        leaves = q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()
        with torch.enable_grad():
            made = attention(*leaves, batch)
        graph = made, leaves
    made = made.detach()
    return Attended(made if out is None else out.copy_(made), None, graph)


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, batch: Batch, into: tuple[Tensor, ...]
) -> None:
    """From the gradient of `out`, write those of q, k and v `into` three tensors of their shapes."""
    if attended.lse is not None:
        made = interface()._flash_attn_bwd(
            q, k, v, attended.out, gradient, attended.lse, **_documents(batch), dq=into[0], dk=into[1], dv=into[2]
        )
    else:
        output, leaves = (attended if attended.graph is not None else attend(q, k, v, batch)).graph or (None, None)
        assert output is not None
        assert leaves is not None
        made = torch.autograd.grad(output, leaves, gradient)
    for target, tensor in zip(into, made[:3], strict=True):
        if tensor.data_ptr() != target.data_ptr():
            target.copy_(tensor)


def _documents(batch: Batch) -> dict[str, Any]:
    edges, longest = batch.cu_seqlens, batch.max_seqlen
    return {
        "causal": True,
        "cu_seqlens_q": edges,
        "cu_seqlens_k": edges,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
