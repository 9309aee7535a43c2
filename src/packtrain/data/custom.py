"""The user's own data set: `--custom_dataset.file FILE.py[:FUNCTION]`.

    rows(config, tokenizer, split) -> Table      FUNCTION(dataset_config, tokenizer, split) of llama-recipes' contract
    arrays(values) -> (ids, labels) | reason     one such row, or what is wrong with it
    collator(config, tokenizer) -> ... | None    the file's `get_data_collator(tokenizer)`, whatever FUNCTION is called

The file runs once a process, however often it is asked. What goes wrong inside it is the user's to mend, so it
becomes a `UserError` that names the line of their file.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packtrain.batch import IGNORE
from packtrain.data.files import BadRow, Row, Table
from packtrain.errors import UserError

FLAG = "--custom_dataset.file"
Collator = Callable[[list[dict[str, list[int]]]], Any]

_modules: dict[tuple[Path, int], ModuleType] = {}
"""Executed files by path and time of change, so that a notebook's next run sees an edited one."""


def rows(config: Any, tokenizer: Any, split: str) -> Table:
    """Every row that the user's function gives for `split`: dicts that `tokens.py` will look into."""
    path, name = _parts(config.file)
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{path}: no function {name}; found [{', '.join(there)}]; name one: {FLAG} {path}:FUNCTION")
    where = f"{path}:{name}({split})"
    try:
        values = list(_iterate(function(config, tokenizer, split), where))
    except Exception as error:
        raise _theirs(path, f"{name}(dataset_config, tokenizer, {split!r})", error) from error
    if not values:
        raise UserError(f"{where}: gave no rows; mend the function, or name another with {FLAG}")
    table = Table(where, [], [])
    for number, value in enumerate(values, 1):
        if isinstance(value, Mapping):
            table.rows.append(Row(number, None, dict(value)))
        else:
            reason = f"is a {type(value).__name__}, expected a dict with input_ids and labels"
            table.bad.append(BadRow(where, number, None, reason))
    return table


def collator(config: Any, tokenizer: Any) -> Collator | None:
    """What the file's get_data_collator(tokenizer) returns; None if it has none or returns None."""
    path, _ = _parts(config.file)
    make = getattr(_module(path), "get_data_collator", None)
    if make is None:
        return None
    try:
        found: Collator | None = make(tokenizer)
    except Exception as error:
        raise _theirs(path, "get_data_collator(tokenizer)", error) from error
    if found is not None and not callable(found):
        raise UserError(
            f"{path}: get_data_collator gave a value of type {type(found).__name__}, "
            "expected a function of a list of rows"
        )
    return found


def arrays(values: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | str:
    """(ids, labels) without the row's own padding, or what is wrong with them."""
    found: dict[str, NDArray[np.int64]] = {}
    for name in ("input_ids", "labels", "attention_mask"):
        if name == "attention_mask" and values.get(name) is None:
            found[name] = np.ones_like(found["input_ids"])
            continue
        if values.get(name) is None:
            return f"no {name}; found [{', '.join(map(str, values))}]"
        array = _whole_numbers(values[name])
        if array is None:
            return f"{name} is not a flat list of whole numbers"
        found[name] = array
    lengths = {name: len(array) for name, array in found.items()}
    if len(set(lengths.values())) > 1:
        return f"lengths differ: {', '.join(f'{name} {length}' for name, length in lengths.items())}"
    labels = found["labels"]
    if len(wrong := labels[(labels < 0) & (labels != IGNORE)]):
        return f"labels hold {int(wrong[0])}, expected a token id or {IGNORE}"
    seen = np.flatnonzero(found["attention_mask"])
    if len(seen) == 0:
        return "input_ids is empty" if lengths["input_ids"] == 0 else "attention_mask hides every token"
    if seen[-1] - seen[0] + 1 != len(seen):
        return "attention_mask hides tokens inside the row, expected padding at its ends only"
    own = slice(int(seen[0]), int(seen[-1]) + 1)
    return found["input_ids"][own], labels[own]


def _parts(file: str) -> tuple[Path, str]:
    """FILE.py[:FUNCTION] -> (path, function)."""
    path, colon, name = file.rpartition(":")
    if not colon or not name.isidentifier():
        path, name = file, "get_custom_dataset"
    if not path.endswith(".py"):
        raise UserError(f"{FLAG} is {file!r}, expected FILE.py or FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; give one with {FLAG} FILE.py[:FUNCTION]")
    return Path(path), name


def _module(path: Path) -> ModuleType:
    """The executed file; the same module for every later call."""
    resolved = path.resolve()
    key = resolved, resolved.stat().st_mtime_ns
    if key not in _modules:
        name = f"packtrain_custom_{len(_modules)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, resolved)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickles in the user's file look their module up by name.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise _theirs(path, "the file", error) from error
        _modules[key] = module
    return _modules[key]


def _iterate(found: Any, where: str) -> Iterator[Any]:
    """Rows of a datasets.Dataset, a list, a generator, or a torch Dataset that has only its length and items."""
    if isinstance(found, Iterable):
        yield from found
    elif hasattr(found, "__len__") and hasattr(found, "__getitem__"):
        yield from (found[index] for index in range(len(found)))
    else:
        raise UserError(f"{where}: gave a value of type {type(found).__name__}, expected a list or data set of rows")


def _theirs(path: Path, what: str, error: Exception) -> UserError:
    """An error in the user's file, with the last of its lines that was running."""
    if isinstance(error, UserError):
        return error
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    place = f"{path}:{line}" if line else str(path)
    return UserError(f"{place}: {what} failed with {type(error).__name__}: {error}")


def _whole_numbers(value: Any) -> NDArray[np.int64] | None:
    """A list, array or tensor as int64 [length]; None if it is not one of whole numbers."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    if array.shape == (0,):
        return np.zeros(0, dtype=np.int64)
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "biu" else None
