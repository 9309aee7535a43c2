"""Whole runs inside the ranks of a test, and what transformers makes of the same rows.

train(place, name, flags)       preflight and run; `name` is its own among the runs of one group
apart(place, name)              a place for a second run in the same group
lines(folder)                   metrics.jsonl
rows(file), mean(model, rows)   grammar_dataset rendered, encoded and measured without our code
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore
from torch.nn import functional as F

import tiny
from packtrain import finetuning, log, preflight
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.train.interrupt import Interrupt


def apart(place: Place, name: str) -> Place:
    """The same place with a store of its own: what ranks tell one another, they tell once a run."""
    return replace(place, store=PrefixStore(name, place.store))


def train(place: Place, name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One run on every rank of a group that has joined; result.json's content."""
    log.quiet()
    cfg, own = build(**flags), apart(place, name)
    return finetuning.run(cfg, own, preflight.inputs(cfg, own), Interrupt())


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run's metrics."""
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(lines: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """The values of those lines that have one."""
    return [line[key] for line in lines if key in line]


def rows(file: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) [1, L] of each row of a grammar csv."""
    encode = tiny.tokenizer()
    with file.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            before = encode(f"<s>Correct this to standard English: {row['input']}\n---\nCorrected: ")["input_ids"]
            after = encode(f"{row['target']}</s>")["input_ids"]
            yield torch.tensor([before + after]), torch.tensor([[-100] * len(before) + after])


def mean(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean loss over the labelled tokens of all rows, each forwarded by itself."""
    count = sum(int((labels != -100).sum()) for _, labels in rows)
    losses = [F.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], reduction="sum") for ids, labels in rows]
    return torch.stack(losses).sum() / count
