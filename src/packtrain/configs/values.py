"""What somebody typed -> a value of a field's type, or the reason why not.

    Said                 a name and what it was given, from argv, a file or Python
    convert(kind, raw)   `raw` is text (argv, a plain YAML scalar), `Quoted` text, a list, or a Python value
    expected(kind)       what a field takes, as in "expected ..., found ..."
    kind_name(kind)      the same in one word, for --help
    choices(kind)        the names that a field chooses from
    shown(raw)           a value as a message may quote it; brief(text) the same of a name

Numbers and booleans are read from text by these rules alone, wherever the text comes from, so that a flag and a
YAML line that look alike mean the same (YAML itself would read `1e-4` as text and `no` as false).
"""

from __future__ import annotations

import math
import os
import re
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

BOOLEANS = {"true": True, "True": True, "false": False, "False": False}

PATTERN = re.compile(r"[*+?^$|\\()\[\]{}]|\.\.|^\.|\.$")
"""What makes a name a regular expression. A dot between words does not: `self_attn.q_proj` is a name."""

_INTEGER = re.compile(r"([+-]?\d+(?:_\d+)*)(?:[eE]\+?(\d{1,2}))?", re.ASCII)
_NUMBER = re.compile(r"[\d_.eE+-]+", re.ASCII)
_LARGEST = 2**63 - 1
_SECRET = re.compile(
    r"(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|eyJ)[\w.+/-]{6,}"  # by their issuers' prefixes
    r"|\b[0-9a-fA-F]{32,}\b"  # keys in hexadecimal
    r"|(?<=//)[^/@\s]+@"  # a user and password in an address
)
_LONGEST = 60
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true|false"),
    int: ("a whole number", "INT"),
    float: ("a number", "FLOAT"),
    str: ("text", "TEXT"),
    NoneType: ("None", "None"),
}


class Quoted(str):
    """Text that stood in quotes: never a number or a boolean."""

    __slots__ = ()


class Said(NamedTuple):
    """One setting as somebody said it."""

    key: str
    """A bare or a dotted name, not yet known to be one."""

    value: object
    """Text, `Quoted`, None, True or False, a list, or a Python value."""

    where: str
    """How a message points at it: `--lr`, `run.yaml:3: lr`."""

    origin: str
    """The word "file" or "flag" (Python too)."""

    alone: bool = False
    """A flag without a value; its value is True."""


def convert(kind: Any, raw: object) -> Any:
    """`raw` as a value of `kind`; ValueError, without a text, if it is none."""
    kinds = alternatives(kind)
    if raw is None or (isinstance(raw, str) and raw == "None"):
        if NoneType in kinds:
            return None
        raise ValueError
    if takes_names(kind):
        return _names(raw, or_pattern=str in kinds)
    return _scalar(next(one for one in kinds if one is not NoneType), raw, optional=NoneType in kinds)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def takes_names(kind: Any) -> bool:
    """Whether a field holds a list of names."""
    return any(get_origin(one) is tuple for one in alternatives(kind))


def expected(kind: Any) -> str:
    """What a field of this type takes, in words."""
    words = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            names = choices(one)
            words.append(names[0] if len(names) == 1 else f"one of {', '.join(names)}")
        elif get_origin(one) is tuple:
            words.append("a list of names")
        else:
            words.append("a regular expression" if one is str and takes_names(kind) else _WORDS[one][0])
    return " or ".join(words)


def kind_name(kind: Any) -> str:
    """A field's type as --help shows it; that None is a value is said by the default."""
    words = []
    for one in alternatives(kind):
        if get_origin(one) is Literal:
            words.append("|".join(choices(one)))
        elif get_origin(one) is tuple:
            words.append("NAMES")
        elif one is not NoneType:
            words.append("REGEX" if one is str and takes_names(kind) else _WORDS[one][1])
    return "|".join(words)


def choices(kind: Any) -> tuple[str, ...]:
    """The names that a field chooses from; () if it does not choose."""
    return tuple(str(value) for one in alternatives(kind) if get_origin(one) is Literal for value in get_args(one))


def shown(raw: object) -> str:
    """At most _LONGEST characters of a value, in one line; what looks like a secret is left out."""
    if raw is None or isinstance(raw, bool | int | float):
        return str(raw)[:_LONGEST]
    if not isinstance(raw, str | os.PathLike):
        return "a list" if isinstance(raw, list | tuple) else f"a {type(raw).__name__}"
    text = f"'{brief(str(raw))}'"
    return f"the quoted text {text}" if isinstance(raw, Quoted) else text


def brief(text: str) -> str:
    """`text` in one short line, without what looks like a secret."""
    line = _SECRET.sub("***", text)
    if not line.isprintable():
        line = line.encode("unicode_escape").decode("ascii")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _scalar(kind: Any, raw: object, optional: bool) -> Any:
    if kind is bool:
        return _boolean(raw)
    if kind is int:
        return _integer(raw)
    if kind is float:
        return _number(raw)
    if kind is str:
        return _text(raw, may_be_empty=not optional)
    if not isinstance(raw, str) or raw not in choices(kind):
        raise ValueError
    return str(raw)


def _text(raw: object, may_be_empty: bool) -> str:
    text = os.fspath(raw) if isinstance(raw, os.PathLike) else raw
    if not isinstance(text, str) or not _writable(text) or not (text or may_be_empty):
        raise ValueError
    return str(text)


def _writable(text: str) -> bool:
    """No zero byte, which no path has, and no lone surrogate, which stands for a byte that is not UTF-8."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _boolean(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and not isinstance(raw, Quoted) and raw in BOOLEANS:
        return BOOLEANS[raw]
    raise ValueError


def _integer(raw: object) -> int:
    """Digits, with `_` between them, or a whole mantissa and exponent (1e3); 2.0 is not a whole number."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        number = raw
    elif isinstance(raw, str) and not isinstance(raw, Quoted) and len(raw) < 40 and (match := _INTEGER.fullmatch(raw)):
        number = int(match[1]) * 10 ** int(match[2] or 0)
    else:
        raise ValueError
    if abs(number) > _LARGEST:
        raise ValueError
    return number


def _number(raw: object) -> float:
    """A finite number; text spells it as Python does, without nan and inf."""
    if isinstance(raw, bool | Quoted) or (isinstance(raw, str) and not _NUMBER.fullmatch(raw)):
        raise ValueError
    if not isinstance(raw, str | int | float):
        raise ValueError
    try:
        number = float(raw)
    except OverflowError as error:
        raise ValueError from error
    if not math.isfinite(number):
        raise ValueError
    return number


def _names(raw: object, or_pattern: bool) -> tuple[str, ...] | str:
    """`[a,b]`, `a,b`, `['a','b']`, a list, or one name; a pattern or `all-linear` stays text where that is a value."""
    if isinstance(raw, str):
        inner = _inside(raw)
        if or_pattern and inner is None and "," not in raw and (raw == "all-linear" or PATTERN.search(raw)):
            return str(raw)
        text = raw if inner is None else inner
        # Brackets may be empty and may end in a comma, as Python's; text may not.
        text = text.removesuffix(",") if inner is not None else text
        names = [_unquoted(name.strip()) for name in text.split(",")] if text or inner is None else []
    elif isinstance(raw, list | tuple):
        names = [str(name) if isinstance(name, str) else "" for name in raw]
    elif isinstance(raw, set | frozenset) and all(isinstance(name, str) for name in raw):
        names = sorted(raw)
    else:
        raise ValueError
    if not all(names) or not all(map(_writable, names)):
        raise ValueError
    return tuple(names)


def _inside(text: str) -> str | None:
    """What stands between a list's brackets, or None if `text` is not so written. `(q|v)` is a pattern, not a list."""
    text = text.strip()
    inner = text[1:-1].strip()
    if text[:1] == "[" and text[-1:] == "]" and len(text) > 1:
        return inner
    if text[:1] == "(" and text[-1:] == ")" and len(text) > 1 and not PATTERN.search(inner):
        return inner
    return None


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text
