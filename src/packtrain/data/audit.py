"""What a data set turned out to be: counts for the log and `packtrain data`, and a row as it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packtrain.batch import IGNORE


@dataclass(frozen=True, slots=True)
class Audit:
    """Counts of one split after tokenising."""

    file: str
    """The file, hub split or function that the rows came from."""

    rows: int
    tokens: int
    labelled: int
    """Tokens that are trained: labelled, and not the first of their row."""

    truncated: int
    """Rows cut to context_length; they lose the end of their answer."""

    eos_labels: int
    """Rows whose last token is the end of sequence, and trained."""

    longest: int
    """Tokens of the longest row, after cutting."""

    longest_row: str
    """Where that row is."""

    skipped: tuple[dict[str, str | int | None], ...]
    """file, row, line (None where there is none), reason of every row left out."""

    eos: str | None = None
    """The end of sequence; None where there is no tokenizer that has one."""

    eos_masked: int = 0
    """Rows whose last token is the end of sequence, and not trained."""

    def lines(self) -> list[str]:
        """The counts in sentences; only what there is to say."""
        said = [
            f"{self.file}: {self.rows:,} rows, {self.tokens:,} tokens, {self.labelled:,} of them trained "
            f"({self.labelled / self.tokens:.1%}), longest row {self.longest:,} tokens ({self.longest_row})",
            f"{self.eos_labels:,} of {self.rows:,} rows teach the end of sequence",
        ]
        if self.eos_labels == 0 and self.eos is not None:
            said.append(
                f"warning: no row teaches the end of sequence ({self.eos}), so the model will not learn to stop; "
                "end each row's labels with it"
            )
        if self.truncated:
            said.append(f"{self.truncated:,} rows were longer than context_length and lost the end of their answer")
        if self.skipped:
            first = self.skipped[0]
            said.append(f"bad rows left out: {len(self.skipped):,}, the first: row {first['row']}: {first['reason']}")
        return said


def pairs(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """One row as (text, whether it is trained), in order; the texts joined are the row decoded.

    A token that ends inside a character is shown with the token that completes it.
    """
    trained = [place > 0 and label != IGNORE for place, label in enumerate(labels)]
    shown: list[tuple[str, bool]] = []
    known = start = 0
    for end in range(1, len(ids) + 1):
        # Decoding from the token before keeps the space that some tokenizers drop at a text's beginning.
        before = _decode(ids[known:start], tokenizer)
        text = _decode(ids[known:end], tokenizer)
        if text.endswith("\ufffd") and end < len(ids) and trained[end] == trained[end - 1]:
            continue
        shown.append((text[len(before) :], trained[end - 1]))
        known, start = start, end
    return shown


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
