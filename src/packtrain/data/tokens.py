"""A tokenised split: three flat arrays, and the way there.

    tokenize(name, config, split, ...) -> (Tokens, Audit)
    check_rows(name, config, split, ...)    what can be told before there is a tokenizer

T tokens, R rows. Every row of `Tokens` fits context_length and has at least one label that is trained. Rows that
cannot be are refused with file and row number, all at once, or left out and listed (`on_bad_rows="skip"`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from packtrain.batch import IGNORE
from packtrain.data import custom, sources
from packtrain.data.audit import Audit
from packtrain.data.files import BadRow, Row, Table
from packtrain.data.render import TEMPLATES, Encoder, Template
from packtrain.data.sources import Split
from packtrain.errors import UserError

CHUNK = 1000
"""Rows encoded in one call: enough for a fast tokenizer's threads, little beside the arrays."""

SHOWN = 5
"""Rows of a file listed in one message; the rest are counted."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """R tokenised rows, end to end. Read-only; may be memory-mapped."""

    ids: NDArray[np.int32]
    """[T]"""

    labels: NDArray[np.int32]
    """[T], IGNORE where a token is not trained. The first label of a row never is: nothing comes before it."""

    offsets: NDArray[np.int64]
    """[R + 1], where rows begin and end."""

    numbers: NDArray[np.int64]
    """[R], each row's number in its file, from 1."""

    file: str

    @property
    def rows(self) -> int:
        """R."""
        return len(self.numbers)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[R], tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def labelled(self) -> int:
        """Tokens that are trained: labelled, and not the first of their row."""
        return int((self.labels != IGNORE).sum() - (self.labels[self.offsets[:-1]] != IGNORE).sum())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the arrays that are trained on: ids, labels, offsets."""
        digest = sha256()
        for array in (self.ids, self.labels, self.offsets):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def where(self, row: int) -> str:
        """Where a row came from, e.g. "train.csv row 7"."""
        return f"{self.file} row {self.numbers[row]}"

    def row(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(ids, labels) of one row."""
        cut = slice(self.offsets[row], self.offsets[row + 1])
        return self.ids[cut], self.labels[cut]

    def save(self, folder: Path) -> None:
        """Write the arrays, and last the file that `open` asks for."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "tokens.json").write_text(json.dumps({"file": self.file, "rows": self.rows}), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """What `save` wrote, memory-mapped."""
        file = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["file"]
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}, file=file)


_ARRAYS = ("ids", "labels", "offsets", "numbers")


class Encoded(NamedTuple):
    """One row on its way in: int64 ids and labels of equal length."""

    row: Row
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]


class _Kept(NamedTuple):
    """One row that will be trained on."""

    number: int
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def tokenize(
    name: str,
    config: Any,
    split: Split,
    *,
    tokenizer: Any,
    context_length: int,
    vocab_size: int,
    on_bad_rows: Literal["error", "skip"] = "error",
) -> tuple[Tokens, Audit]:
    """The rows of `split` of data set `name`, ready to train on.

    `config` is that data set's section, `vocab_size` the number of the model's embedding rows; synthetic_dataset needs
    no tokenizer. Raises UserError naming every bad row (when skipping: only if no row is left) and every row with a
    token that the model does not have.
    """
    table, encoded = _encoded(name, config, split, tokenizer, vocab_size)
    bad = list(table.bad)
    foreign: list[BadRow] = []
    good: list[_Kept] = []
    truncated = 0
    for item in encoded:
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        row, ids, labels = item
        if unknown := _unknown(ids, labels, vocab_size):
            foreign.append(BadRow(table.file, row.number, row.line, unknown))
        elif reason := _untrainable(labels, context_length):
            bad.append(BadRow(table.file, row.number, row.line, reason))
        else:
            truncated += len(ids) > context_length
            cut = slice(context_length)
            good.append(_Kept(row.number, ids[cut].astype(np.int32), labels[cut].astype(np.int32)))
    bad.sort(key=lambda b: b.row)
    _refuse(table.file, bad, foreign, len(good), skip=on_bad_rows == "skip")
    tokens = _joined(table.file, good)
    audit = _audit(tokens, truncated, bad, tokenizer)
    if audit.eos_masked and not audit.eos_labels:
        raise UserError(
            f"{table.file}: {audit.eos_masked} of {audit.rows} rows end with the end of sequence ({audit.eos}) and "
            f"none trains it: its label is {IGNORE}, so the model would never learn to stop (a padding token "
            "that is the end of sequence too does that). Label it, or leave it out of the rows"
        )
    return tokens, audit


def check_rows(name: str, config: Any, split: Split, *, on_bad_rows: Literal["error", "skip"] = "error") -> None:
    """Read the rows, if they are in a file, and no more. Raises UserError naming every bad one, as `tokenize` would."""
    if not sources.is_local(name, config, split):
        return
    table = sources.read(name, config, split)
    _refuse(table.file, table.bad, [], len(table.rows), skip=on_bad_rows == "skip")


def _encoded(
    name: str, config: Any, split: Split, tokenizer: Any, vocab_size: int
) -> tuple[Table, Iterator[Encoded | BadRow]]:
    """What was read, and its rows as ids, made as they are asked for."""
    if name in TEMPLATES:
        encoder = Encoder(tokenizer, TEMPLATES[name].turn)
        table = sources.read(name, config, split)
        return table, _rendered(table, TEMPLATES[name], encoder)
    if name == "synthetic_dataset":
        table = sources.synthetic(config, split, vocab_size)
    else:
        table = sources.read(name, config, split, tokenizer)
    return table, _given(table)


def _rendered(table: Table, template: Template, encoder: Encoder) -> Iterator[Encoded]:
    """Prompt without labels, answer with."""
    rows = iter(table.rows)
    while chunk := list(islice(rows, CHUNK)):
        prompts = [template.prompt(row.values) for row in chunk]
        answers = [row.values[template.answer] for row in chunk]
        for row, (prompt, answer) in zip(chunk, encoder(prompts, answers), strict=True):
            ids = np.array(prompt + answer, dtype=np.int64)
            labels = ids.copy()
            labels[: len(prompt)] = IGNORE
            yield Encoded(row, ids, labels)


def _given(table: Table) -> Iterator[Encoded | BadRow]:
    """Rows that come with their ids: input_ids, labels, attention_mask."""
    for row in table.rows:
        found = custom.arrays(row.values)
        if isinstance(found, str):
            yield BadRow(table.file, row.number, row.line, found)
        else:
            yield Encoded(row, *found)


def _joined(file: str, rows: list[_Kept]) -> Tokens:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(item.ids) for item in rows], out=offsets[1:])
    return Tokens(
        ids=np.concatenate([item.ids for item in rows]),
        labels=np.concatenate([item.labels for item in rows]),
        offsets=offsets,
        numbers=np.array([item.number for item in rows], dtype=np.int64),
        file=file,
    )


def _audit(tokens: Tokens, truncated: int, skipped: list[BadRow], tokenizer: Any | None) -> Audit:
    eos = None if tokenizer is None else tokenizer.eos_token_id
    ends = tokens.ids[tokens.offsets[1:] - 1]
    longest = int(tokens.lengths.argmax())
    last = tokens.labels[tokens.offsets[1:] - 1]
    return Audit(
        file=tokens.file,
        rows=tokens.rows,
        tokens=len(tokens.ids),
        labelled=tokens.labelled,
        truncated=truncated,
        eos=None if tokenizer is None else tokenizer.eos_token,
        eos_labels=0 if eos is None else int((last == eos).sum()),
        eos_masked=0 if eos is None else int(((ends == eos) & (last == IGNORE)).sum()),
        longest=int(tokens.lengths[longest]),
        longest_row=tokens.where(longest),
        skipped=tuple(asdict(bad) for bad in skipped),
    )


def _unknown(ids: NDArray[np.int64], labels: NDArray[np.int64], vocab_size: int) -> str:
    """Names the first token that the model has no embedding for."""
    for name, tokens in (("input_ids", ids), ("labels", labels[labels != IGNORE])):
        outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(outside):
            at = int(outside[0])
            return f"token {int(tokens[at])} (place {at} of {name}) is outside the model's vocabulary of {vocab_size}"
    return ""


def _untrainable(labels: NDArray[np.int64], context_length: int) -> str:
    """Says why nothing of a row would be trained."""
    trained = np.flatnonzero(labels[1:] != IGNORE) + 1
    if len(trained) == 0:
        return f"no label that could be trained: all are {IGNORE}, or only the first token has one"
    if trained[0] >= context_length:
        return (
            f"its prompt has {int(trained[0])} tokens and context_length is {context_length}: no token of the answer "
            "would be left; shorten the prompt or raise --context_length"
        )
    return ""


def _refuse(file: str, bad: list[BadRow], foreign: list[BadRow], good: int, *, skip: bool) -> None:
    """Raise one UserError for all rows, unless the bad ones may be left out and others are there."""
    total = len(bad) + len(foreign) + good
    if total == 0:
        raise UserError(f"{file}: there is no row to train on")
    problems: list[str] = []
    if foreign:
        problems += map(str, foreign[:SHOWN])
        problems.append(
            f"{file}: {len(foreign)} of {total} rows{_above(foreign)} hold tokens that the model does not have: "
            "use the tokenizer that belongs to it (--tokenizer_name)"
        )
    if bad and (not skip or good == 0):
        problems += map(str, bad[:SHOWN])
        advice = "mend them, or leave them out with --on_bad_rows skip" if good else "there is nothing to train on"
        problems.append(f"{file}: {len(bad)} of {total} rows{_above(bad)} cannot be trained on: {advice}")
    if problems:
        raise UserError(problems)


def _above(rows: list[BadRow]) -> str:
    return f" (the first {SHOWN} are above)" if len(rows) > SHOWN else ""
