"""Adapters put where products find them: beside a weight, and for float8 in a small matrix too.

    Columns16, Columns8     one product's adapters and where they go; `pack` puts them there
    Skinny                  a float8 product's small matrix, with its scale and what its columns were multiplied by
    Tops                    the largest magnitude in each of many tensors
    Packs                   many float8 products' adapters by one kernel: for weights that stay where they are

What the columns mean says kernels/lowrank.py. A launch of a kernel costs the device some 2 us beside its work, and a
float8 step of 32 layers had 256 of them. The 128 of a step in 16 bits cost nothing that could be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from packtrain.kernels import float8
from packtrain.kernels.rows import RUNS_TRITON, by_triton

if RUNS_TRITON:
    from packtrain.kernels import packs_triton as triton_kernels

SKINNY_TOP = 224.0
FACTOR_MOST = 16.0
REACH = 2.0
"""`factor` is at most FACTOR_MOST, or for a large h this times root of its terms times the largest number in A."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""A product's adapters: two factors each."""


def reach(terms: int) -> float:
    """How large `factor` may be, in units of the largest number of a sum of so many terms."""
    return REACH * float(terms**0.5)


class Place16(NamedTuple):
    """A's first row, B's first row, and its first column."""

    a: int
    b: int
    column: int


@dataclass(frozen=True, slots=True)
class Columns16:
    """Each A [r, k] into rows of `whole`, and scale * B [n, r] into rows and columns."""

    whole: Tensor
    pairs: Pairs
    places: Sequence[Place16]
    scale: float

    def pack(self) -> None:
        """Put them there."""
        if self.pairs and by_triton(self.whole):
            triton_kernels.pack16(self.pairs, self.whole, self.places, self.scale)
            return
        for place, (a, b) in zip(self.places, self.pairs, strict=True):
            rank, values = a.shape
            self.whole[place.a : place.a + rank, :values] = a
            self.whole[place.b : place.b + b.shape[0], place.column : place.column + rank] = self.scale * b


@dataclass(frozen=True, slots=True)
class Skinny:
    """The small matrix of one way of a product: for C columns 2 C rows, hi and lo, of e4m3."""

    rows: Tensor
    scale: Tensor
    """fp32 [C], of a hi row and its lo row."""
    factor: Tensor
    """fp32 [C], what the weight's columns were multiplied by and those of h are divided by."""

    @classmethod
    def of(cls, columns: int, width: int, device: torch.device) -> Skinny:
        """Of rows so wide; zero where nobody writes."""
        rows = torch.zeros(2 * columns, width, dtype=torch.uint8, device=device).view(float8.E4M3)
        return cls(rows, torch.ones(columns, device=device), torch.ones(columns, device=device))


class Place8(NamedTuple):
    """x's first row, y's first column, and the adapter's first column."""

    x: int
    y: int
    column: int


@dataclass(frozen=True, slots=True)
class Columns8:
    """Each x [n, r] into columns of `matrix` from `values` on, as hi, hi, lo; y [r, k] into rows of `skinny`."""

    matrix: Tensor
    skinny: Skinny
    pairs: Pairs
    tops: Pairs
    """The largest magnitudes of each x and y, 0-dim fp32."""
    scales: tuple[float, float]
    """What x and y are multiplied by."""
    weight_scale: Tensor
    places: Sequence[Place8]
    values: int

    @property
    def reaches(self) -> list[float]:
        """`reach` of each pair."""
        return [reach(y.shape[1]) for _, y in self.pairs]

    def pack(self) -> None:
        """Put them there."""
        if self.pairs and by_triton(self.matrix):
            triton_kernels.pack8(
                self.pairs, self.tops, self.reaches, self.scales, self.weight_scale, self.matrix, self.skinny.rows,
                self.skinny.scale, self.skinny.factor, self.places, self.values,
            )  # fmt: skip
            return
        for pair, tops, place in zip(self.pairs, self.tops, self.places, strict=True):
            self._pack(pair, tops, place)

    def _pack(self, pair: tuple[Tensor, Tensor], tops: tuple[Tensor, Tensor], place: Place8) -> None:
        (x, y), skinny = pair, self.skinny
        c, rank = len(skinny.factor), slice(place.column, place.column + x.shape[1])
        scale = self.weight_scale[:1]
        most = (reach(y.shape[1]) * tops[1] * self.scales[1]).clamp(min=FACTOR_MOST)
        factor = torch.minimum(SKINNY_TOP * scale / (tops[0] * self.scales[0]).clamp(min=1e-30), most)
        top = (tops[1] * self.scales[1]).clamp(min=1e-30) / SKINNY_TOP
        hi, lo = float8.split(x * (self.scales[0] * factor / scale))
        rows = self.matrix[place.x : place.x + x.shape[0], self.values :]
        for at, half in ((0, hi), (c, hi), (2 * c, lo)):
            rows[:, at + rank.start : at + rank.stop] = half
        hi, lo = float8.split(y * (self.scales[1] / top))
        for at, half in ((0, hi), (c, lo)):
            skinny.rows[at + rank.start : at + rank.stop, place.y : place.y + y.shape[1]] = half
        skinny.scale[rank], skinny.factor[rank] = top, factor


class Tops:
    """The largest magnitude in each of many tensors of one dtype on one device, contiguous."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.values = torch.zeros(len(tensors), device=tensors[0].device)
        """fp32, one each."""
        places = [[tensor.data_ptr(), tensor.numel()] for tensor in tensors]
        self._table = torch.tensor(places, dtype=torch.int64).to(tensors[0].device)

    def find(self) -> None:
        """Look at all of them, by one kernel."""
        triton_kernels.largest(self._tensors[0], self._table, self.values)


class Packs:
    """Columns whose tensors stay where they are; adapters of one dtype, contiguous, on a GPU."""

    def __init__(self, columns: Sequence[Columns8]) -> None:
        self._columns = [one for one in columns if one.pairs]
        rows = [row for one in self._columns for row in _rows(one)]
        device = self._columns[0].pairs[0][0].device
        self._table = torch.tensor([row[0] for row in rows], dtype=torch.int64).to(device)
        self._numbers = torch.tensor([row[1] for row in rows], dtype=torch.float32).to(device)
        pairs = [pair for one in self._columns for pair in one.pairs]
        self._rank = max(x.shape[1] for x, _ in pairs)
        self._longest = max(x.shape[0] + y.shape[1] for x, y in pairs)

    def pack(self) -> None:
        """Put all of them in their places, by one kernel."""
        first = self._columns[0]
        adapter = first.pairs[0][0]
        triton_kernels.pack8_all(first.matrix, adapter, self._table, self._numbers, self._rank, self._longest)


def _rows(columns: Columns8) -> list[tuple[list[int], list[float]]]:
    """What the kernel reads of each adapter (packs_triton.py): addresses and places, and numbers."""
    skinny, matrix = columns.skinny, columns.matrix
    shared = [tensor.data_ptr() for tensor in (columns.weight_scale, skinny.rows, skinny.scale, skinny.factor)]
    sizes = [len(skinny.factor), matrix.stride(0), skinny.rows.stride(0), columns.values]
    adapters = zip(columns.pairs, columns.tops, columns.places, columns.reaches, strict=True)
    return [
        ([matrix.data_ptr(), x.data_ptr(), y.data_ptr(), xtop.data_ptr(), ytop.data_ptr(), *shared, x.shape[0],
          y.shape[1], *place, x.shape[1], *x.stride(), *y.stride(), *sizes],
         [far, *columns.scales])
        for (x, y), (xtop, ytop), place, far in adapters
    ]  # fmt: skip
