"""Decoder layers whose frozen weights are held in 4 or 8 bits, and are whole only while a product reads them.

    quantise            gives every decoder layer's projections this form; after adapters, before sharding, on meta
    QuantisedLinear     a linear layer that holds numbers and scales (kernels/quantise.py), rows on dim 0
    held                bytes of them on this rank, and what the values would take
    whole_bytes         of one decoder layer's values

Embeddings, norms, the head and what trains stay as they are. A weight is dequantised for the forward and again for the
backward, each time from what the module holds then: so sharding gathers numbers and scales for each, and nothing keeps
the values in between. Layers in the fused form (model/fast_layer.py) do the same by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from packtrain.kernels.quantise import Quantisation
from packtrain.model.linear import Linear


class QuantisedLinear(Linear):
    """y = x W^T + b, the product in `dtype`. Takes a plain layer's place, with its bias and its adapters.

    `weight` is the numbers, a float view of their bytes; `weight_scale` is fp32; both have the rows of W.
    """

    def __init__(self, plain: Linear, form: Quantisation, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self._describe(plain.in_features, [(part.name, part.stop - part.start) for part in plain.parts])
        self.form, self.dtype = form, dtype
        self.adapters, self.bias = plain.adapters, plain.bias
        device, (numbers, scales) = plain.weight.device, form.widths(self.in_features)
        held = torch.empty(self.out_features, numbers, dtype=form.storage, device=device)
        self.weight = nn.Parameter(held, requires_grad=False)
        held = torch.empty(self.out_features, scales, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(held, requires_grad=False)

    def matrix(self) -> Tensor:
        """W [rows, in_features] in `dtype`, made now."""
        return self.form.unpack(self.weight.detach(), self.weight_scale.detach(), self.in_features, self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b [T, out_features] in x's dtype."""
        y = cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]
        bias = self._bias(x.dtype)
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        with torch.enable_grad():  # nothing here has a gradient; the FLOP counter tells by it what is recomputed
            return F.linear(x.detach().to(layer.dtype), layer.matrix()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        layer: QuantisedLinear = ctx.layer
        return (dy.to(layer.dtype) @ layer.matrix()).to(dy.dtype), None


class PackedRows:
    """What values are assigned to in a quantised weight's stead, rows at a time: they are quantised at once."""

    def __init__(self, layer: QuantisedLinear, numbers: Tensor, scales: Tensor) -> None:
        self._pack, self._numbers, self._scales = layer.form.pack, numbers, scales
        self.shape = torch.Size((len(numbers), layer.in_features))
        self.dtype = torch.float32

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self._pack(values, self._numbers[rows], self._scales[rows])


def quantise(model: nn.Module, form: Quantisation, dtype: torch.dtype) -> None:
    """Give the projections of every decoder layer this form; their weights are lost, and are loaded or drawn later."""
    for layer in cast(Any, model).model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    setattr(module, name, QuantisedLinear(child, form, dtype))


def held(model: nn.Module, local_rows: Callable[[Tensor], tuple[Tensor, int]]) -> tuple[int, int]:
    """(bytes of quantised weights and their scales on this rank, bytes of as many values in the products' dtype)."""
    packed = plain = 0
    for layer in quantised(model):
        parts = [local_rows(parameter)[0] for parameter in (layer.weight, layer.weight_scale)]
        packed += sum(part.nbytes for part in parts)
        plain += len(parts[0]) * layer.in_features * layer.dtype.itemsize
    return packed, plain


def whole_bytes(layer: nn.Module) -> int:
    """Bytes of a decoder layer's values: what is made at a time, if all of its products are at work."""
    return sum(each.in_features * each.out_features * each.dtype.itemsize for each in quantised(layer))


def quantised(model: nn.Module) -> Iterator[QuantisedLinear]:
    """The layers that have this form."""
    return (module for module in model.modules() if isinstance(module, QuantisedLinear))
