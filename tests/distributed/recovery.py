"""Whole runs of two ranks that tests do something to: the run, what patches it, what is asked of it.

    words, work     `packtrain train`'s flags, and what a `Launched` process does with them
    before_step, saved, mark    parts of faults: functions that patch the launcher before workers are forked from it
    same            whether a run is, to the last bit, another one

The fixtures `home`, `run` and `whole` are in conftest.py.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launches import Launched, train, until
from runs import lines

import tiny
from packtrain.train.loop import Loop

CLOCK = ("step_time", "tokens_per_second", "memory_gb")
STEPS = 12

Fault = Callable[[Path], None]
Run = Callable[..., Launched]
Property = Callable[[str, object], None]
"""Gives the scorecard (tests/faults.py) what it needs."""


def work(fault: Fault | None, folder: Path, flags: list[str]) -> int:
    if fault is not None:
        fault(folder)
    return train(flags)


def words(home: Path, out: Path, **flags: Any) -> list[str]:
    """Four steps an epoch, three epochs; a checkpoint every other step; dropout."""
    settings = {
        "model_name": home / "model",
        "use_peft": True,
        "dataset": "grammar_dataset",
        "train_split": home / "rows.csv",
        "test_split": home / "rows.csv",
        "batching_strategy": "padding",
        "batch_size_training": 2,
        "num_epochs": 3,
        "lr": 0.01,
        "save_steps": 2,
        "lora_dropout": 0.1,
        "nproc_per_node": 2,
        "output_dir": out,
    }
    return tiny.flags(**(settings | flags))


def same(out: Path, whole: Path) -> None:
    """Every line and every saved byte is the unbroken run's."""
    without_clock = [
        [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(folder)] for folder in (out, whole)
    ]
    assert without_clock[0] == without_clock[1]
    for name in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def before_step(action: Callable[[Loop, int], None]) -> None:
    """Have every rank do this before each of its steps."""
    step_ = Loop._step

    def step(self: Loop, number: int, *rest: Any) -> Any:
        action(self, number)
        return step_(self, number, *rest)

    Loop._step = step  # type: ignore[method-assign]


def saved(out: Path, step: int) -> None:
    """Wait for a checkpoint, which is written beside the training."""
    until((out / f"checkpoints/step-{step}/DONE").exists, 60, "no checkpoint")


def mark(folder: Path, name: str) -> None:
    """Tell the test that a rank is there, and give it time."""
    (folder / name).touch()
    time.sleep(0.5)


def step_of(out: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        found = (out / "run/metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in found[-2:]), default=0)


def first_error(said: str) -> str:
    """The first line that tells of a failure: ours, a traceback's, or a library's."""
    telling = re.compile(r"packtrain: |Traceback|\S*Error|\[rank|.*exception")
    return next((line for line in said.splitlines() if telling.match(line)), "")


def told(said: str, words: str, record_property: Property) -> None:
    """The first error that was printed is the real cause."""
    line = first_error(said)
    record_property("said", said[said.index(line) :])
    record_property("M8", f"{int(words in line)} of 1")
    assert words in line, said
