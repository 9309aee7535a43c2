"""Rows to arrays: ids, masks, truncation, refusals, and what is counted on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packtrain.batch import IGNORE
from packtrain.data.tokens import Tokens, tokenize
from packtrain.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data"


def grammar(path: Path, section: Any, rows: list[tuple[Any, Any]]) -> Any:
    path.write_text("\n".join(json.dumps({"input": a, "target": b}) for a, b in rows))
    return section(train_split=str(path), test_split=str(path))


def run(config: Any, tokenizer: Any, context_length: int = 512, **other: Any) -> Any:
    settings_ = {"vocab_size": len(tokenizer), **other}
    return tokenize("grammar_dataset", config, "train", tokenizer=tokenizer, context_length=context_length, **settings_)


def problems(config: Any, tokenizer: Any, context_length: int = 512, **other: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        run(config, tokenizer, context_length, **other)
    return caught.value.problems


def test_ids_and_labels_of_each_row(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    rows = [(f"he go {'home ' * i}", f"he goes {i}") for i in range(5)]
    tokens, audit = run(grammar(tmp_path / "g.jsonl", section, rows), tokenizer)
    assert (tokens.ids.dtype, tokens.labels.dtype, tokens.offsets.dtype) == (np.int32, np.int32, np.int64)
    labelled = 0
    for row, (wrong, right) in enumerate(rows):
        prompt = tokenizer.encode(
            f"{tokenizer.bos_token}Correct this to standard English: {wrong}\n---\nCorrected: ",
            add_special_tokens=False,
        )
        answer = tokenizer.encode(right + tokenizer.eos_token, add_special_tokens=False)
        ids, labels = tokens.row(row)
        assert ids.tolist() == prompt + answer
        assert labels.tolist() == [IGNORE] * len(prompt) + answer
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert tokens.where(row) == f"{tmp_path / 'g.jsonl'} row {row + 1}"
        labelled += len(answer)
    assert audit.rows == audit.eos_labels == 5
    assert audit.labelled == tokens.labelled == labelled
    assert (audit.longest, audit.longest_row) == (tokens.lengths.max(), tokens.where(4))
    assert audit.truncated == 0


def test_long_rows_lose_the_end_of_their_answer_and_are_counted(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", "b"), ("a", "c" * 200), ("a", "d" * 300)])
    whole, _ = run(config, tokenizer, 1000)
    limit = int(whole.lengths[0]) + 5
    tokens, audit = run(config, tokenizer, limit)
    assert tokens.lengths.tolist() == [limit - 5, limit, limit]
    assert (audit.truncated, audit.eos_labels) == (2, 1)
    assert np.array_equal(tokens.row(1)[0], whole.row(1)[0][:limit])
    assert "2 rows were longer" in "\n".join(audit.lines())


def test_a_row_whose_prompt_fills_the_context_is_refused_with_its_numbers(
    tmp_path: Path, section: Any, tokenizer: Any
) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", "b"), ("long " * 40, "c")])
    whole, _ = run(config, tokenizer)
    prompt = int((whole.row(1)[1] == IGNORE).sum())
    found = problems(config, tokenizer, prompt)
    assert f"{tmp_path / 'g.jsonl'}:2: row 2: its prompt has {prompt} tokens" in found[0]
    assert f"context_length is {prompt}" in found[0]
    assert "--context_length" in found[0]
    assert "--on_bad_rows skip" in found[-1]
    tokens, _ = run(config, tokenizer, prompt + 1)  # one label is enough
    assert (tokens.row(1)[1] != IGNORE).sum() == 1


def test_skipped_rows_are_listed_and_the_others_keep_their_numbers(
    tmp_path: Path, section: Any, tokenizer: Any
) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", "b"), ("a", ""), (None, "c"), ("x" * 400, "d"), ("e", "f")])
    tokens, audit = run(config, tokenizer, 100, on_bad_rows="skip")
    assert tokens.numbers.tolist() == [1, 5]
    assert tokens.where(1).endswith("row 5")
    assert [(s["file"], s["row"]) for s in audit.skipped] == [(str(tmp_path / "g.jsonl"), row) for row in (2, 3, 4)]
    assert "empty" in str(audit.skipped[0]["reason"])
    json.dumps(audit.skipped)
    found = problems(config, tokenizer, 100)
    assert len(found) == 4
    assert "3 of 5 rows" in found[-1]


def test_when_no_row_is_left_skipping_is_an_error_too(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", ""), ("b", " ")])
    assert "2 of 2 rows" in (last := problems(config, tokenizer, on_bad_rows="skip")[-1])
    assert "nothing to train on" in last
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    bad = section(train_split=str(tmp_path / "bad.jsonl"))
    assert len(problems(bad, tokenizer, on_bad_rows="skip")) == 3


def test_five_rows_are_shown_and_the_rest_counted(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", "")] * 33 + [("a", "b")])
    found = problems(config, tokenizer)
    assert len(found) == 6
    assert "row 5" in found[4]
    assert "33 of 34 rows (the first 5 are above)" in found[5]


def test_tokens_that_the_model_does_not_have(tmp_path: Path, section: Any, tokenizer: Any) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("a", "b"), ("he go", "x")])
    highest = int(run(config, tokenizer)[0].ids.max())
    found = problems(config, tokenizer, vocab_size=highest, on_bad_rows="skip")  # skipping would hide it
    assert f"token {highest}" in found[0]
    assert f"vocabulary of {highest}" in found[0]
    assert "row 1" in found[0]
    assert "--tokenizer_name" in found[-1]
    assert run(config, tokenizer, vocab_size=highest + 1)[0].rows == 2


def test_labels_beyond_the_vocabulary_and_rows_without_one(tmp_path: Path, section: Any) -> None:
    def refused(row: str) -> str:
        path = tmp_path / f"m{abs(hash(row))}.py"
        path.write_text(f"def get_custom_dataset(c, t, s): return [{row}]")
        config = section(file=str(path), train_split="train")
        with pytest.raises(UserError) as caught:
            tokenize("custom_dataset", config, "train", tokenizer=None, context_length=9, vocab_size=10)
        return caught.value.problems[0]

    assert "token 10 (place 1 of labels)" in refused("{'input_ids': [1, 2], 'labels': [1, 10]}")
    assert "token -1 (place 0 of input_ids)" in refused("{'input_ids': [-1, 2], 'labels': [1, 2]}")
    assert "no label that could be trained" in refused("{'input_ids': [1, 2], 'labels': [-100, -100]}")
    # A row's first token follows nothing, so a label on it alone trains nothing.
    assert "no label that could be trained" in refused("{'input_ids': [1, 2], 'labels': [1, -100]}")


def test_synthetic_needs_no_tokenizer(section: Any) -> None:
    config = section(rows=5, length=7, vocab_size=0, seed=1)
    tokens, audit = tokenize("synthetic_dataset", config, "train", tokenizer=None, context_length=6, vocab_size=11)
    assert (audit.rows, audit.tokens, audit.labelled, audit.truncated, audit.eos_labels) == (5, 30, 25, 5, 0)
    assert tokens.where(0) == "synthetic_dataset[train] row 1"
    with pytest.raises(UserError, match="no row to train on"):
        tokenize("synthetic_dataset", section(rows=0, length=7, vocab_size=0, seed=1), "train", tokenizer=None,
                 context_length=6, vocab_size=11)  # fmt: skip


def test_saved_tokens_open_as_a_memory_map_with_the_same_fingerprint(
    tmp_path: Path, section: Any, tokenizer: Any
) -> None:
    tokens, _ = run(grammar(tmp_path / "g.jsonl", section, [("a", "b"), ("c", "d")]), tokenizer)
    tokens.save(tmp_path / "saved")
    opened = Tokens.open(tmp_path / "saved")
    assert isinstance(opened.ids, np.memmap)
    for name in ("ids", "labels", "offsets", "numbers"):
        assert np.array_equal(getattr(tokens, name), getattr(opened, name))
    assert opened.file == tokens.file
    assert opened.fingerprint == tokens.fingerprint
    other, _ = run(grammar(tmp_path / "h.jsonl", section, [("a", "b"), ("c", "e")]), tokenizer)
    assert other.fingerprint != tokens.fingerprint


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=8),
    context_length=st.integers(45, 120),
)
def test_every_kept_row_fits_and_has_a_label_and_none_disappears(
    tmp_path: Path, section: Any, tokenizer: Any, lengths: list[tuple[int, int]], context_length: int
) -> None:
    config = grammar(tmp_path / "g.jsonl", section, [("he", "h"), *(("q" * a, "z" * b) for a, b in lengths)])
    # One row that always fits, so that something is left to look at.
    tokens, audit = run(config, tokenizer, context_length, on_bad_rows="skip")
    assert sorted([*tokens.numbers, *(int(s["row"]) for s in audit.skipped)]) == [*range(1, len(lengths) + 2)]
    assert (tokens.lengths <= context_length).all()
    assert all((tokens.row(row)[1][1:] != IGNORE).any() for row in range(tokens.rows))
    assert audit.eos_labels == audit.rows - audit.truncated


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not at {SHARED}")
@pytest.mark.parametrize(
    ("name", "fields", "rows"),
    [
        ("grammar_dataset", {"train_split": "jfleg_train.csv", "test_split": "jfleg_validation.csv"}, (2400, 154)),
        (
            "samsum_dataset",
            {"train_split": "dialogsum_train.json", "test_split": "dialogsum_validation.json"},
            (400, 100),
        ),
        ("alpaca_dataset", {"data_path": "alpaca_999.json"}, (950, 49)),
    ],
)
def test_real_data(section: Any, tokenizer: Any, name: str, fields: dict[str, str], rows: tuple[int, int]) -> None:
    where = {field: str(SHARED / file) for field, file in fields.items()}
    config = section(**{"train_split": "train", "test_split": "val", "data_path": None, **where})
    for split, count in zip(("train", "validation"), rows, strict=True):
        tokens, audit = tokenize(
            name, config, split, tokenizer=tokenizer, context_length=8192, vocab_size=len(tokenizer),  # type: ignore[arg-type]
            on_bad_rows="skip",
        )  # fmt: skip
        assert audit.rows + len(audit.skipped) == count
        assert len(audit.skipped) <= 1, audit.skipped
        assert audit.eos_labels == audit.rows - audit.truncated
        assert audit.tokens == tokens.offsets[-1]
