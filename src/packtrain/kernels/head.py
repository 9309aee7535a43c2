"""The gradient that goes through a frozen head, by float8 products: half the time of bf16 ones.

    HeadScale                      a frozen weight's scale in float8, looked for once
    Float8Head.of(weight, scale)   the weight transposed, in float8
    Float8Head.empty(rows)         memory for a chunk's gradient by the logits, which the loss fills
    Float8Head.backward(...)       its product with the weight

Logits and loss stay as exact as they are without: only what the layers learn from is rounded, as in each of their own
products. A logit's gradient lies between -1 and 1, so that one number serves all of them as a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packtrain.kernels import float8
from packtrain.kernels.rows import RUNS_TRITON, by_triton

if RUNS_TRITON:
    from packtrain.kernels import crossentropy_triton

UNIT = 256.0
"""Gradients by logits are stored so many times as large: 1 is within e4m3's 448, and 2^-18 is rounded to 0."""

FEW = 1024
"""Tokens from which a GPU is faster so: each call reads the whole weight to make its float8 form."""


class HeadScale:
    """fp32 [1] of a weight [V, D]: its largest magnitude is 448 of them."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Looked for again if it is another tensor, or was written to."""
        known = self._known
        if known is None or known[0] is not weight or known[1] != weight._version:
            largest = torch.linalg.vector_norm(weight.detach(), float("inf"), dtype=torch.float32)
            known = weight, weight._version, largest.clamp(min=float8.TINY).view(1) / float8.LIMIT
            self._known = known
        return known[2]


@dataclass(frozen=True, slots=True)
class Float8Head:
    """Of one call of the loss."""

    numbers: Tensor
    """e4m3 [D, V or a little more]: the weight transposed, zeros beyond V."""
    scale: Tensor
    """fp32 [1]: a weight is its number times this."""
    unit: Tensor
    """fp32 [1]: 1 / UNIT."""

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor) -> Float8Head:
        """weight [V, D] of 16 or 32 bits, scale fp32 [1]."""
        rows, columns = weight.shape
        width = -(-rows // 16) * 16  # as products of float8 need it
        numbers = torch.empty(columns, width, dtype=float8.E4M3, device=weight.device)
        times = scale.reciprocal()  # a GPU divides by a number otherwise than a CPU
        if by_triton(weight):
            crossentropy_triton.quantise_transposed(weight, times, numbers)
        else:
            numbers.view(torch.uint8)[:, rows:] = 0
            numbers[:, :rows] = (weight.float() * times).to(float8.E4M3).t()
        return cls(numbers, scale, torch.full_like(scale, 1 / UNIT))

    def empty(self, rows: int) -> Tensor:
        """e4m3 [rows, V or a little more], for `UNIT` times the gradient by the logits and zeros beyond V."""
        return torch.empty(rows, self.numbers.shape[1], dtype=float8.E4M3, device=self.numbers.device)

    def backward(self, gradient: Tensor, out: Tensor) -> None:
        """out [rows, D] = the gradient by the head's input, from what `empty` gave, filled."""
        float8.raw_product(gradient, self.numbers, self.unit, self.scale, out.dtype, out)
