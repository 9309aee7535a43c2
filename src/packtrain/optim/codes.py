"""Moments in 8 bits: a code an element, and for each block of neighbours in a row one fp32 scale, its largest entry.

A code is the entry's part of that largest one as a small float, with three bits of mantissa (neighbours differ by 6 to
12 %), so that small entries beside large ones are held as exactly as these:

    signed      a sign and 7 bits: down to 2**-16 of the largest, and 0
    unsigned    8 bits: down to 2**-32, which no entry falls below, so that nobody divides by a vanished one

A first moment and the root of a second one so reach equally far down: no rounding makes a step larger than the others.
Rounded up or down by chance, a code is right in the mean, from 2**-16 (2**-32) of the largest on; rounded to nearest,
an average that moves by a thousandth a step would never move. Block-wise scales as in Dettmers et al., arXiv
2110.02861.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUT = 20
"""Bits of an fp32 that a code leaves out, and so of the chance that rounds it."""

ONE = 0x3F800000 >> CUT
"""What is left of 1.0: the largest code stands for it."""

LARGEST_SIGNED, LARGEST = 127, 255

LEAST = 1.25 * 2.0**-16
"""What the signed code 1 stands for."""

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 256
"""Elements that share a scale; fewer would cost more than they save."""


def block_of(value: Tensor) -> int:
    """Elements of a block: they share a row, so that codes do not depend on which rows a rank has. 0: none fits.

    That is so for vectors, and for matrices whose rows no block of `SMALLEST_BLOCK` or more divides.
    """
    block = math.gcd(value.shape[-1], LARGEST_BLOCK) if value.ndim == 2 else 0
    return block if block >= SMALLEST_BLOCK else 0


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """fp32 of uint8 codes, flat, by their blocks' scales."""
    bits = codes.int()
    if signed:
        size = bits & LARGEST_SIGNED
        part = ((size + (ONE - LARGEST_SIGNED)) << CUT).view(torch.float32)
        part = torch.where(size == 0, 0.0, torch.where(bits > LARGEST_SIGNED, -part, part))
    else:
        part = ((bits + (ONE - LARGEST)) << CUT).view(torch.float32)
    return (part.view(len(scales), -1) * scales[:, None]).view(-1)


def encode(value: Tensor, chance: Tensor, block: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8, scales fp32) of fp32 values, flat; unsigned ones are not negative.

    `chance` int32, uniform in [0, 2**20): what a code cannot hold of a value goes up if it and the chance overflow.
    """
    size = value.abs().view(-1, block)
    scales = size.amax(1)
    part = torch.where(scales[:, None] > 0, size / scales[:, None], 0.0).view(-1)
    grown = (part.view(torch.int32) + chance) >> CUT
    if not signed:
        return (grown - (ONE - LARGEST)).clamp_(0, LARGEST).to(torch.uint8), scales
    grown = (grown - (ONE - LARGEST_SIGNED)).clamp_(1, LARGEST_SIGNED)
    code = torch.where(part < LEAST, (part > chance * (LEAST / 2**CUT)).int(), grown)
    return torch.where(value < 0, code + (LARGEST_SIGNED + 1), code).to(torch.uint8), scales
