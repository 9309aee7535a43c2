"""Fixtures of whole runs that a fault comes to (recovery.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launches import Launched
from recovery import Fault, words, work

import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    tiny.model(folder / "model")
    tiny.grammar(folder / "rows.csv", 16)
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """`run(fault, **flags)`: `packtrain train` in tmp_path/out; whatever happens, nobody is left."""
    launched: list[Launched] = []

    def start(fault: Fault | None = None, **flags: Any) -> Launched:
        launched.append(Launched(tmp_path, work, fault, tmp_path, words(home, tmp_path / "out", **flags)))
        return launched[-1]

    yield start
    for one in launched:
        one.close()


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    one = Launched(folder, work, None, folder, words(home, folder / "out"))
    assert one.end(60) == 0, one.said
    return folder / "out"
