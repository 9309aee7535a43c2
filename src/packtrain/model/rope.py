"""Rotary position embedding's angles, once a batch; kernels/elementwise.py turns queries and keys by them.

    RopeParameters                      Hugging Face's `rope_parameters`, of the four types Llama has used
    cos_sin(rope, ...)                  the batch's cosines and sines, from positions and documents

Frequencies are made anew from the settings for every batch, some 64 numbers on the host: there is no buffer to
initialise, move or shard, and nothing that fake tensors or the meta device could spoil.

Rope: Su et al. 2021. linear: position interpolation (Chen et al. 2023). dynamic: NTK-aware scaling by length, as
in transformers. llama3: Meta's Llama 3.1 (llama-models).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from packtrain.batch import Batch, queued


@dataclass(frozen=True)
class RopeParameters:
    """What turns a position into angles. Fields beyond `rope_theta` count for the types that use them."""

    rope_type: str = "default"
    """default, linear, dynamic or llama3."""

    rope_theta: float = 10000.0
    """Base of the geometric row of frequencies."""

    factor: float = 1.0
    """How many times longer than in pretraining documents may be (linear, dynamic, llama3)."""

    low_freq_factor: float = 1.0
    """Pretraining lengths over this: longer waves are stretched by `factor` (llama3)."""

    high_freq_factor: float = 4.0
    """Pretraining lengths over this: shorter waves stay as they are (llama3)."""

    original_max_position_embeddings: int = 8192
    """Length in pretraining, tokens (llama3)."""


def cos_sin(
    rope: RopeParameters,
    head_dim: int,
    max_position_embeddings: int,
    batch: Batch,
    dtype: torch.dtype,
    *,
    first_position: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, head_dim / 2] of a batch's tokens, computed in fp32 and given in `dtype`.

    Documents begin at `first_position`.
    """
    positions = batch.positions.view(-1, 1, 1) + first_position
    if rope.rope_type == "dynamic":
        lengths = torch.tensor(batch.lengths)
        by_document = _dynamic(rope, head_dim, max_position_embeddings, lengths + first_position)
        frequencies = queued(by_document, positions.device).repeat_interleave(
            queued(lengths, positions.device), dim=0, output_size=positions.shape[0]
        )
    else:
        frequencies = queued(_frequencies(rope, head_dim), positions.device)
    angles = positions * frequencies.unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _frequencies(rope: RopeParameters, head_dim: int) -> Tensor:
    """Radians a position, fp32 [head_dim / 2] on the CPU."""
    frequencies = _geometric(torch.tensor(rope.rope_theta), head_dim)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _geometric(base: Tensor, head_dim: int) -> Tensor:
    """base^(-2 i / head_dim), fp32 [..., head_dim / 2] for base [...]."""
    return 1.0 / base.unsqueeze(-1) ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _llama3(rope: RopeParameters, frequencies: Tensor) -> Tensor:
    """Long waves stretched by the factor, short ones kept, those between blended by how often they fit."""
    fits = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (fits - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _dynamic(rope: RopeParameters, head_dim: int, max_position_embeddings: int, lengths: Tensor) -> Tensor:
    """fp32 [D, head_dim / 2]: a document longer than the model was made for has a base of its own."""
    excess = (rope.factor * lengths / max_position_embeddings - (rope.factor - 1)).clamp(min=1.0)
    return _geometric(rope.rope_theta * excess ** (head_dim / (head_dim - 2)), head_dim)
