"""Rows of a frozen weight in 4 or 8 bits, and back: what `--quantization 4bit` and `8bit` hold.

    Quantisation    a format: nf4, fp4 or int8, and whether the scales are quantised too
    .widths         how many elements a row's numbers and its scales take
    .pack, .unpack  values <-> numbers and scales
    dequantiser     what turns 4 bits back into values on a device: bitsandbytes' kernel where it is, else PyTorch

Everything is a row's own, its scales and their scales too: whoever holds a row holds all of it, and which rows a
process has changes no bit. A row is cut into blocks of 64, of which the last may be short; a block's scale is its
largest magnitude, fp32. Quantised scales are 8 bits each, less the row's mean and in units of the row's largest
difference from it; bitsandbytes takes one mean a tensor and units of 256 blocks. int8 has one scale a row.

nf4 and double quantisation: QLoRA, arXiv 2305.14314. The 8-bit code: arXiv 1511.04561. fp4, and two numbers a byte,
the first in the high bits: bitsandbytes. Numbers are a view of their bytes as floats, which sharding gathers as it
finds them; nothing may compute with that view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

BLOCK = 64
"""Values under one scale, in 4 bits."""
STEP = 2**24
"""Values that are quantised at once: each needs about 20 bytes meanwhile."""
LEAST = 1e-35
"""A block of zeros is divided by it. A hundredth of it is no subnormal number yet, which GPUs take for zero."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
CODES = {"nf4": _NF4, "fp4": (*_FP4, *(-value for value in _FP4))}
"""What each of the 16 numbers means, in units of the block's scale."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A format for the rows of a weight [N, K]."""

    kind: Literal["nf4", "fp4", "int8"]

    double: bool = False
    """Whether the scales of 4-bit blocks are quantised too."""

    storage: torch.dtype = torch.bfloat16
    """A float dtype: what the bytes of the numbers are seen as."""

    by_bitsandbytes: bool = False
    """Whether its kernel unpacks 4 bits on a CUDA device."""

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 if self.kind == "int8" else 4

    def widths(self, columns: int) -> tuple[int, int]:
        """(elements of `storage` for a row's numbers, fp32 elements for its scales)."""
        numbers = _up(_up(columns * self.bits, 8), self.storage.itemsize)
        if self.bits == 8:
            return numbers, 1
        blocks = _up(columns, BLOCK)
        return numbers, 2 + _up(blocks, 4) if self.double else blocks

    def pack(self, values: Tensor, numbers: Tensor, scales: Tensor) -> None:
        """values [N, K] on any device -> numbers and scales [N, widths(K)], contiguous, written in place."""
        rows = max(1, STEP // values.shape[1])
        pack = self._pack8 if self.bits == 8 else self._pack4
        for top in range(0, len(values), rows):
            part = slice(top, top + rows)
            pack(values[part].to(numbers.device, torch.float32), numbers[part].view(torch.uint8), scales[part])

    def unpack(self, numbers: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """numbers and scales [N, widths(columns)], contiguous -> values [N, columns], rounded once, to `dtype`."""
        octets = numbers.view(torch.uint8)
        if self.bits == 8:
            values = torch.empty(len(octets), columns, dtype=dtype, device=octets.device)
            return torch.mul(octets.view(torch.int8)[:, :columns], scales, out=values)
        absmax = self._absmax(scales, _up(columns, BLOCK))
        if self.by_bitsandbytes and columns % BLOCK == 0 and octets.is_cuda:
            return _by_bitsandbytes(self.kind, octets, absmax, columns, dtype)
        places = octets[:, : _up(columns, 2)].flatten().int()
        pairs = _table(octets, _pairs, self.kind).index_select(0, places).view(torch.float32).view(len(octets), -1)
        return (pairs[:, :columns] * _spread(absmax, columns)).to(dtype)

    def _pack8(self, values: Tensor, octets: Tensor, scales: Tensor) -> None:
        absmax = values.abs().amax(1, keepdim=True).clamp(min=LEAST)
        octets.zero_()
        octets[:, : values.shape[1]] = (values * (127.0 / absmax)).round_().to(torch.int8).view(torch.uint8)
        scales.copy_(absmax * (1 / 127.0))  # by a number a GPU would not divide, but multiply by its inverse

    def _pack4(self, values: Tensor, octets: Tensor, scales: Tensor) -> None:
        columns = values.shape[1]
        padded = F.pad(values, (0, -columns % BLOCK)).view(len(values), -1, BLOCK)
        absmax = padded.abs().amax(2)
        # By the scale itself, not by what double quantisation makes of it: as QLoRA does.
        units = (padded * (1.0 / absmax.clamp(min=LEAST))[:, :, None]).clamp_(-1.0, 1.0).flatten(1)
        units = units[:, : columns + columns % 2]
        ranks = torch.zeros_like(units, dtype=torch.uint8)
        for bound in _table(values, _bounds, self.kind):  # 30 times as fast as torch.bucketize is on a CPU
            ranks += units > bound
        found = _table(values, _order, self.kind).index_select(0, ranks.flatten().int()).view(ranks.shape)
        octets.zero_()
        octets[:, : _up(columns, 2)] = (found[:, ::2] << 4) | found[:, 1::2]
        self._keep(absmax, scales)

    def _keep(self, absmax: Tensor, scales: Tensor) -> None:
        if not self.double:
            scales.copy_(absmax)
            return
        # In fp64 a sum of so few fp32 numbers does not depend on their order, which is a device's own.
        mean = absmax.double().mean(1, keepdim=True).float()
        step = (absmax - mean).abs().amax(1, keepdim=True)
        units = (absmax - mean) / step.clamp(min=LEAST)
        found = torch.bucketize(units, _table(absmax, _dynamic_bounds), out_int32=True)
        scales.zero_()
        scales[:, :1], scales[:, 1:2] = step, mean
        scales.view(torch.uint8)[:, 8 : 8 + absmax.shape[1]] = found.to(torch.uint8)

    def _absmax(self, scales: Tensor, blocks: int) -> Tensor:
        """fp32 [N, blocks]."""
        if not self.double:
            return scales
        octets = scales.view(torch.uint8)[:, 8 : 8 + blocks]
        return _table(scales, _dynamic)[octets.int()] * scales[:, :1] + scales[:, 1:2]


def dequantiser(device: torch.device) -> tuple[bool, str]:
    """(whether bitsandbytes' kernel works on this device, which it is then or else why not, in words)."""
    if device.type != "cuda":
        return False, "PyTorch's operations"
    try:
        name = f"bitsandbytes {_bitsandbytes().__version__}"
        tried = Quantisation("nf4", by_bitsandbytes=True)
        numbers, scales = (torch.zeros(2, width, device=device) for width in tried.widths(BLOCK))
        tried.unpack(numbers.to(tried.storage), scales, BLOCK, torch.bfloat16)
    except ImportError:
        return False, "PyTorch's operations (bitsandbytes is not installed)"
    except (RuntimeError, OSError, AttributeError) as error:
        return False, f"PyTorch's operations (bitsandbytes does not run here: {error})"
    return True, f"the kernel of {name}"


def _by_bitsandbytes(kind: str, octets: Tensor, absmax: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes().functional
    shape = torch.Size((len(octets), columns))
    state = functional.QuantState(absmax.flatten(), shape, blocksize=BLOCK, quant_type=kind, dtype=dtype)
    values: Tensor = functional.dequantize_4bit(octets.view(-1, 1), state)
    return values


@cache
def _bitsandbytes() -> ModuleType:
    import bitsandbytes  # noqa: PLC0415 (seconds, and only where it is used)

    return cast(ModuleType, bitsandbytes)


def _up(count: int, unit: int) -> int:
    return -(-count // unit)


def _spread(absmax: Tensor, columns: int) -> Tensor:
    """Each block's scale beside each of its values: [N, columns]."""
    return absmax[:, :, None].expand(-1, -1, BLOCK).flatten(1)[:, :columns]


def _table(like: Tensor, make: Callable[..., Tensor], *kind: str) -> Tensor:
    """A constant on the device of `like`, made once; among fake tensors made each time, since it is fake there."""
    return make(*kind).to(like.device) if isinstance(like, FakeTensor) else _kept(like.device, make, *kind)


@cache
def _kept(device: torch.device, make: Callable[..., Tensor], *kind: str) -> Tensor:
    return make(*kind).to(device)


def _code(kind: str) -> Tensor:
    return torch.tensor(CODES[kind], dtype=torch.float32)


def _pairs(kind: str) -> Tensor:
    """What the two numbers of each byte mean: two fp32 seen as one fp64, which is fetched at once, [256]."""
    return torch.cartesian_prod(_code(kind), _code(kind)).view(torch.float64).squeeze(1)


def _order(kind: str) -> Tensor:
    """The numbers in the order of their values, uint8 [16]."""
    return torch.argsort(_code(kind), stable=True).to(torch.uint8)


def _bounds(kind: str) -> Tensor:
    """Halfway between neighbours of the code, fp32 [15]."""
    ascending = _code(kind).sort().values
    return (ascending[:-1] + ascending[1:]) / 2


def _dynamic() -> Tensor:
    """The 8-bit code, fp32 [256], ascending: seven decades under 1, each with twice the steps of the one below."""
    edges = [torch.linspace(0.1, 1.0, 2**decade + 1) for decade in range(7)]
    positive = torch.cat([10.0 ** (decade - 6) * (e[:-1] + e[1:]) / 2 for decade, e in enumerate(edges)])
    return torch.cat([positive, -positive, torch.tensor([0.0, 1.0])]).sort().values


def _dynamic_bounds() -> Tensor:
    ascending = _dynamic()
    return (ascending[:-1] + ascending[1:]) / 2
