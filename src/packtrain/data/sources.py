"""Where a data set's rows come from: `read(name, config, split, tokenizer)`.

    grammar_dataset     train_split / test_split: a local file with input, target
    samsum_dataset      the same with dialogue, summary; or a split of the hub data set `data_path`
    alpaca_dataset      data_path: a local file; split val is its first 5 %, train the rest
    llamaguard_toxicchat_dataset    as samsum_dataset, with user_input, toxicity (toxicchat.py)
    custom_dataset      the user's function (custom.py)

and `synthetic`: rows of random ids, for measuring without data or tokenizer.

Each row comes out with the columns its template needs, as text, or as a `BadRow`. A column that no row has is
the file's mistake and a `UserError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from packtrain.data import custom, files, toxicchat
from packtrain.data.files import BadRow, Row, Table
from packtrain.data.render import TEMPLATES, Template
from packtrain.errors import UserError

Split = Literal["train", "validation"]


def flag_of(name: str, split: Split) -> str:
    """The flag that says where the rows of `split` are."""
    field = {"alpaca_dataset": "data_path", "custom_dataset": "file"}.get(name)
    return f"--{name}.{field or _split_field(split)}"


def read(name: str, config: Any, split: Split, tokenizer: Any = None) -> Table:
    """The rows of a split, checked; `config` is the data set's section. Raises UserError if there is no row at all."""
    if name == "custom_dataset":
        return custom.rows(config, tokenizer, getattr(config, _split_field(split)))
    if name not in TEMPLATES:
        raise UserError(
            f"--dataset {name}: its rows cannot be read; there are {', '.join([*TEMPLATES, 'custom_dataset'])}"
        )
    flag = flag_of(name, split)
    part: str = getattr(config, _split_field(split))
    if name == "alpaca_dataset":
        return _alpaca_part(_checked(files.read(Path(config.data_path), flag), TEMPLATES[name], flag), part, flag)
    table = _file_or_hub(part, getattr(config, "data_path", None), flag)
    judged = _judged(table) if name == "llamaguard_toxicchat_dataset" else table
    return _checked(judged, TEMPLATES[name], flag)


def is_local(name: str, config: Any, split: Split) -> bool:
    """Whether the rows of a split are in a file, and not on the hub or made by the user's function."""
    if name not in TEMPLATES:
        return False
    hub = None if name == "alpaca_dataset" else getattr(config, "data_path", None)
    return not hub or _is_file(getattr(config, _split_field(split)))


def synthetic(config: Any, split: Split, vocab_size: int) -> Table:
    """Rows of random ids, every one of them trained; for validation a twentieth as many, of other ids."""
    rows = config.rows if split == "train" else -(-config.rows // 20)
    generator = np.random.Generator(np.random.PCG64([config.seed, split == "train"]))
    ids = generator.integers(config.vocab_size or vocab_size, size=(rows, config.length), dtype=np.int64)
    made = [Row(number, None, {"input_ids": row, "labels": row}) for number, row in enumerate(ids, 1)]
    return Table(f"synthetic_dataset[{split}]", made, [])


def _split_field(split: Split) -> str:
    return "train_split" if split == "train" else "test_split"


def _alpaca_part(table: Table, part: str, flag: str) -> Table:
    """llama-recipes' split: the first int(5 %) of all rows, bad ones counted, are "val"."""
    first = (len(table.rows) + len(table.bad)) // 20
    if part == "train":
        return Table(table.file, [r for r in table.rows if r.number > first], [b for b in table.bad if b.row > first])
    if first == 0:
        raise UserError(
            f"{table.file}: validation is the first 5 % of the rows, and of {len(table.rows) + len(table.bad)} that is "
            f"none: give at least 20 with {flag}, or set --run_validation False"
        )
    return Table(table.file, [r for r in table.rows if r.number <= first], [b for b in table.bad if b.row <= first])


def _judged(table: Table) -> Table:
    """ToxicChat's rows with the answer in place of the number in `toxicity`."""
    rows: list[Row] = []
    bad = list(table.bad)
    for row in table.rows:
        try:
            judged = {"toxicity": toxicchat.verdict(row.values)} if "toxicity" in row.values else {}
        except ValueError as error:
            bad.append(BadRow(table.file, row.number, row.line, str(error)))
        else:
            rows.append(Row(row.number, row.line, row.values | judged))
    return Table(table.file, rows, bad)


def _file_or_hub(place: str, hub: str | None, flag: str) -> Table:
    """A local file where `place` looks like one, else a split of the hub data set."""
    return _hub(hub, place, flag) if hub and not _is_file(place) else files.read(Path(place), flag)


def _is_file(place: str) -> bool:
    """Whether the words mean a file, there or not, and no split."""
    return Path(place).is_file() or Path(place).suffix.lower() in files.SUFFIXES or "/" in place


def _hub(name: str, split: str, flag: str) -> Table:
    import datasets  # noqa: PLC0415 (a second to import, and local files do without)

    try:
        found = datasets.load_dataset(name, toxicchat.HUB_CONFIGS.get(name), split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        section = flag.partition(".")[0]
        raise UserError(
            f"{name}: split {split!r} cannot be had ({type(error).__name__}: {str(error).splitlines()[0]}); check "
            f"{section}.data_path and {flag}, fetch it first (hf download --repo-type dataset {name}), "
            f"or give a local file with {flag} FILE"
        ) from error
    file = f"{name}[{split}]"
    if len(found) == 0:
        raise UserError(f"{file}: there is no row in it; give another split with {flag}")
    return Table(file, [Row(number, None, dict(values)) for number, values in enumerate(found, 1)], [])


def _checked(table: Table, template: Template, flag: str) -> Table:
    """The same table with the template's columns as text, and every row that lacks one among the bad."""
    columns = dict.fromkeys(key for row in table.rows for key in row.values)
    missing = [name for name in template.columns if name not in columns]
    if missing and table.rows:
        raise UserError(
            f"{table.file}: no column {_names(missing)}; found {_names(columns)}, expected "
            f"{_names([*template.columns, *template.optional])}: rename columns, or give another file with {flag}"
        )
    rows: list[Row] = []
    bad = list(table.bad)
    for row in table.rows:
        reasons = _reasons(row.values, template)
        if reasons:
            bad.append(BadRow(table.file, row.number, row.line, "; ".join(reasons)))
        else:
            text = {name: row.values.get(name) or "" for name in (*template.columns, *template.optional)}
            rows.append(Row(row.number, row.line, text))
    return Table(table.file, rows, sorted(bad, key=lambda b: b.row))


def _reasons(values: dict[str, Any], template: Template) -> list[str]:
    """What is wrong with one row."""
    found = []
    for name in (*template.columns, *template.optional):
        value = values.get(name)
        if value is None and name in template.optional:
            continue
        if name not in values:
            found.append(f"no column {name}; found {_names(values)}")
        elif not isinstance(value, str):
            found.append(f"{name} is {files.kind(value)}, expected text")
        elif name == template.answer and not value.strip():
            found.append(f"{name} is empty, expected text: it is what is trained")
    return found


def _names(names: Iterable[str]) -> str:
    """Column names, a dozen at most, long ones cut: without a header, a file's first row stands in their place."""
    shown = [str(name) if len(str(name)) <= 20 else files.snippet(str(name), 20) for name in names]
    return f"[{', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}]"
