"""Local files to rows, and every way in which a file can be wrong.

    read(path, flag) -> Table     csv, json (an array of objects, or lines), jsonl, parquet

What is wrong with the file as a whole (not there, empty, not UTF-8, not JSON) is a `UserError`. What is wrong
with one row is a `BadRow` in the table: the caller decides whether to stop or to go on without it. Rows are
numbered from 1, headers and blank lines not counted; lines are the file's own. No message quotes more than
`SNIPPET` characters of a row: rows can be private and logs get shared.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packtrain.errors import UserError

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
SNIPPET = 40


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read."""

    number: int
    """From 1, in the file's order."""

    line: int | None
    """Physical line on which it begins; None where the format has none."""

    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be trained on, and why."""

    file: str
    row: int
    line: int | None
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: row {self.row}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Table:
    """A file's rows; `rows` and `bad` together are all of them."""

    file: str
    rows: list[Row]
    bad: list[BadRow]


def read(path: Path, flag: str) -> Table:
    """Every row of a local file. `flag` is the one that chose it. Raises UserError if the file itself is wrong."""
    file, suffix = str(path), path.suffix.lower()
    if not path.is_file():
        found = "is a folder, expected a file" if path.is_dir() else "there is no such file"
        raise UserError(f"{file}: {found}; give one with {flag} FILE ({', '.join(SUFFIXES)})")
    if suffix not in SUFFIXES:
        raise UserError(f"{file}: the name ends in {suffix or 'nothing'}, expected {', '.join(SUFFIXES)} ({flag})")
    if suffix == ".parquet":
        table = _parquet(path)
    else:
        text = _text(path, flag)
        table = {".csv": _csv, ".json": _json, ".jsonl": _lines}[suffix](text, file)
    if not table.rows and not table.bad:
        raise UserError(f"{file}: there is no row in it (a header alone is none); give another file with {flag}")
    return table


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def snippet(text: str, size: int = SNIPPET) -> str:
    """`text` quoted on one line, in at most `size` characters."""
    shown = repr(text[:size])
    return shown if len(text) <= size and len(shown) <= size else shown[: size - 4] + "..."


def _text(path: Path, flag: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give another file with {flag}") from error
    if not data.strip():
        raise UserError(f"{path}: the file is empty ({len(data)} bytes); give another file with {flag}")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: this is a Git LFS pointer ({len(data)} bytes), not the data; fetch it with: git lfs pull"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + data.startswith(b"\xef\xbb\xbf") * 3
        line = data.count(b"\n", 0, at) + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {at} (0x{data[at]:02x}); {_encoding(path, data)}") from error


def _encoding(path: Path, data: bytes) -> str:
    if data.startswith(b"\x1f\x8b"):
        return f"it looks like gzip: unpack it first (gunzip -c {path} > FILE)"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8 {path} > FILE"
    return f"it looks like latin-1 (Windows): convert it with iconv -f CP1252 -t UTF-8 {path} > FILE"


def _csv(text: str, file: str) -> Table:
    csv.field_size_limit(sys.maxsize)
    rows: list[Row] = []
    bad: list[BadRow] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    for line, cells in _records(reader):
        if not header:
            header = _header(cells, file)
            continue
        number = len(rows) + len(bad) + 1
        if isinstance(cells, str):
            bad.append(BadRow(file, number, line, cells))
        elif len(cells) != len(header):
            reason = f"{len(cells)} fields, expected {len(header)} ({', '.join(header)}); a comma in text needs quotes"
            bad.append(BadRow(file, number, line, reason))
        else:
            rows.append(Row(number, line, dict(zip(header, cells, strict=True))))
    return Table(file, rows, bad)


def _records(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields) of each record that is not blank, or (first line, what is wrong with it)."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            yield line, "a quote opened in this row is never closed" if unclosed else f"not valid CSV ({error})"
            continue
        if cells:
            yield line, cells


def _header(cells: list[str] | str, file: str) -> list[str]:
    if isinstance(cells, str):
        raise UserError(f"{file}:1: the header is wrong: {cells}")
    header = [name.strip() for name in cells]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{file}:1: the header names {', '.join(map(snippet, twice))} more than once; rename one of them"
        )
    return header


def _json(text: str, file: str) -> Table:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _lines(text, file)
        raise UserError(f"{file}:{error.lineno}: {_json_error(error)}") from error
    if not isinstance(found, list):
        raise UserError(f"{file}: the file holds {kind(found)}, expected an array of objects: [{{...}}, {{...}}]")
    rows: list[Row] = []
    bad: list[BadRow] = []
    for number, value in enumerate(found, 1):
        if isinstance(value, dict):
            rows.append(Row(number, None, value))
        else:
            bad.append(BadRow(file, number, None, f"is {kind(value)}, expected an object"))
    return Table(file, rows, bad)


def _lines(text: str, file: str) -> Table:
    """JSON lines. Split at line feeds only: other separators may stand inside JSON strings."""
    if text.lstrip().startswith("[") and _is_array(text):
        raise UserError(f"{file}: line 1 begins a JSON array, expected one object a line; rename the file to .json")
    rows: list[Row] = []
    bad: list[BadRow] = []
    for line, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        number = len(rows) + len(bad) + 1
        try:
            value = json.loads(written)
        except json.JSONDecodeError as error:
            bad.append(BadRow(file, number, line, _json_error(error)))
            continue
        if isinstance(value, dict):
            rows.append(Row(number, line, value))
        else:
            bad.append(BadRow(file, number, line, f"the line is {kind(value)}, expected an object"))
    return Table(file, rows, bad)


def _is_array(text: str) -> bool:
    """Whether the whole text is one array of objects (or a broken one), and not lines that are lists."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg != "Extra data"
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _json_error(error: json.JSONDecodeError) -> str:
    begin = max(error.pos - SNIPPET // 2, 0)
    near = snippet(error.doc[begin : begin + SNIPPET - 6])
    return f"not valid JSON at column {error.colno} ({error.msg}), near {near}"


def _parquet(path: Path) -> Table:
    import pyarrow as arrow  # noqa: PLC0415 (slow to import, and few files need it)
    from pyarrow import parquet  # noqa: PLC0415

    try:
        values = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    return Table(str(path), [Row(number, None, value) for number, value in enumerate(values, 1)], [])
