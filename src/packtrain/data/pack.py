"""Best-fit packing: whole documents, as full rows as they go, none cut, none dropped.

Documents are taken longest first, and each goes into the fullest pack that still has room for it (best-fit decreasing:
at most 11/9 of the fewest possible packs, plus 4; Johnson 1973).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows of the data go together; one group is one row of a batch."""

    rows: NDArray[np.int64]
    """Row numbers, group after group; each row of the data once."""

    offsets: NDArray[np.int64]
    """[groups + 1], where groups begin and end in `rows`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, group: int) -> NDArray[np.int64]:
        return self.rows[self.offsets[group] : self.offsets[group + 1]]


def single(count: int) -> Groups:
    """Each of `count` rows by itself."""
    return Groups(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: NDArray[np.int64], context_length: int, seed: int) -> Groups:
    """Packs of at most `context_length` tokens; a function of its arguments alone.

    `seed` decides which of equally long documents comes first, and so meets which others. O(n log n) steps.
    """
    if len(lengths) and int(lengths.max()) > context_length:
        raise ValueError(f"a document has {int(lengths.max())} tokens, more than context_length {context_length}")
    longest_first = np.lexsort((shuffled(len(lengths), seed, 0), -lengths))
    packs: list[list[int]] = []
    # Open packs by the room left in them, and the rooms that occur, in order.
    open_packs: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack_number, room = len(packs), context_length
            packs.append([])
        else:
            room = rooms[place]
            pack_number = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[place]
        packs[pack_number].append(row)
        left = room - length
        if left:
            if left not in open_packs:
                open_packs[left] = []
                insort(rooms, left)
            open_packs[left].append(pack_number)
    return _flat(packs)


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count) by (seed, epoch) alone.

    The raw stream of PCG64 is the same in every version of numpy; what Generator makes of it may change.
    """
    return np.argsort(np.random.PCG64([seed % 2**64, epoch]).random_raw(count), kind="stable")


def _flat(groups: Sequence[Sequence[int]]) -> Groups:
    offsets = np.zeros(len(groups) + 1, dtype=np.int64)
    np.cumsum([len(group) for group in groups], out=offsets[1:])
    return Groups(np.fromiter(chain.from_iterable(groups), dtype=np.int64, count=int(offsets[-1])), offsets)
