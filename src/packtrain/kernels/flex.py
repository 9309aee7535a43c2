"""FlexAttention, torch's own: attention with a mask that is code, over the blocks that are not empty.

    obstacle                why it cannot train, or None
    suits                   whether it is as good as any for some tensors, short documents given
    document_mask           a batch's mask: made once, used by every layer
    flex                    attention by it

Blocks come from where documents begin and end, so that nothing of L x L elements is ever made. On CUDA it is one
compiled kernel; on a CPU it runs uncompiled, and torch has no backward for it there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from packtrain.batch import Batch

BLOCK = 128
"""Queries, and keys, of a block: what the kernels are made for."""

SHORT = 1024
"""Tokens of the mean document below which one call of it is faster than SDPA's for each. On an H100, 8,192 tokens, 32
heads of 128, forward and backward: of 128 documents 1.5 ms beside 32, of 16 1.5 beside 5.7, of 4 1.9 beside 1.8."""


def obstacle(device: torch.device, head_dim: int) -> str | None:
    """What keeps FlexAttention from training on such tensors, in a few words."""
    if device.type != "cuda":
        return f"FlexAttention has no backward on a {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled by Triton, which is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "FlexAttention is compiled, and there is no C compiler (gcc, clang)"
    if head_dim < 16:
        return f"FlexAttention takes heads of 16 or more, and this model's have {head_dim}"
    return None


def suits(batch: Batch, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it is faster than SDPA document by document: rows of several short ones, on a GPU, in 16 bits."""
    short = not batch.whole_rows and batch.ids.numel() < SHORT * len(batch.lengths)
    return short and fits(batch.ids.device, dtype, head_dim)


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether its kernels were measured for such tensors."""
    return dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 128) and obstacle(device, head_dim) is None


def flex(q: Tensor, k: Tensor, v: Tensor, batch: Batch, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """q [T, Hq, d], k and v [T, Hkv, d], a prefix of [P, Hkv, d] before every document -> [T, Hq, d]."""
    rows, length = batch.ids.shape
    q, k, v = (x.view(rows, length, *x.shape[1:]) for x in (q, k, v))
    if prefix is not None:
        k, v = (torch.cat([p.expand(rows, *p.shape), x], dim=1) for p, x in zip(prefix, (k, v), strict=True))
    mask = batch.mask if batch.mask is not None else document_mask(batch, k.shape[1] - length)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    made = _compiled()(q, k, v, block_mask=mask, enable_gqa=True) if q.is_cuda else _plain(q, k, v, mask)
    return cast(Tensor, made).transpose(1, 2).flatten(0, 1)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Any:
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def document_mask(batch: Batch, places: int) -> BlockMask:
    """Over [R, L] queries and [R, P + L] keys: `places` P that all see, then what is not behind in one's document."""
    documents = batch.documents
    length = documents.shape[1]

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, key] == documents[row, query])

    def seen_or_prefix(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < places) | seen(row, head, query, torch.relu(key - places))

    some, all_ = _blocks(documents, places)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~all_),
        *_ordered(all_),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen_or_prefix if places else seen,
        seq_lengths=(length, places + length),
    )


def _blocks(documents: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """bool [R, 1, query blocks, key blocks]: whether some pair, and every pair, of a block may be seen.

    Documents are numbered in order, so a block's first and last token say which are in it.
    """
    length, device = documents.shape[1], documents.device
    first_query = torch.arange(0, length, BLOCK, device=device)
    last_query = (first_query + BLOCK - 1).clamp(max=length - 1)
    first_key = torch.arange(-places, length, BLOCK, device=device)
    last_key = first_key + BLOCK - 1
    token, last_token = first_key.clamp(min=0), last_key.clamp(min=0, max=length - 1)
    begins, ends = documents[:, first_query, None], documents[:, last_query, None]
    some = (token <= last_query[:, None]) & (documents[:, None, last_token] >= begins)
    every = (last_key <= first_query[:, None]) & (documents[:, None, token] == ends) & (first_key >= 0)
    whole = first_query[:, None] + BLOCK <= length  # the kernel masks places behind the end where it masks at all
    some, every = some | (first_key < 0), (every | (last_key < 0)) & whole
    return some[:, None], every[:, None]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their numbers, those first: int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
