"""Groups of rows to a `Batch`: the only place that lays tokens out.

R groups, L = tokens of the longest, T = R L. Each row of the data is a document; what is left of a batch row is a
document of padding. Everything is made at once in numpy: document lengths first, all else follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from packtrain.batch import IGNORE, Batch
from packtrain.data.custom import Collator
from packtrain.data.tokens import Tokens
from packtrain.errors import UserError
from packtrain.kernels.random import token_keys

PADDING = -1
"""The row number of a document that is none."""


def make_batch(
    tokens: Tokens,
    groups: Sequence[NDArray[np.int64]],
    *,
    seed: int,
    step: int,
    pad_id: int,
    width: int = 0,
    names: NDArray[np.int64] | None = None,
) -> Batch:
    """One batch row for each group of rows of `tokens`, padded with `pad_id` to the longest and at least `width`.

    Without a group: one row of padding. `names[i]` is row i's number in the data if it is another; dropout's keys
    are made of it, so a row has the same wherever it is placed.
    """
    documents, lengths, width = _documents(tokens, groups, width)
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=edges[1:])
    rows = np.repeat(documents, lengths)
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1], lengths)
    real = rows != PADDING
    source = tokens.offsets[rows[real]] + positions[real]
    ids = np.full(len(rows), pad_id, dtype=np.int64)
    labels = np.full(len(rows), IGNORE, dtype=np.int64)
    ids[real] = tokens.ids[source]
    labels[real] = tokens.labels[source]
    # A document's first token follows nothing of its own, so its label is not trained.
    trained = np.flatnonzero((labels != IGNORE) & (positions > 0))
    named = rows if names is None else np.where(real, names[rows], PADDING)
    shape = (-1, width)
    flat_positions = torch.from_numpy(positions)
    return Batch(
        ids=torch.from_numpy(ids).view(shape),
        positions=flat_positions.view(shape),
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)),
        lengths=tuple(lengths.tolist()),
        max_seqlen=int(lengths.max()),
        whole_rows=all(len(group) == 1 for group in groups),
        index=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(labels[trained]),
        keys=token_keys(seed, step, torch.from_numpy(named), flat_positions).view(shape),
        tokens=int(real.sum()),
        rows=tuple(named[edges[:-1]][documents != PADDING].tolist()),
    )


def _documents(
    tokens: Tokens, groups: Sequence[NDArray[np.int64]], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(row of each document in order, its length, columns): each group's rows, then its padding if it needs any."""
    groups = groups or [np.zeros(0, dtype=np.int64)]
    width = max(width, *(int(tokens.lengths[group].sum()) for group in groups))
    documents: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []
    for group in groups:
        documents.append(group)
        lengths.append(tokens.lengths[group])
        left = width - int(lengths[-1].sum())
        if left:
            documents.append(np.array([PADDING]))
            lengths.append(np.array([left]))
    return np.concatenate(documents), np.concatenate(lengths), width


def collated(tokens: Tokens, rows: NDArray[np.int64], collator: Collator) -> Tokens:
    """What the user's collator makes of `rows`, its padding taken off again, on whichever side it was.

    Raises UserError if it fails, or gives something other than input_ids, labels, attention_mask, [rows, columns] each.
    """
    asked = []
    for row in rows:
        ids, labels = tokens.row(int(row))
        asked.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * len(ids)})
    try:
        made = collator(asked)
    except Exception as error:
        raise UserError(f"{tokens.file}: get_data_collator failed with {type(error).__name__}: {error}") from error
    found = {name: _matrix(made, name, tokens.file, len(rows)) for name in ("input_ids", "labels", "attention_mask")}
    if len({array.shape for array in found.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        raise UserError(f"{tokens.file}: get_data_collator gives different shapes: {shapes}")
    seen = found["attention_mask"] != 0
    lengths = seen.sum(axis=1)
    breaks = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    if (lengths == 0).any() or ((breaks == 1).sum(axis=1) > 1).any():
        raise UserError(f"{tokens.file}: get_data_collator's attention_mask must be one unbroken run of 1 in every row")
    return Tokens(
        ids=found["input_ids"][seen].astype(np.int32),
        labels=found["labels"][seen].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        numbers=tokens.numbers[rows],
        file=tokens.file,
    )


def _matrix(made: Any, name: str, file: str, rows: int) -> NDArray[np.int64]:
    try:
        array = np.asarray(made[name])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: get_data_collator's result has no {name} that is a table of numbers; "
            "expected a dict of input_ids, labels and attention_mask, rows of one length each"
        ) from error
    if array.ndim != 2 or len(array) != rows or array.dtype.kind not in "biu":
        raise UserError(
            f"{file}: get_data_collator's {name} is {array.dtype} of shape {array.shape}, "
            f"expected whole numbers of shape ({rows}, columns)"
        )
    return array.astype(np.int64)
