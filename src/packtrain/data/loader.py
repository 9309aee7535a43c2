"""Batches of any optimizer step, for any rank, from nothing but the step's number.

    Loader(tokens, ...).step(index) -> list[Batch]

Items are rows (padding) or packs (packing). Epoch e visits every item once, in an order that (seed, e) decide and
the number of ranks does not. With B = batch_size, W ranks, A = accumulation, G = B W A: step k of an epoch takes
items [k G, (k + 1) G) and micro-batch m of rank r items [k G + (m W + r) B, + B). The epoch's last step may be short;
each rank then has as many micro-batches as the fullest, empty ones where its items ran out.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from packtrain.batch import Batch
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

    @property
    def rows(self) -> int:
        """Rows of the data."""
        return self._tokens.rows

    @property
    def items(self) -> int:
        """Rows, or packs of rows."""
        return len(self._groups)

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

    def step(self, index: int) -> list[Batch]:
        """This rank's micro-batches of global step `index` (from 0); as many as on every other rank."""
        epoch, step = divmod(index, self.steps_per_epoch)
        items = self.order(epoch)[step * self.step_items : (step + 1) * self.step_items]
        abreast = self._batch_size * self._world_size
        return [self._micro_batch(items[start : start + abreast], index) for start in range(0, len(items), abreast)]

    def _micro_batch(self, items: NDArray[np.int64], index: int) -> Batch:
        """This rank's part of the items that all ranks take side by side."""
        mine = items[self._rank * self._batch_size :][: self._batch_size]
        groups = [self._groups[int(item)] for item in mine]
        tokens, names, width = self._tokens, None, 0
        if not groups:
            width = int(self._sizes[items].max())
        elif self._collator is not None:
            names = np.concatenate(groups)
            tokens, groups = collated(tokens, names, self._collator), list(np.arange(len(names))[:, None])
        return make_batch(tokens, groups, seed=self._seed, step=index, pad_id=self._pad_id, width=width, names=names)
