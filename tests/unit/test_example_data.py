"""The demo's sentences: enough of them, clean, and no validation sentence known from training."""

from __future__ import annotations

import csv
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
AT_LEAST = {"train": 440, "validation": 66}
TOO_ALIKE = 0.8
"""A ratio of difflib's: above it, two sentences are the same one with a word changed."""


def pairs(name: str) -> list[tuple[str, str]]:
    with (DATA / f"grammar_{name}.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["input", "target"]
    assert {len(row) for row in rows} == {2}
    return [(source, target) for source, target in rows]


def alike(a: str, b: str) -> bool:
    match = SequenceMatcher(None, a, b, autojunk=False)
    bounds = (match.real_quick_ratio, match.quick_ratio, match.ratio)
    return all(bound() > TOO_ALIKE for bound in bounds)


def flaws(sentence: str) -> list[str]:
    """What is wrong with a sentence as text, not as English."""
    checks = {
        "not plain ASCII": not (sentence.isascii() and sentence.isprintable()),
        "spaces at an end or doubled": sentence != " ".join(sentence.split()),
        "not 4 to 25 words": not 4 <= len(sentence.split()) <= 25,
    }
    return [f"{what}: {sentence!r}" for what, found in checks.items() if found]


@pytest.mark.parametrize("name", AT_LEAST)
def test_rows_are_many_clean_and_different(name: str) -> None:
    rows = pairs(name)
    assert len(rows) >= AT_LEAST[name]
    assert [flaw for row in rows for sentence in row for flaw in flaws(sentence)] == []
    for column in zip(*rows, strict=True):
        assert [sentence for sentence, count in Counter(column).items() if count > 1] == []


@pytest.mark.parametrize("name", AT_LEAST)
def test_targets_are_whole_sentences(name: str) -> None:
    targets = [target for _, target in pairs(name)]
    assert [target for target in targets if not (target[0].isupper() and target[-1] in ".?!")] == []


@pytest.mark.parametrize("name", AT_LEAST)
def test_about_an_eighth_is_right_already(name: str) -> None:
    rows = pairs(name)
    assert 0.10 <= sum(source == target for source, target in rows) / len(rows) <= 0.15


@pytest.mark.parametrize("name", AT_LEAST)
def test_corrections_keep_most_of_the_sentence(name: str) -> None:
    letters_kept = {row: SequenceMatcher(None, *row).quick_ratio() for row in pairs(name)}  # in any order
    assert [row for row, share in letters_kept.items() if share < 0.7] == []


def test_validation_is_new() -> None:
    train = {sentence for row in pairs("train") for sentence in row}
    known = [(new, old) for row in pairs("validation") for new in set(row) for old in train if alike(new, old)]
    assert known == []


def test_the_guards_can_fail() -> None:
    assert alike("My aunt live in a small flat.", "My aunt lives in a small flat.")
    assert not alike("My aunt lives in a small flat.", "Gold is heavier than iron.")
    assert len(flaws(" caf\u00e9")) == 3
    assert flaws("Gold is heavier than iron.") == []
