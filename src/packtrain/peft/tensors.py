"""What all adapters share: where their tensors are in PEFT's file, and starting values drawn by name.

Saved        rows of our parameters -> a tensor of adapter_model.safetensors
generator    (seed, name) -> the random numbers of that tensor
keep         a whole tensor -> the rows of it that this process holds
modules      the adapters of one kind in a model
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
"""What PEFT puts before every Hugging Face name."""

M = TypeVar("M", bound=nn.Module)

LocalRows = Callable[[Tensor], tuple[Tensor, int]]
"""Parameter -> (the rows this process holds, sharing storage; the number of the first)."""


class Saved(NamedTuple):
    """Rows [start, stop) of our parameter are a whole tensor of PEFT's file."""

    parameter: str
    start: int
    stop: int
    beside: tuple[str, ...] = ()
    """Parameters of the same shape whose same rows are the tensor's further columns."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """All of them, from left to right."""
        return (self.parameter, *self.beside)


def all_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """`LocalRows` of a parameter that is not sharded."""
    return parameter.detach(), 0


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers on the CPU that depend on the seed and a tensor's name alone."""
    digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def keep(whole: Tensor, parameter: Tensor, local_rows: LocalRows) -> None:
    """Write this process's rows of `whole`, a tensor of the parameter's shape, into the parameter."""
    local, first = local_rows(parameter)
    local.copy_(whole[first : first + local.shape[0]])


def modules(model: nn.Module, kind: type[M]) -> Iterator[tuple[str, M]]:
    """(our name, module) of every module of that kind, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, kind):
            yield path, module
