"""Collectives of a step and of a start, over all ranks.

sum_            a small device tensor, summed in place
same_on_all     a digest that must be the same everywhere (settings, data, order), told through the store
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from packtrain.distributed.place import Place
from packtrain.errors import Fault


def sum_(tensor: Tensor, place: Place) -> Tensor:
    """Sum a tensor over all ranks, in place and without waiting for the device; one rank communicates nothing."""
    if place.world_size > 1:
        dist.all_reduce(tensor, group=place.group)
    return tensor


def same_on_all(place: Place, name: str, digest: str) -> None:
    """Raise Fault on every rank, naming those at odds with rank 0, unless all have the same digest of `name`."""
    place.tell(f"{name}/of/{place.rank}", digest)

    def at_odds() -> list[int]:
        return [rank for rank in range(place.world_size) if place.wait_for(f"{name}/of/{rank}") != digest]

    ranks = place.agree(f"{name}/at_odds", at_odds)
    if ranks:
        listed = ", ".join(map(str, ranks))
        raise Fault(f"{name} of rank {listed} differs from rank 0's; are all machines given the same files and flags?")
