"""What the fast layers of a model have in common, and do together.

Shared          their form, memory, and what one hands to another
.look           before a forward's first layer: what all layers' float8 adapters need, by one kernel for all
linears         a layer's four products
of_products     a layer's adapters, or what is known of each, product by product
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from packtrain.kernels import rows
from packtrain.kernels.lowrank import Float8, Plan, Scratch, skinny
from packtrain.kernels.packs import Columns8, Packs, Skinny, Tops
from packtrain.kernels.rows import Form, Rows, by_triton
from packtrain.model.linear import Linear

Packed = Sequence[Skinny | None]
"""A product's small matrices, forward and backward, where float8 adapters are in their places."""


def linears(layer: Any) -> list[Linear]:
    """qkv, o, gate_up, down."""
    return [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]


def of_products(plans: Sequence[Plan], found: Sequence[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """What there is for A and B of each adapter of a layer, in pairs, by product."""
    pairs = zip(found[::2], found[1::2], strict=True)
    return [[*islice(pairs, len(plan.spans))] for plan in plans]


@dataclass(slots=True)
class Shared:
    """What the layers of a model have in common."""

    form: Form
    keeps_transposed: bool
    scratch: dict[Plan, Scratch] = field(default_factory=dict)
    handed: tuple[Tensor, Rows] | None = None
    """A gradient on its way to the layer before, and the same as rows: both are made by one kernel."""
    layers: list[Any] = field(default_factory=list)
    """Those of an unsharded model whose adapters are looked at together."""
    tops: list[list[Tensor]] = field(default_factory=list)
    """Of each, in float8, the largest magnitudes of its adapters' A and B."""
    packed: list[list[Packed] | None] = field(default_factory=list)
    """Of each, its products' if its adapters have been packed; else they are at their use."""
    _together: _Together | None = None

    def look(self) -> None:
        """In float8, find the largest numbers of all adapters, and pack those of weights that stay where they are."""
        if not self.form.float8:
            return
        learning = [layer.fast.learning(layer) for layer in self.layers]
        self._together = self._gathered(learning)
        packed = {} if self._together is None else self._together.packed
        self.packed = [packed.get(number) for number in range(len(self.layers))]
        if self._together is not None:
            self._together.pack()
        known = {} if self._together is None else self._together.tops
        found = iter(largest([*chain.from_iterable(some for i, some in enumerate(learning) if i not in known)]))
        self.tops = [known[i] if i in known else [*islice(found, len(some))] for i, some in enumerate(learning)]

    def _gathered(self, learning: list[list[Tensor]]) -> _Together | None:
        """The layers that can be packed together: made once, and again if something has moved."""
        numbers = [number for number, layer in enumerate(self.layers) if layer.fast.lasting]
        adapters = [*chain.from_iterable(learning[number] for number in numbers)]
        if not adapters or not _packable(adapters):
            return None
        weights = [linear.weight for number in numbers for linear in linears(self.layers[number])]
        places = [tensor.data_ptr() for tensor in (*adapters, *weights)]
        if self._together is not None and self._together.places == places:
            return self._together
        return _Together(self, {number: learning[number] for number in numbers}, places)

    def take(self, gradient: Tensor, columns: int) -> Rows:
        """A gradient as rows for a product with so many adapter columns."""
        handed, self.handed = self.handed, None
        width = self.form.width(gradient.shape[1], columns)
        if handed is not None and _same(handed[0], gradient) and handed[1].data.shape[1] == width:
            return handed[1]
        return rows.copy(gradient, self.form, columns)


class _Together:
    """The adapters of layers whose weights stay in their places, and where they go."""

    def __init__(self, shared: Shared, learning: Mapping[int, list[Tensor]], places: list[int]) -> None:
        self.places = places
        self.packed: dict[int, list[Packed]] = {number: [] for number in learning}
        self._tops = Tops([*chain.from_iterable(learning.values())])
        found = iter(self._tops.values.unbind())
        self.tops = {number: [*islice(found, len(some))] for number, some in learning.items()}
        columns: list[Columns8] = []
        for number, adapters in learning.items():
            layer = shared.layers[number]
            tops = of_products(layer.fast.plans, self.tops[number])
            for i, pairs in enumerate(of_products(layer.fast.plans, adapters)):
                small, made = _columns(shared.form, layer, i, pairs, tops[i])
                self.packed[number].append(small)
                columns += made
        self._packs = Packs(columns)

    def pack(self) -> None:
        self._tops.find()
        self._packs.pack()


_Pairs = list[tuple[Tensor, Tensor]]


def _columns(form: Form, layer: Any, i: int, pairs: _Pairs, tops: _Pairs) -> tuple[Packed, list[Columns8]]:
    """The backward's too if the transposed weight is kept: one that is made for each use has no place."""
    linear, plan = linears(layer)[i], layer.fast.plans[i]
    weight, scale, turned = linear.matrix(), cast(Tensor, linear.weight_scale), layer.fast.turned(i, linear)
    small = [skinny(plan, form, weight.device, way) if way == 0 or turned is not None else None for way in (0, 1)]
    operand = Float8(plan, form, weight, scale, pairs, tops, layer.fast.scratch(plan, scale), turned, packed=small)
    operand.pack()
    wholes = enumerate((operand.whole, turned))
    return small, [operand.columns(way, whole) for way, whole in wholes if whole is not None]


def _packable(adapters: Sequence[Tensor]) -> bool:
    first = adapters[0]
    if isinstance(first, FakeTensor) or not by_triton(first):
        return False
    return all(adapter.dtype == first.dtype and adapter.is_contiguous() for adapter in adapters)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one in memory; of fake ones the storages say so."""
    memory = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return memory and one.shape == other.shape and one.storage_offset() == other.storage_offset()


def largest(adapters: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitude in each, 0-dim, by one kernel for all."""
    if not adapters:
        return []
    return list(torch._foreach_norm([adapter.detach() for adapter in adapters], float("inf")))
