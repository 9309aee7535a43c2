"""Where values of a base parameter go: into it, or into what it is held as.

staged      a parameter's rows here -> what their values are assigned to: a float8 or quantised weight takes them too
alone       a value that no other process has a share in
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.kernels import float8
from packtrain.model.quantised import PackedRows, QuantisedLinear

Target = Tensor | PackedRows
"""Has the shape of a parameter's rows, and takes values by `target[a:b] = values`."""


Largest = Callable[[Tensor, Tensor], Tensor]
"""(a parameter, a 0-dim value of its rows here) -> the largest value of all its rows."""


def alone(parameter: Tensor, value: Tensor) -> Tensor:
    """A `Largest` where all rows are here."""
    return value


@contextmanager
def staged(
    model: nn.Module,
    name: str,
    local: Tensor,
    local_rows: Callable[[Tensor], tuple[Tensor, int]],
    largest: Largest = alone,
) -> Iterator[Target]:
    """Where to put the values of parameter `name`, whose rows are `local`: quantised as they come if they are rows of
    numbers, at the end if one scale is for all. Then `largest` asks who has the other rows, if they are elsewhere: all
    of them have to come to the end of their staging, in the same order.
    """
    layer: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, QuantisedLinear) and name.endswith(".weight"):
        yield PackedRows(layer, local, local_rows(layer.weight_scale)[0])
        return
    if local.dtype != float8.E4M3:
        yield local
        return
    works = layer.weight_scale.device  # the weight itself may live on the host
    dtype = torch.float32 if works.type == "cpu" else torch.bfloat16
    values = torch.empty(local.shape, dtype=dtype, device=works)
    yield values
    top = values.abs().amax() if len(values) else values.new_zeros(())
    numbers, scale = float8.quantise_matrix(values, largest(model.get_parameter(name), top))
    local.view(torch.uint8).copy_(numbers.view(torch.uint8))
    layer.weight_scale.copy_(scale)
