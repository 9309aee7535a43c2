"""What is shown of a data set."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from packtrain.batch import IGNORE
from packtrain.data.audit import Audit, pairs


@settings(deadline=None)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20))
@example("ends in \ufffd", "\ufffd too")
def test_the_texts_joined_are_the_row_and_the_trained_ones_the_answer(tokenizer: Any, prompt: str, answer: str) -> None:
    before = tokenizer.encode(tokenizer.bos_token + prompt, add_special_tokens=False)
    after = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    shown = pairs(before + after, [IGNORE] * len(before) + after, tokenizer)
    assert "".join(text for text, _ in shown) == f"<s>{prompt}{answer}</s>"
    assert "".join(text for text, trained in shown if trained) == f"{answer}</s>"


def test_a_rows_first_token_is_shown_untrained(tokenizer: Any) -> None:
    ids = tokenizer.encode("he", add_special_tokens=False)
    assert pairs(ids, ids, tokenizer)[0] == (tokenizer.decode(ids[:1]), False)


def test_lines_say_what_there_is_to_say() -> None:
    skipped = ({"file": "g.csv", "row": 3, "line": 4, "reason": "target is empty"},)
    quiet = Audit("g.csv", 10, 1000, 250, 0, 10, 120, "g.csv row 7", ())
    assert quiet.lines() == [
        "g.csv: 10 rows, 1,000 tokens, 250 of them trained (25.0%), longest row 120 tokens (g.csv row 7)",
        "10 of 10 rows teach the end of sequence",
    ]
    loud = Audit("g.csv", 10, 1000, 250, 2, 8, 120, "g.csv row 7", skipped).lines()
    assert loud[2] == "2 rows were longer than context_length and lost the end of their answer"
    assert loud[3] == "bad rows left out: 1, the first: row 3: target is empty"
