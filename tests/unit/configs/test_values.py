"""Text to values: every way to write each kind, and every way that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from packtrain.configs.values import Quoted, brief, convert, expected, kind_name, shown

Names = tuple[str, ...]
Targets = tuple[str, ...] | str
Choice = Literal["auto", "sdpa"]


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (bool, "true", True),
        (bool, "True", True),
        (bool, "false", False),
        (bool, "False", False),
        (bool, True, True),
        (int, "4", 4),
        (int, "-4", -4),
        (int, "+4", 4),
        (int, "1_000", 1000),
        (int, "1e3", 1000),
        (int, "2E+2", 200),
        (int, 7, 7),
        (float, "1e-4", 1e-4),
        (float, "1E-4", 1e-4),
        (float, "1", 1.0),
        (float, "1_000", 1000.0),
        (float, "1_000.5", 1000.5),
        (float, ".5", 0.5),
        (float, "5.", 5.0),
        (float, "-0.1", -0.1),
        (float, 3, 3.0),
        (float, 0.25, 0.25),
        (str, "abc", "abc"),
        (str, "123", "123"),
        (str, "", ""),
        (str, "true", "true"),
        (str, Quoted("4"), "4"),
        (str, Path("a/b"), "a/b"),
        (str | None, "None", None),
        (str | None, None, None),
        (str | None, "x", "x"),
        (Choice, "sdpa", "sdpa"),
        (Choice, Quoted("sdpa"), "sdpa"),
        (Names, "a", ("a",)),
        (Names, "a,b", ("a", "b")),
        (Names, "[a,b]", ("a", "b")),
        (Names, "[a, b]", ("a", "b")),
        (Names, "['a','b']", ("a", "b")),
        (Names, '["a", "b"]', ("a", "b")),
        (Names, "(a,b)", ("a", "b")),
        (Names, "('a',)", ("a",)),
        (Names, "'a','b'", ("a", "b")),
        (Names, "[]", ()),
        (Names, ["a", "b"], ("a", "b")),
        (Names, ("a",), ("a",)),
        (Names, {"b", "a"}, ("a", "b")),
        (Names, Quoted("a,b"), ("a", "b")),
        (Names | None, "None", None),
        (Targets, "q_proj", ("q_proj",)),
        (Targets, "q_proj,v_proj", ("q_proj", "v_proj")),
        (Targets, "self_attn.q_proj", ("self_attn.q_proj",)),
        (Targets, "all-linear", "all-linear"),
        (Targets, ".*_proj", ".*_proj"),
        (Targets, "(q|v)_proj", "(q|v)_proj"),
        (Targets, ".*(q_proj|v_proj)", ".*(q_proj|v_proj)"),
        (Targets, "(q_proj|v_proj)", "(q_proj|v_proj)"),
        (Targets, r"model\.layers\.[01]\..*", r"model\.layers\.[01]\..*"),
        (Targets, "[qv]_proj", "[qv]_proj"),
        (Targets, ["q_proj"], ("q_proj",)),
    ],
)
def test_read(kind: Any, raw: object, value: object) -> None:
    got = convert(kind, raw)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("kind", "raws"),
    [
        (bool, ["TRUE", "yes", "on", "1", "0", "", "None", None, 1, 0, Quoted("true"), [], "treu"]),
        (int, ["2.0", "1.5", "1e-3", "1.0e3", "abc", "", "0x10", "1__0", "_1", "1_", "None", None, True, 2.0]),
        (int, ["9" * 30, "1e99", "0" * 50, str(2**63), 2**63, Quoted("4"), "٣", " 4", ["4"]]),
        (float, ["abc", "", "nan", "inf", "-inf", "infinity", "1e999", "1e", "--1", "1_", ".", Quoted("1.0")]),
        (float, [None, "None", True, float("nan"), float("inf"), 10**400, ["1"], "1,5"]),
        (str, [None, "None", 3, True, ["a"], {}, "a\0b", "\udcff"]),
        (str | None, ["", 3, True]),
        (Choice, ["Auto", "", "None", None, True, 3, ["auto"]]),
        (Names, ["", "a,,b", "a,", ",a", "[a,,b]", None, 3, ["a", 1], [["a"]], ["a", None], [""], {}, True]),
        (Targets, ["", "None", None, "q_proj,"]),
    ],
)
def test_refused(kind: Any, raws: list[object]) -> None:
    for raw in raws:
        with pytest.raises(ValueError):
            print(raw, convert(kind, raw))


@pytest.mark.parametrize(
    ("kind", "words", "word"),
    [
        (bool, "true or false", "true|false"),
        (int, "a whole number", "INT"),
        (float, "a number", "FLOAT"),
        (str | None, "text or None", "TEXT"),
        (Choice, "one of auto, sdpa", "auto|sdpa"),
        (Choice | None, "one of auto, sdpa or None", "auto|sdpa"),
        (Literal["CAUSAL_LM"], "CAUSAL_LM", "CAUSAL_LM"),
        (Targets, "a list of names or a regular expression", "NAMES|REGEX"),
    ],
)
def test_said_in_words(kind: Any, words: str, word: str) -> None:
    assert expected(kind) == words
    assert kind_name(kind) == word


@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKlMnOp",
        "sk-abcdefghijklmnop",
        "ghp_0123456789abcdef",
        "0123456789abcdef0123456789abcdef01234567",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx",
    ],
)
def test_secrets_are_not_quoted(secret: str) -> None:
    for text in (secret, f"token={secret}", f"a {secret} b", f"https://user:{secret}@host/path"):
        assert secret not in shown(text)
        assert secret not in brief(text)
    assert "pass" not in shown("https://user:pass@host/x")


def test_what_is_quoted_is_short_and_on_one_line() -> None:
    assert shown("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(shown("x" * 10_000)) < 70
    assert shown(Quoted("4")) == "the quoted text '4'"
    assert shown([1, 2]) == "a list"
    assert shown({}) == "a dict"
    assert shown("meta-llama/Llama-3.1-8B") == "'meta-llama/Llama-3.1-8B'"
