"""The user's own file: what it may give, and how its mistakes are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packtrain.data import custom
from packtrain.data.tokens import tokenize
from packtrain.errors import UserError

ROW = "{'input_ids': [1, 2, 3], 'labels': [-100, 2, 3], 'attention_mask': [1, 1, 1]}"


def module(folder: Path, body: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(body)
    return path


def run(section: Any, path: Path | str, tokenizer: Any = None, on_bad_rows: Any = "error") -> Any:
    config = section(file=str(path), train_split="tr", test_split="te", data_path="")
    return tokenize(
        "custom_dataset",
        config,
        "train",
        tokenizer=tokenizer,
        context_length=8,
        vocab_size=100,
        on_bad_rows=on_bad_rows,
    )


def refusal(section: Any, path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        run(section, path)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    "rows",
    [
        f"[{ROW}] * 2",
        f"(row for row in [{ROW}] * 2)",
        f"datasets.Dataset.from_list([{ROW}] * 2)",
        "Map()",
        "[{'input_ids': torch.tensor([1, 2, 3]), 'labels': np.array([-100, 2, 3])}] * 2",
        "[{'input_ids': [0, 1, 2, 3, 0, 0], 'labels': [-100, -100, 2, 3, 0, 0], 'attention_mask': [0,1,1,1,0,0]}] * 2",
    ],
)
def test_rows_in_every_form(tmp_path: Path, section: Any, rows: str) -> None:
    body = (
        "import datasets, numpy as np, torch\n"
        "class Map(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 2\n"
        f"    def __getitem__(self, i): return {ROW}\n"
        f"def get_custom_dataset(config, tokenizer, split): return {rows}\n"
    )
    tokens, audit = run(section, module(tmp_path, body))
    assert tokens.rows == audit.rows == 2
    for row in range(2):
        ids, labels = tokens.row(row)
        assert ids.tolist() == [1, 2, 3]
        assert labels.tolist() == [-100, 2, 3]
    assert tokens.where(1).endswith("mine.py:get_custom_dataset(tr) row 2")


def test_the_function_gets_section_tokenizer_and_split_and_the_file_runs_once(tmp_path: Path, section: Any) -> None:
    counter = tmp_path / "runs"
    body = (
        f"open({str(counter)!r}, 'a').write('x')\n"
        "def other(config, tokenizer, split):\n"
        f"    assert (config.test_split, tokenizer, split) == ('te', 'T', 'tr')\n    return [{ROW}]\n"
        "def get_data_collator(tokenizer): return lambda rows: tokenizer\n"
    )
    path = module(tmp_path, body)
    config = section(file=f"{path}:other", train_split="tr", test_split="te")
    for _ in range(2):
        assert len(custom.rows(config, "T", "tr").rows) == 1
    collate = custom.collator(config, "T")  # by its own name although FUNCTION is `other`
    assert collate is not None
    assert collate([]) == "T"
    assert counter.read_text() == "x"
    os.utime(path, ns=(1, 1))
    custom.rows(config, "T", "tr")
    assert counter.read_text() == "xx"  # a changed file runs again


def test_no_collator_is_none(tmp_path: Path, section: Any) -> None:
    assert custom.collator(section(file=str(module(tmp_path, "x = 1"))), None) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def get_custom_dataset(c, t, s)\n", ["mine.py:1", "SyntaxError"]),
        ("import nothing_like_this\n", ["mine.py:1", "ModuleNotFoundError", "nothing_like_this"]),
        ("def load(c, t, s): return []\n", ["no function get_custom_dataset", "[load]", "mine.py:FUNCTION"]),
        ("def get_custom_dataset(c, t, s):\n    return c.nothing\n", ["mine.py:2", "AttributeError", "'tr'"]),
        ("def get_custom_dataset(c, t, s):\n    yield {}\n    1 / 0\n", ["mine.py:3", "ZeroDivisionError"]),
        ("def get_custom_dataset(c, t, s): return 3\n", ["gave a value of type int"]),
        ("def get_custom_dataset(c, t, s): return []\n", ["gave no rows"]),
        ("def get_custom_dataset(c, t, s): return [[1]]\n", ["row 1", "is a list, expected a dict"]),
    ],
)
def test_mistakes_in_the_file_are_the_users_to_mend(tmp_path: Path, section: Any, body: str, said: list[str]) -> None:
    problem = refusal(section, module(tmp_path, body))
    assert all(part in problem for part in said), problem


@pytest.mark.parametrize("file", ["nowhere.py", "nowhere.py:function", "data.txt", "mine"])
def test_a_wrong_file_names_the_flag(section: Any, file: str) -> None:
    assert "--custom_dataset.file" in refusal(section, file)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": [1]}, "no input_ids; found [labels]"),
        ({"input_ids": [1, 2]}, "no labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "input_ids is not a flat list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [0.5, 1.0]}, "labels is not a flat list"),
        ({"input_ids": [1, [2]], "labels": [1, 2]}, "input_ids is not a flat list"),
        ({"input_ids": [1, 2], "labels": [1]}, "lengths differ: input_ids 2, labels 1, attention_mask 2"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels hold -1, expected a token id or -100"),
        ({"input_ids": [], "labels": []}, "input_ids is empty"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 0]}, "hides every token"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "hides tokens inside"),
    ],
)
def test_wrong_rows(row: dict[str, Any], said: str) -> None:
    found = custom.arrays(row)
    assert isinstance(found, str)
    assert said in found


def test_arrays_of_tensors_and_lists_are_the_same() -> None:
    plain = custom.arrays({"input_ids": [5, 6], "labels": [-100, 6]})
    tensors = custom.arrays({"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])})
    assert np.array_equal(plain, tensors)  # type: ignore[arg-type]


def test_the_example_file_runs(section: Any, tokenizer: Any) -> None:
    path = Path(__file__).parents[3] / "examples/custom_dataset.py"
    for split, rows in (("train", 400), ("validation", 40)):
        config = section(file=str(path), train_split="train", test_split="validation", data_path="")
        tokens, audit = tokenize(
            "custom_dataset", config, split, tokenizer=tokenizer, context_length=64, vocab_size=len(tokenizer)
        )
        assert tokens.rows == audit.eos_labels == rows
        ids, labels = tokens.row(0)
        question, answer = tokenizer.decode(ids[labels == -100]), tokenizer.decode(ids[labels != -100])
        first, second = (int(word) for word in question.rstrip("?\n").split() if word.isdigit())
        assert answer == f"{first + second}</s>"
