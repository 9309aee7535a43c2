"""The one thing that data, model and kernels share: a micro-batch, made whole on the host.

Shapes: R rows, L columns, T = R * L tokens in row order, D documents, N labelled tokens.

A document is a run of tokens that attend to one another and to nothing else. Documents tile all T tokens:
padding at a row's end is a document of its own, so that no token is without one. Everything a step may ask
about the batch (lengths, the longest, how many labels) is a Python number, so that nothing asks the device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that is not trained (PyTorch's and Hugging Face's value)."""


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device, its copy queued: pinned first, since from other memory the host waits for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's micro-batch. Tensors are on one device; `to` moves them all."""

    ids: Tensor
    """int64 [R, L], token ids; padding has a valid id and no label."""

    positions: Tensor
    """int64 [R, L], place of each token in its document, from 0."""

    cu_seqlens: Tensor
    """int32 [D + 1], where documents begin and end among the T tokens."""

    lengths: tuple[int, ...]
    """Documents' lengths on the host; they add up to T."""

    max_seqlen: int
    """The longest of `lengths`."""

    whole_rows: bool
    """Each row holds one document from its first column, then padding: causal attention over [R, L] needs no mask."""

    index: Tensor
    """int64 [N], places among the T tokens whose next token is trained (never the last of a document)."""

    targets: Tensor
    """int64 [N], those next tokens."""

    keys: Tensor
    """int64 [R, L], a random key of each token, from (seed, step, row in the global order, position): for dropout."""

    tokens: int
    """Tokens that are not padding."""

    rows: tuple[int, ...]
    """Numbers of the data's rows in this batch; empty for a batch that only keeps ranks in step."""

    kernel: str = "auto"
    """Which attention (kernels/attention.py); the model says it."""

    mask: Any = None
    """What that kernel has made of the documents, once for all layers."""

    @property
    def count(self) -> int:
        """N, the number of labelled tokens."""
        return self.targets.numel()

    @property
    def documents(self) -> Tensor:
        """int64 [R, L], the number of each token's document, from 0; made on the tensors' device."""
        places = torch.arange(self.ids.numel(), dtype=torch.int32, device=self.cu_seqlens.device)
        return (torch.searchsorted(self.cu_seqlens, places, right=True) - 1).view(self.ids.shape)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; copies are queued, not waited for."""
        moved: dict[str, Any] = {
            f.name: queued(value, device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
