"""Collectives of a step and of a start, over all ranks.

sum_            a small device tensor, summed in place
least           the smallest of all ranks' numbers; waits for the device
same_on_all     a digest that must be the same everywhere (settings, order, copies), told through the store
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from packtrain.distributed.place import Place
from packtrain.errors import Fault


def sum_(tensor: Tensor, place: Place) -> Tensor:
    """Sum a tensor over all ranks, in place and without waiting for the device; one rank communicates nothing."""
    if place.world_size > 1:
        dist.all_reduce(tensor, group=place.group)
    return tensor


def least(number: float, place: Place) -> float:
    """The smallest of what all ranks give, on every rank."""
    if place.world_size == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64, device=place.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=place.group)
    return found.item()


def same_on_all(place: Place, name: str, digest: str, among: str = "") -> None:
    """Raise Fault on every rank, naming those at odds, unless all have the same digest of `name`.

    Only ranks with the same `among` are compared, each with the first of them.
    """
    place.tell(f"{name}/of/{place.rank}", [among, digest])

    def at_odds() -> list[int]:
        told = [place.wait_for(f"{name}/of/{rank}") for rank in range(place.world_size)]
        first = dict(reversed(told))
        return [rank for rank, (kind, value) in enumerate(told) if first[kind] != value]

    ranks = place.agree(f"{name}/at_odds", at_odds)
    if ranks:
        listed = ", ".join(map(str, ranks))
        raise Fault(
            f"{name} of rank {listed} differs from rank 0's (or its copy's); "
            "are all machines given the same files and flags?"
        )
