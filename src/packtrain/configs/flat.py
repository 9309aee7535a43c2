"""Flags of a command whose settings are one flat dataclass: --flag value, --flag=value, --flag, --noflag.

parse_flat   argv -> the dataclass, or one UserError with all that is wrong
flat_help    the text of --help
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from textwrap import fill
from typing import Any, TypeVar, get_type_hints

from packtrain.configs.run import sentences
from packtrain.configs.values import BOOLEANS, brief, convert, expected, kind_name, shown
from packtrain.errors import raise_if

T = TypeVar("T")


def parse_flat(argv: Sequence[str], cls: type[T]) -> T:
    """A command's words as an instance of `cls`. Raises UserError with every problem."""
    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    problems: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("--"):
            problems.append(f"{shown(word)}: expected a flag (--name)")
            continue
        name, equals, text = word[2:].partition("=")
        key = name.replace("-", "_")
        positive = key.removeprefix("no").removeprefix("_")
        if key not in kinds and key.startswith("no") and kinds.get(positive) is bool:
            values[positive] = False
            continue
        raw: Any = text if equals else _value(kinds.get(key), words)
        if key not in kinds:
            problems.append(f"--{brief(name)}: no such flag{_nearest(key, kinds)}")
            continue
        try:
            values[key] = convert(kinds[key], raw)
        except ValueError:
            found = "no value" if raw is True else shown(raw)
            problems.append(f"--{name}: expected {expected(kinds[key])}, found {found}")
    raise_if(problems)
    return cls(**values)


def _value(kind: Any, words: deque[str]) -> Any:
    """The word after a flag, or True where none belongs to it."""
    if not words or words[0].startswith("--") or (kind is bool and words[0] not in BOOLEANS):
        return True
    return words.popleft()


def _nearest(key: str, kinds: dict[str, Any]) -> str:
    like = get_close_matches(key, kinds, n=1, cutoff=0.5)
    return f"; did you mean --{like[0]}?" if like else ""


def flat_help(command: str, cls: Any) -> str:
    """Every flag with type, default and what it does."""
    kinds = get_type_hints(cls)
    lines = [f"usage: packtrain {command} [--flag value ...]", ""]
    for field in fields(cls):
        lines.append(f"  --{field.name} {kind_name(kinds[field.name])} (default {field.default})")
        lines.append(fill(sentences(cls)[field.name], 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)
