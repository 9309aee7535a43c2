"""flash-attn-4, where it is installed: one call for all documents of a batch, none of them padded.

    obstacle                why it cannot be used, or None
    chosen                  whether a batch is to use it
    flash                   attention by it, watched by autograd
    interface               its own module, whose two halves kernels/attend.py calls

It is the package flash-attn-4, imported as flash_attn.cute (CuTe kernels for Hopper and newer).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from packtrain.batch import Batch

HEADS = (64, 128)
"""Values a head that have a forward and a backward on every machine it runs on; Llama has no others."""


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps flash-attn-4 from such tensors, in a few words."""
    if device.type != "cuda":
        return f"flash-attn-4 needs an NVIDIA GPU, and this runs on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        return f"flash-attn-4 needs compute capability 9.0 or higher, and this GPU has {major}.{minor}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn-4 takes bf16 and fp16, and the model computes in {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEADS:
        return f"flash-attn-4 takes heads of {' or '.join(map(str, HEADS))}, and this model's have {head_dim}"
    return None if interface() is not None else "flash-attn-4 is not installed"


def chosen(q: Tensor, batch: Batch) -> bool:
    """Whether attention over q [T, Hq, d] is flash-attn-4's: as the batch says, or where it can be."""
    if batch.kernel != "auto":
        return batch.kernel == "flash"
    return q.is_cuda and obstacle(q.device, q.dtype, q.shape[-1]) is None


@functools.cache
def interface() -> Any:
    """flash_attn.cute.interface, or None where it is not installed; importing it takes seconds, so at first use."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    _keep_compiled()
    wheel = importlib.util.find_spec("nvidia_cutlass_dsl")
    for place in wheel.submodule_search_locations or () if wheel else ():
        packages = Path(place) / "dsl_packages"
        if packages.is_dir() and str(packages) not in sys.path:
            sys.path.append(str(packages))  # its .pth file says so, which is not read outside of site-packages
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError:
        return None


def _keep_compiled() -> None:
    """Let it keep what it compiles, some 10 s of a run, in this user's own folder: its choice is one in /tmp."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "packtrain" / "flash-attn-4"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(place))


def flash(q: Tensor, k: Tensor, v: Tensor, batch: Batch, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """q [T, Hq, d], k and v [T, Hkv, d], a prefix of [P, Hkv, d] before every document -> [T, Hq, d]."""
    edges, longest = batch.cu_seqlens, batch.max_seqlen
    if prefix is not None:
        places = len(prefix[0])
        k, v = (_with_prefix(p, x, batch) for p, x in zip(prefix, (k, v), strict=True))
        edges, longest = (
            edges + places * torch.arange(len(edges), dtype=edges.dtype, device=edges.device),
            longest + places,
        )
    # With more keys than queries its causal mask is aligned to the last ones: a prefix is seen by all.
    made = interface().flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_k=edges,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_k=longest,
        causal=True,
    )
    return cast(Tensor, made[0] if isinstance(made, tuple) else made)


def _with_prefix(prefix: Tensor, x: Tensor, batch: Batch) -> Tensor:
    """[P, H, d] and [T, H, d] -> [T + D P, H, d]: each document's keys, the prefix before them."""
    tokens, starts, places = len(x), batch.cu_seqlens[:-1].long(), len(prefix)
    document = torch.arange(len(starts), device=x.device)
    of_token = batch.documents.flatten()
    own = torch.arange(tokens, device=x.device) + (of_token + 1) * places
    shared = (starts + document * places)[:, None] + torch.arange(places, device=x.device)
    made = x.new_zeros(tokens + len(starts) * places, *x.shape[1:])
    made = made.index_copy(0, own, x)
    return made.index_copy(0, shared.flatten(), prefix.repeat(len(starts), 1, 1))
