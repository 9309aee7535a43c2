"""Batches of any optimizer step, for any rank, from nothing but the step's number.

    Loader(tokens, ...).step(index) -> list[Batch]

Items are rows (padding) or packs (packing). Epoch e visits every item once, in an order that (seed, e) decide and
the number of ranks does not. With B = batch_size, W ranks, A = accumulation, G = B W A: step k of an epoch takes
items [k G, (k + 1) G) and micro-batch m of rank r items [k G + (m W + r) B, + B). The epoch's last step may be short;
each rank then has as many micro-batches as the fullest, empty ones where its items ran out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from packtrain.batch import IGNORE, Batch
from packtrain.data.collate import collated, make_batch
from packtrain.data.custom import Collator
from packtrain.data.pack import pack, shuffled, single
from packtrain.data.tokens import Tokens
from packtrain.errors import UserError

Strategy = Literal["padding", "packing"]


class Loader:
    """One rank's view of a split. Holds no position: `step` may be called in any order, from any thread."""

    def __init__(
        self,
        tokens: Tokens,
        *,
        strategy: Strategy,
        context_length: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
        collator: Collator | None = None,
        step_items: int | None = None,
    ) -> None:
        """`step_items`: G of the run that is gone on with, whatever B W A is now."""
        if collator is not None and strategy == "packing":
            raise UserError("get_data_collator makes rows of its own, so it needs --batching_strategy padding")
        self._tokens = tokens
        self._groups = pack(tokens.lengths, context_length, seed) if strategy == "packing" else single(tokens.rows)
        self._batch_size = batch_size
        self._step_items = step_items or batch_size * world_size * accumulation
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._shuffle = shuffle
        self._pad_id = pad_id
        self._collator = collator
        self._sizes = np.add.reduceat(tokens.lengths[self._groups.rows], self._groups.offsets[:-1])
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._left_out = np.zeros(0, dtype=np.int64)

    @property
    def rows(self) -> int:
        """Rows of the data."""
        return self._tokens.rows

    @property
    def items(self) -> int:
        """Rows, or packs of rows."""
        return len(self._groups)

    @property
    def batch_size(self) -> int:
        """Items of a micro-batch."""
        return self._batch_size

    @property
    def labels_total(self) -> int:
        """Tokens trained in an epoch, on all ranks."""
        return self._tokens.labelled

    @property
    def step_items(self) -> int:
        """G, the items of one step on all ranks."""
        return self._step_items

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every item once."""
        return -(-self.items // self.step_items)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a full step on each rank."""
        return -(-self._step_items // (self._batch_size * self._world_size))

    def micro_batches(self, index: int) -> int:
        """Of step `index` on each rank: fewer in an epoch's last one."""
        return len(self._abreast(index))

    def most_rows(self, index: int) -> int:
        """Rows of this rank's fullest micro-batch of step `index`: it can come in so many pieces."""
        return max(sum(map(len, self._taken(items, self._rank))) for items in self._abreast(index))

    def seen(self, steps: int) -> int:
        """Items that so many steps take."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.items + rest * self._step_items

    @property
    def last_step_items(self) -> int:
        """Items of an epoch's last step, from 1 to G."""
        return self.items - (self.steps_per_epoch - 1) * self.step_items

    @property
    def filled(self) -> float:
        """Share of an epoch's places that hold tokens; the rest is padding. Of the first epoch, where it varies."""
        sizes = self._sizes[self.order(0)]
        starts = np.arange(0, len(sizes), self._batch_size)
        widths = np.maximum.reduceat(sizes, starts)
        counts = np.diff(np.append(starts, len(sizes)))
        return float(sizes.sum() / (widths * counts).sum())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Items in the order in which an epoch visits them."""
        if not self._shuffle:
            return np.arange(self.items, dtype=np.int64)
        known = self._order
        if known is None or known[0] != epoch:
            # One assignment, so that another thread sees the old pair or the new.
            self._order = known = (epoch, shuffled(self.items, self._seed, epoch + 1))
        return known[1]

    def step(self, index: int, pieces: int = 1) -> list[Batch]:
        """This rank's micro-batches of global step `index` (from 0); as many as on every other rank.

        With more `pieces` than 1 each comes as so many smaller ones in a row, with the same rows between them.
        """
        return [
            self._batch(part, items, index, pieces)
            for items in self._abreast(index)
            for part in _parts(self._taken(items, self._rank), pieces)
        ]

    def rows_of(self, index: int) -> list[list[list[int]]]:
        """Rows of step `index` by rank and micro-batch, of all ranks: numbers of the data's rows from 0."""
        return [
            [[int(row) for group in self._taken(items, rank) for row in group] for items in self._abreast(index)]
            for rank in range(self._world_size)
        ]

    def leave_out(self, rows: Iterable[int]) -> None:
        """From now on these rows are in no batch; every other row stays where it is."""
        self._left_out = np.array(sorted({*self._left_out.tolist(), *rows}), dtype=np.int64)

    @property
    def left_out(self) -> list[int]:
        """Rows that `leave_out` was given so far."""
        return [int(row) for row in self._left_out]

    def origin(self, row: int) -> tuple[str, int]:
        """(file, number in it from 1) of a row."""
        return self._tokens.file, int(self._tokens.numbers[row])

    def labels(self, rows: Sequence[int]) -> int:
        """Tokens of these rows that are trained."""
        return sum(int((self._tokens.row(row)[1][1:] != IGNORE).sum()) for row in rows)

    def _abreast(self, index: int) -> list[NDArray[np.int64]]:
        """The items of step `index`, by micro-batch: those that all ranks take side by side."""
        epoch, step = divmod(index, self.steps_per_epoch)
        items = self.order(epoch)[step * self.step_items : (step + 1) * self.step_items]
        abreast = self._batch_size * self._world_size
        return [items[start : start + abreast] for start in range(0, len(items), abreast)]

    def _taken(self, items: NDArray[np.int64], rank: int) -> list[NDArray[np.int64]]:
        """A rank's part of items taken side by side: their rows, group by group."""
        groups = [self._groups[int(item)] for item in items[rank * self._batch_size :][: self._batch_size]]
        if len(self._left_out):
            groups = [group[~np.isin(group, self._left_out)] for group in groups]
        return [group for group in groups if len(group)]

    def _batch(self, groups: list[NDArray[np.int64]], items: NDArray[np.int64], index: int, pieces: int) -> Batch:
        """One batch of these groups, or one of padding, of the usual shape, that keeps ranks in step."""
        tokens, names, width = self._tokens, None, 0
        if not groups:
            width = -(-int(self._sizes[items].max()) // pieces)
        elif self._collator is not None:
            names = np.concatenate(groups)
            tokens, groups = collated(tokens, names, self._collator), list(np.arange(len(names))[:, None])
        return make_batch(tokens, groups, seed=self._seed, step=index, pad_id=self._pad_id, width=width, names=names)


def _parts(groups: list[NDArray[np.int64]], pieces: int) -> list[list[NDArray[np.int64]]]:
    """`pieces` parts of nearly as many groups each; too few packs are taken apart, and then parts may be empty."""
    if pieces == 1:
        return [groups]
    if len(groups) < pieces:
        groups = [row for group in groups for row in np.split(group, len(group))]
    cuts = [round(len(groups) * part / pieces) for part in range(pieces + 1)]
    return [groups[begin:end] for begin, end in pairwise(cuts)]
