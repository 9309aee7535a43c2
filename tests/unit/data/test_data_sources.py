"""Where rows come from: local files, hub splits, alpaca's split, and what is said of rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from packtrain.data import sources
from packtrain.errors import UserError

ROOT = Path(__file__).parents[3]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def refusal(name: str, config: Any, split: sources.Split = "train") -> str:
    with pytest.raises(UserError) as caught:
        sources.read(name, config, split)
    return "\n".join(caught.value.problems)


def alpaca(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"do {i}", "input": "", "output": f"done {i}"} for i in range(count)]


def test_grammar_reads_each_splits_file(tmp_path: Path, section: Any) -> None:
    (tmp_path / "train.csv").write_text("input,target\na,b\n")
    (tmp_path / "test.csv").write_text("target,input,more\nd,c,x\n")
    config = section(train_split=str(tmp_path / "train.csv"), test_split=str(tmp_path / "test.csv"))
    assert sources.read("grammar_dataset", config, "train").rows[0].values == {"input": "a", "target": "b"}
    assert sources.read("grammar_dataset", config, "validation").rows[0].values == {"input": "c", "target": "d"}


@pytest.mark.parametrize(
    ("name", "split", "flag"),
    [
        ("grammar_dataset", "train", "--grammar_dataset.train_split"),
        ("grammar_dataset", "validation", "--grammar_dataset.test_split"),
        ("samsum_dataset", "train", "--samsum_dataset.train_split"),
        ("alpaca_dataset", "validation", "--alpaca_dataset.data_path"),
    ],
)
def test_a_missing_file_names_the_flag(section: Any, name: str, split: Any, flag: str) -> None:
    config = section(train_split="no/such.csv", test_split="no/such.csv", data_path="no/such.json")
    problem = refusal(name, config, split)
    assert flag in problem
    assert "no/such" in problem


def test_a_bare_name_without_a_hub_id_is_a_missing_file(section: Any) -> None:
    assert "--grammar_dataset.train_split" in refusal("grammar_dataset", section(train_split="train"))


def test_alpaca_validates_on_the_first_twentieth(tmp_path: Path, section: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", alpaca(59))
    config = section(data_path=path, train_split="train", test_split="val")
    train = sources.read("alpaca_dataset", config, "train")
    val = sources.read("alpaca_dataset", config, "validation")
    assert [row.values["output"] for row in val.rows] == ["done 0", "done 1"]  # int(59 / 20) = 2
    assert [row.values["output"] for row in train.rows] == [f"done {i}" for i in range(2, 59)]
    assert train.rows[0].number == 3
    swapped = section(data_path=path, train_split="val", test_split="train")
    assert len(sources.read("alpaca_dataset", swapped, "train").rows) == 2


def test_alpacas_split_counts_bad_rows_and_reports_each_with_its_part(tmp_path: Path, section: Any) -> None:
    rows: list[Any] = alpaca(40)
    rows[1]["output"] = ""
    rows[30] = [1]
    config = section(data_path=jsonl(tmp_path / "a.jsonl", rows), train_split="train", test_split="val")
    train, val = (sources.read("alpaca_dataset", config, s) for s in ("train", "validation"))  # type: ignore[arg-type]
    assert [b.row for b in val.bad] == [2]
    assert [b.row for b in train.bad] == [31]
    assert (len(val.rows), len(train.rows)) == (1, 37)


def test_too_few_rows_to_validate_on(tmp_path: Path, section: Any) -> None:
    config = section(data_path=jsonl(tmp_path / "a.jsonl", alpaca(19)), train_split="train", test_split="val")
    assert "at least 20" in (problem := refusal("alpaca_dataset", config, "validation"))
    assert "--alpaca_dataset.data_path" in problem
    assert len(sources.read("alpaca_dataset", config, "train").rows) == 19


def test_a_column_that_no_row_has(tmp_path: Path, section: Any) -> None:
    rows = [{"prompt": "x", "answer": "y"}] * 3
    config = section(data_path=jsonl(tmp_path / "a.jsonl", rows), train_split="train", test_split="val")
    problem = refusal("alpaca_dataset", config)
    for said in ("no column [instruction, output]", "found [prompt, answer]", "expected [instruction, output, input]"):
        assert said in problem
    assert "--alpaca_dataset.data_path" in problem


def test_a_file_without_a_header_does_not_show_its_first_row(tmp_path: Path, section: Any) -> None:
    (tmp_path / "a.csv").write_text(f"{'private words ' * 20},{'more of them ' * 20}\nx,y\n")
    problem = refusal("grammar_dataset", section(train_split=str(tmp_path / "a.csv")))
    assert "private words private" not in problem
    assert "expected [input, target]" in problem


def test_rows_that_lack_something(tmp_path: Path, section: Any) -> None:
    rows: list[Any] = alpaca(8)
    rows[0] = {"instruction": "x", "output": "y"}  # input may be absent
    rows[1]["input"] = None  # or null
    del rows[2]["output"]
    rows[3]["output"] = None
    rows[4]["output"] = " \n"
    rows[5]["instruction"] = ["x"]
    rows[6]["input"] = 7
    rows[7]["output"] = {"a": True}
    config = section(data_path=jsonl(tmp_path / "a.jsonl", rows), train_split="train", test_split="val")
    table = sources.read("alpaca_dataset", config, "train")
    assert [row.values for row in table.rows] == [
        {"instruction": "x", "output": "y", "input": ""},
        {"instruction": "do 1", "output": "done 1", "input": ""},
    ]
    assert [str(b).removeprefix(table.file) for b in table.bad] == [
        ":3: row 3: no column output; found [instruction, input]",
        ":4: row 4: output is null, expected text",
        ":5: row 5: output is empty, expected text: it is what is trained",
        ":6: row 6: instruction is a list, expected text",
        ":7: row 7: input is a number, expected text",
        ":8: row 8: output is an object, expected text",
    ]


def test_an_empty_prompt_is_a_row_like_any_other(tmp_path: Path, section: Any) -> None:
    config = section(train_split=jsonl(tmp_path / "s.jsonl", [{"dialogue": "", "summary": "nobody spoke"}]))
    assert len(sources.read("samsum_dataset", config, "train").rows) == 1


def test_a_hub_split(tmp_path: Path, section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    jsonl(
        hub / "train.jsonl", [{"id": i, "dialogue": f"A: {i}", "summary": f"{i}" if i != 1 else None} for i in range(9)]
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = section(data_path=str(hub), train_split="train[:4]", test_split="validation")
    table = sources.read("samsum_dataset", config, "train")
    assert [row.number for row in table.rows] == [1, 3, 4]
    assert [str(b) for b in table.bad] == [f"{hub}[train[:4]]: row 2: summary is null, expected text"]
    problem = refusal("samsum_dataset", config, "validation")
    assert "'validation'" in problem
    assert "--samsum_dataset.test_split" in problem


def test_a_hub_id_that_cannot_be_had(section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = section(data_path="nobody/nothing-like-this", train_split="train", test_split="validation")
    problem = refusal("samsum_dataset", config)
    for said in (
        "nobody/nothing-like-this",
        "--samsum_dataset.data_path",
        "hf download",
        "--samsum_dataset.train_split FILE",
    ):
        assert said in problem


def test_an_unknown_data_set_says_which_there_are(section: Any) -> None:
    assert "grammar_dataset, samsum_dataset, alpaca_dataset" in refusal("poems_dataset", section())


def test_synthetic_rows_are_the_seeds(section: Any) -> None:
    config = section(rows=40, length=6, vocab_size=0, seed=3)
    train = sources.synthetic(config, "train", 50)
    again = sources.synthetic(config, "train", 50)
    val = sources.synthetic(config, "validation", 50)
    ids = np.stack([row.values["input_ids"] for row in train.rows])
    assert ids.shape == (40, 6)
    assert (ids >= 0).all()
    assert ids.max() > 40
    assert ids.max() < 50
    assert np.array_equal(ids, np.stack([row.values["input_ids"] for row in again.rows]))
    assert len(val.rows) == 2
    assert not np.array_equal(val.rows[0].values["input_ids"], ids[0])
    small = sources.synthetic(section(rows=40, length=6, vocab_size=5, seed=3), "train", 50)
    assert max(row.values["input_ids"].max() for row in small.rows) < 5


@pytest.mark.parametrize(
    ("name", "file", "train"), [("alpaca", "alpaca_small.json", 40), ("samsum", "samsum_small.json", 24)]
)
def test_the_examples_that_ship(section: Any, name: str, file: str, train: int) -> None:
    path = str(ROOT / "examples/data" / file)
    config = section(data_path=path, train_split="train" if name == "alpaca" else path, test_split="val")
    table = sources.read(f"{name}_dataset", config, "train")
    assert len(table.rows) == train
    assert table.bad == []
