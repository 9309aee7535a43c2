"""The data of `python -m bench`: one row of random ids, again and again, so that every run has the same losses to show.

A custom data set of llama-recipes' contract, which packtrain and llama-cookbook read; other peers take `ids`. The
environment's BENCH_ROW says how long the row is, of how many words, and how often it comes: "4096 128256 24".
"""

from __future__ import annotations

import os
import random
from typing import Any

VARIABLE = "BENCH_ROW"


def ids() -> list[int]:
    """The row."""
    length, words, _ = map(int, os.environ[VARIABLE].split())
    draw = random.Random(0)
    return [draw.randrange(words) for _ in range(length)]


def get_custom_dataset(config: Any, tokenizer: Any, split: str) -> list[dict[str, list[int]]]:
    """Rows of a split, as llama-recipes asks for them."""
    row, times = ids(), int(os.environ[VARIABLE].split()[2])
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)}] * times
