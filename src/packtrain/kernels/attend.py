"""Attention in two halves, for layers that write out their own backward.

    attend, attend_backward       kernels/attention.py's function, and its gradient from what the first half left
    attend_long, ..._backward     the same of rows so long that few heads at a time attend

Without flash-attn-4 the halves are autograd's, over a graph of attention alone. flash-attn-4's own halves are
operations of torch (kernels/operations.py), whose FLOPs are of the pairs of tokens in which one sees the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from packtrain.batch import Batch
from packtrain.kernels.attention import attention
from packtrain.kernels.flash import chosen, interface
from packtrain.kernels.operations import operation


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
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        return Attended(out, _flash(q, k, v, batch.cu_seqlens, batch.max_seqlen, batch.lengths, out), None)
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
        documents = batch.cu_seqlens, batch.max_seqlen, batch.lengths
        _flash_backward(q, k, v, attended.out, gradient, attended.lse, *documents, *into)
        return
    output, leaves = (attended if attended.graph is not None else attend(q, k, v, batch)).graph or (None, None)
    assert output is not None
    assert leaves is not None
    for target, tensor in zip(into, torch.autograd.grad(output, leaves, gradient), strict=True):
        target.copy_(tensor)


SUMS = 2**31
"""Bytes that the fp32 sums of dq in one call of `attend_long_backward` take at most: heads go in groups for that."""


class AttendedLong(NamedTuple):
    """What `attend_long` leaves: as `Attended`, with a graph for each group of heads."""

    out: Tensor
    lse: Tensor | None
    graphs: list[Any]


def groups(queries: int, keys: int, head: int, tokens: int) -> int:
    """Into how many groups the heads go: keys' heads with the queries' that read them, none parted."""
    most = max(1, SUMS // (4 * head * tokens))
    return next(
        parts for parts in range(1, keys + 1) if keys % parts == 0 and (queries // parts <= most or parts == keys)
    )


def attend_long(q: Tensor, k: Tensor, v: Tensor, batch: Batch, keep: bool = True) -> AttendedLong:
    """`attend`, a group of heads after the other, each in memory of its own: no call sees more than 2^31 bytes."""
    out, lses, graphs = torch.empty_like(q, memory_format=torch.contiguous_format), [], []
    for mine, theirs in _slices(q, k):
        made, lse, graph = attend(
            q[:, mine].contiguous(), k[:, theirs].contiguous(), v[:, theirs].contiguous(), batch, keep=keep
        )
        out[:, mine].copy_(made)
        lses.append(lse)
        graphs.append(graph)
    lse = None if lses[0] is None else torch.cat(cast(list[Tensor], lses))
    return AttendedLong(out, lse, graphs)


def attend_long_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: AttendedLong, batch: Batch
) -> None:
    """From the gradient of `out`, write those of q, k and v over them."""
    for place, (mine, theirs) in enumerate(_slices(q, k)):
        views = q[:, mine], k[:, theirs], v[:, theirs]
        lse = None if attended.lse is None else attended.lse[mine]
        graph = attended.graphs[place] if attended.graphs else None
        _group_backward(gradient[:, mine], views, Attended(attended.out[:, mine], lse, graph), batch)


def _group_backward(gradient: Tensor, views: tuple[Tensor, ...], attended: Attended, batch: Batch) -> None:
    q, k, v = (view.contiguous() for view in views)
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    left = attended._replace(out=attended.out.contiguous())
    attend_backward(gradient.contiguous(), q, k, v, left, batch, into)
    for view, made in zip(views, into, strict=True):
        view.copy_(made)


def _slices(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    parts = groups(q.shape[1], k.shape[1], q.shape[2], q.shape[0])
    mine, theirs = q.shape[1] // parts, k.shape[1] // parts
    return [(slice(i * mine, (i + 1) * mine), slice(i * theirs, (i + 1) * theirs)) for i in range(parts)]


@operation(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor edges, int longest, int[] lengths, Tensor(a!) out) -> Tensor",
    flops=lambda q, k, v, edges, longest, lengths, *_: 4 * _pairs(lengths) * q[1] * q[2],
    fake=lambda q, *_: q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
)
def _flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, lengths: Sequence[int], out: Tensor) -> Tensor:
    """log-sum-exp fp32 [Hq, T]; attention's output goes to `out`."""
    made = interface()._flash_attn_fwd(q, k, v, **_documents(edges, longest), return_lse=True, out=out)
    return cast(Tensor, made[1])


@operation(
    "flash_attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor gradient, Tensor lse, Tensor edges, "
    "int longest, int[] lengths, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()",
    flops=lambda q, k, v, out, gradient, lse, edges, longest, lengths, *_: 10 * _pairs(lengths) * q[1] * q[2],
)
def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor, lse: Tensor, edges: Tensor, longest: int,
    lengths: Sequence[int], dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    made = interface()._flash_attn_bwd(q, k, v, out, gradient, lse, **_documents(edges, longest), dq=dq, dk=dk, dv=dv)
    for target, tensor in zip((dq, dk, dv), made[:3], strict=True):
        if tensor.data_ptr() != target.data_ptr():
            target.copy_(tensor)


def _pairs(lengths: Sequence[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


def _documents(edges: Tensor, longest: int) -> dict[str, Any]:
    return {
        "causal": True,
        "cu_seqlens_q": edges,
        "cu_seqlens_k": edges,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
