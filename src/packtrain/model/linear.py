"""A linear layer that may be several of Hugging Face's in one, with a declared slot for adapters.

`qkv_proj` and `gate_up_proj` are one parameter each in memory, so that one product serves them; on disk and to
adapters they are still q_proj, k_proj, v_proj, gate_proj and up_proj. `parts` says which rows are whose:
everything that needs Hugging Face's names (reading, saving, adapter targets) asks `layout` or `linear_parts`
and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from packtrain.kernels.product import linear

_SLOTS = (".adapters.", ".prompt.")
"""Where adapters sit, in a linear layer and in an attention: what is below is not the base model's."""


class Part(NamedTuple):
    """Rows [start, stop) of a fused layer, under the last word of Hugging Face's name for them."""

    name: str
    start: int
    stop: int


class Piece(NamedTuple):
    """Rows [start, stop) of one of our parameters hold the whole Hugging Face tensor `name`."""

    name: str
    start: int
    stop: int


class Adapter(Protocol):
    """What fills a part's slot: sees the layer's input and the part's output, returns the part's new output."""

    def __call__(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """y = x W^T + b over fused parts. W is [sum of the parts' rows, in_features], Hugging Face's orientation."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        parts: Sequence[tuple[str, int]],
        bias: bool,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._describe(in_features, parts)
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device)) if bias else None

    def _describe(self, in_features: int, parts: Sequence[tuple[str, int]]) -> None:
        self.in_features = in_features
        edges = [0]
        for _, rows in parts:
            edges.append(edges[-1] + rows)
        self.parts = tuple(Part(name, a, b) for (name, _), a, b in zip(parts, edges[:-1], edges[1:], strict=True))
        self.out_features = edges[-1]
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """x [T, in_features], keys int64 [T] (the batch's) -> [T, out_features]."""
        outputs = self.split(x, keys)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def split(self, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        """The same, a tensor [T, rows] for each part: views of one product where there is no adapter."""
        outputs = torch.split(self.product(x), [part.stop - part.start for part in self.parts], dim=1)
        return tuple(self._adapted(part, x, output, keys) for part, output in zip(self.parts, outputs, strict=True))

    def product(self, x: Tensor) -> Tensor:
        """x W^T + b [T, out_features], without adapters."""
        return linear(x, self.weight.to(x.dtype), self._bias(x.dtype))  # what trains may be fp32

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """b [out_features] in `dtype`; an adapter that has a bias of its own has it instead of the base's rows."""
        if self.bias is None:
            return None
        own = {
            name: bias
            for name, adapter in self.adapters.items()
            if (bias := getattr(adapter, "bias", None)) is not None
        }
        if not own:
            return self.bias.to(dtype)
        base = self.bias.to(dtype)
        return torch.cat(
            [own[part.name].to(dtype) if part.name in own else base[part.start : part.stop] for part in self.parts]
        )

    def matrix(self) -> Tensor:
        """W [out_features, in_features], for who multiplies by it himself: the parameter, or made of what is held."""
        return self.weight

    def _adapted(self, part: Part, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        if part.name not in self.adapters:
            return y
        return cast(Adapter, self.adapters[part.name])(x, y, keys)


class TiedLinear(Linear):
    """A linear layer over an embedding's weight, without a parameter of its own.

    It reads the embedding's at every use, so moving, sharding or replacing that one cannot part the two.
    """

    def __init__(self, name: str, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self._describe(embedding.embedding_dim, [(name, embedding.num_embeddings)])
        self._embedding = (embedding,)  # in a tuple: not a child of this module
        self.bias = None

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The embedding's, [rows, in_features]."""
        return cast(nn.Parameter, self._embedding[0].weight)


def linear_parts(model: nn.Module) -> Iterator[tuple[str, Linear, Part]]:
    """Every linear layer under Hugging Face's module name, e.g. ("model.layers.0.self_attn.q_proj", layer, part)."""
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            parent = path.rpartition(".")[0]
            for part in module.parts:
                yield (f"{parent}.{part.name}" if parent else part.name), module, part


def layout(model: nn.Module) -> dict[str, tuple[Piece, ...]]:
    """Our name of each base parameter -> the Hugging Face tensors that tile its rows. Adapters are not in it.

    A tied parameter appears once, under its first name.
    """
    table: dict[str, tuple[Piece, ...]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if any(slot in full for slot in _SLOTS):
                continue
            if isinstance(module, Linear):
                if name not in ("weight", "bias"):
                    continue  # scales of a quantised weight
                parent = path.rpartition(".")[0]
                stem = f"{parent}." if parent else ""
                table[full] = tuple(Piece(f"{stem}{p.name}.{name}", p.start, p.stop) for p in module.parts)
            else:
                table[full] = (Piece(full, 0, parameter.shape[0]),)
    first = {id(parameter): name for name, parameter in reversed(list(model.named_parameters(remove_duplicate=False)))}
    canonical = set(first.values())
    return {name: pieces for name, pieces in table.items() if name in canonical}


def base_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Our name of each base parameter -> the shape of what it is, which is not a quantised weight's own."""
    found: dict[str, tuple[int, ...]] = {}
    for name in layout(model):
        shape, module = model.get_parameter(name).shape, model.get_submodule(name.rpartition(".")[0])
        is_matrix = isinstance(module, Linear) and len(shape) == 2
        found[name] = (shape[0], cast(Linear, module).in_features) if is_matrix else tuple(shape)
    return found
