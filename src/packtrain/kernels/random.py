"""Dropout whose mask is a function of what a token is, not of when or where it is computed.

    token_keys(seed, step, rows, positions)     64 random bits a token, made with the batch on the host
    dropout(x, keys, name, p)                   x with elements dropped, by (key, name of the layer, column)
    number(text)                                what a name is to them

So a mask is the same on any number of ranks, in any packing, in a recomputed layer and after a resume, and the
backward makes it again instead of keeping it.

How bits are mixed: a token's key and the name's hash give two 32-bit words (splitmix64's finaliser: Steele, Lea and
Flood 2014). Every two columns share one 32-bit hash of (word, column), murmur3's finaliser (Appleby, public domain)
with the second word added half way, so that two tokens whose first words are near have nothing in common. A column's
16 bits are compared with p: p is rounded to 1/65536. torch has no unsigned arithmetic: products of signed integers
wrap to the same bits, and an unsigned right shift is a signed one with the copies of the sign masked away.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_keys(seed: int, step: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Keys of T tokens, int64 [T] of all 64 bits. `rows`, `positions` int64 [T]: the data's row and the place in it."""
    return _mix64(_mix64(rows ^ number(f"{seed} {step}")) + positions)


def dropout(x: Tensor, keys: Tensor, name: str, p: float) -> Tensor:
    """x [T, K] with elements zeroed with probability p in [0, 1), the others times 1 / (1 - p); keys int64 [T].

    `name` is Hugging Face's name of the layer: layers of one token have masks of their own.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability {p} is outside [0, 1)")
    return x if p == 0.0 else cast(Tensor, _Dropout.apply(x, keys, name, p))  # type: ignore[no-untyped-call]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, name: str, p: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.name, ctx.p = name, p
        return _drop(x, keys, name, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        return _drop(gradient, keys, ctx.name, ctx.p), None, None, None


def _drop(x: Tensor, keys: Tensor, name: str, p: float) -> Tensor:
    keep = _bits(keys, name, x.shape[1]) >= round(p * 2**16) - 2**15
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)


def _bits(keys: Tensor, name: str, columns: int) -> Tensor:
    """Uniform int16 [T, columns]."""
    words = _mix64(keys ^ number(name)).unsqueeze(1).view(torch.int32)
    first, second = words[:, :1], words[:, 1:]
    pairs = torch.arange((columns + 1) // 2, dtype=torch.int32, device=keys.device)
    hashed = first ^ pairs.mul_(_signed(0x9E3779B1, 32))
    _shift_xor(hashed, 16, 32).mul_(_signed(0x85EBCA6B, 32)).add_(second)
    _shift_xor(hashed, 13, 32).mul_(_signed(0xC2B2AE35, 32))
    return _shift_xor(hashed, 16, 32).view(torch.int16)[:, :columns]


def _mix64(x: Tensor) -> Tensor:
    """A one-to-one map of int64 to int64 in which every bit depends on every bit."""
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    _shift_xor(x, 30, 64).mul_(_signed(0xBF58476D1CE4E5B9, 64))
    _shift_xor(x, 27, 64).mul_(_signed(0x94D049BB133111EB, 64))
    return _shift_xor(x, 31, 64)


def _shift_xor(x: Tensor, bits: int, width: int) -> Tensor:
    """x ^= x >> bits, x taken as unsigned of `width` bits; in place."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (width - bits)) - 1))


def _signed(value: int, width: int) -> int:
    """The signed integer with the same `width` bits."""
    return value - (1 << width) if value >> (width - 1) else value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def number(text: str) -> int:
    """64 bits of a text, the same in every process (Python's own hash is not), as a signed integer."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
