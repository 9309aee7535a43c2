"""Every way in which a local file can be wrong is said with its name, its place, and what was expected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from packtrain.data import files
from packtrain.errors import UserError

FLAG = "--grammar_dataset.train_split"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        files.read(path, FLAG)
    (problem,) = caught.value.problems
    assert str(path) in problem
    return problem


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    values = [{"input": f'a {i},\n\u2028"b"', "target": f"ü {i}"} for i in range(5)]
    quoted = "".join('"{}","{}"\r\n'.format(*(v.replace('"', '""') for v in row.values())) for row in values)
    Dataset.from_list(values).to_parquet(tmp_path / "d.parquet")
    paths = [
        write(tmp_path / "a.csv", "\ufeffinput,target\r\n" + quoted),
        write(tmp_path / "b.json", json.dumps(values)),
        write(tmp_path / "c.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in values) + "\n\n"),
        write(tmp_path / "e.json", "\n".join(json.dumps(row) for row in values)),
        tmp_path / "d.parquet",
    ]
    for path in paths:
        table = files.read(path, FLAG)
        assert [row.values for row in table.rows] == values, path
        assert [row.number for row in table.rows] == [1, 2, 3, 4, 5]
        assert table.bad == []
    assert [row.line for row in files.read(paths[0], FLAG).rows] == [2, 4, 6, 8, 10]  # a row is two physical lines


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", ["empty (0 bytes)", FLAG]),
        ("a.json", b" \n", ["empty (2 bytes)"]),
        ("a.csv", b"input,target\n", ["no row", "header", FLAG]),
        ("a.json", b"[]", ["no row"]),
        ("a.csv", b"input,target\nhe \xac go,x\n", [":2:", "byte 16", "0xac", "latin-1", "iconv"]),
        ("a.csv", b"\xef\xbb\xbfinput,target\n\xac,x\n", [":2:", "byte 16"]),
        ("a.jsonl", gzip.compress(b'{"input": "x"}'), ["byte 1", "0x8b", "gzip", "gunzip"]),
        ("a.csv", "input,target\na,b".encode("utf-16"), ["byte 0", "UTF-16"]),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["Git LFS", "git lfs pull"]),
        ("a.json", b'[\n{"input": "x"},\n{"input": "y"\n]', [":4:", "column 1", "not valid JSON"]),
        ("a.json", b'{"data": []}', ["an object", "expected an array of objects"]),
        ("a.jsonl", b'[\n{"input": "x"},\n{"input": "y"}\n]', ["JSON array", "one object a line", ".json"]),
        ("a.csv", b"input,input,target\na,b,c\n", ["'input' more than once"]),
        ("a.txt", b"hello", [".txt", ".csv, .json, .jsonl, .parquet", FLAG]),
        ("a.parquet", b"PAR1 no", ["not a readable parquet file"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    problem = refusal(write(tmp_path / name, content))
    assert all(part in problem for part in said), problem


def test_a_missing_file_and_a_folder_name_the_flag(tmp_path: Path) -> None:
    assert "no such file" in (problem := refusal(tmp_path / "none.csv"))
    assert FLAG in problem
    assert "is a folder" in refusal(tmp_path)


def test_a_bad_json_line_is_named_with_line_column_and_a_short_snippet(tmp_path: Path) -> None:
    lines = [json.dumps({"input": f"secret {'x' * 200} {i}", "target": "y"}) for i in range(40)]
    lines[36] = lines[36][:150]
    path = write(tmp_path / "t.jsonl", "\n".join(lines))
    table = files.read(path, FLAG)
    assert [row.number for row in table.rows] == [*range(1, 37), *range(38, 41)]
    (bad,) = table.bad
    assert str(bad).startswith(f"{path}:37: row 37: not valid JSON at column ")
    quoted = str(bad).partition("near ")[2]
    assert 0 < len(quoted) <= files.SNIPPET
    assert len(str(bad)) < len(str(path)) + 160


def test_bad_rows_of_each_kind(tmp_path: Path) -> None:
    lines = write(tmp_path / "t.jsonl", '{"a": 1}\n\n[1, 2]\n"text"\n{"a": 2}')
    assert [str(b).removeprefix(str(lines)) for b in files.read(lines, FLAG).bad] == [
        ":3: row 2: the line is a list, expected an object",
        ":4: row 3: the line is text, expected an object",
    ]
    array = write(tmp_path / "t.json", '[{"a": 1}, null, 3]')
    assert [b.reason for b in files.read(array, FLAG).bad] == [
        "is null, expected an object",
        "is a number, expected an object",
    ]
    table = write(tmp_path / "t.csv", 'input,target\na,b\n\none\na,b,c\n"x\ny",z\n"a"b,c\ngood,row\n"open,z\nend,x\n')
    found = files.read(table, FLAG)
    assert [(b.line, b.row) for b in found.bad] == [(4, 2), (5, 3), (8, 5), (10, 7)]
    assert "1 fields, expected 2 (input, target)" in found.bad[0].reason
    assert "a comma in text needs quotes" in found.bad[1].reason
    assert "not valid CSV" in found.bad[2].reason
    assert "never closed" in found.bad[3].reason
    assert [row.values["input"] for row in found.rows] == ["a", "x\ny", "good"]


def test_a_snippet_is_never_longer_than_it_may_be() -> None:
    for text in ["x" * 100, "\n" * 30, "é" * 40, "short", "'\"" * 25]:
        assert len(files.snippet(text)) <= files.SNIPPET + 2 * (len(text) <= files.SNIPPET)
