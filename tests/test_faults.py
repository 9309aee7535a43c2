"""The scorecard itself: it names tests that exist, fails where one of them does, and stands whole in its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import faults
from faults import BEGIN, CASE_SECONDS, END, FAULTS, FIGURE_TESTS, FIGURES, PAGE, ROOT, Fault, Scores, failing, table

TRIAL = """
import pytest

def test_right(record_property):
    record_property("said", "rows.csv:3: row 2: no column a; found [b]; rename it")
    record_property("M8", "1 of 1")
    record_property("M2", 1.5)

def test_poor(record_property):
    record_property("said", "something went wrong")
    record_property("M8", "0 of 1")
    record_property("M5", "0.84")

def test_wrong():
    assert False

@pytest.mark.parametrize("half", [1, 2])
def test_half(half):
    assert half == 1

def test_skipped():
    pytest.skip("not here")

def test_slow():
    pass

@pytest.fixture
def breaks():
    yield
    assert False

def test_breaks_at_its_end(breaks):
    pass
"""


def nodes(*files: str) -> set[str]:
    """Node ids that pytest collects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "400"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_every_test_that_it_names_exists() -> None:
    names = {test for fault in FAULTS.values() for test in (*fault.holds, *fault.without)}
    files = sorted({name.partition("::")[0] for name in (*names, *FIGURE_TESTS)})
    found = nodes(*files)
    missing = [name for name in names if not any(node == name or node.startswith(f"{name}[") for node in found)]
    assert missing == []
    assert all(fault.holds and fault.without for fault in FAULTS.values()), "each is shown with its guard and without"


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    """Of a run of TRIAL."""
    (tmp_path / "test_trial.py").write_text(TRIAL)
    found = Scores()
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)], plugins=[found])
    found.seconds["test_trial.py::test_slow"] = CASE_SECONDS + 1
    return found


def test_a_line_passes_only_if_all_of_it_does(scores: Scores) -> None:
    def fault(*names: str, off: str = "right", speaks: bool = False) -> Fault:
        return Fault(
            "", tuple(f"test_trial.py::test_{name}" for name in names), (f"test_trial.py::test_{off}",), speaks
        )

    cases = {
        "right": fault("right"),
        "says it": fault("right", speaks=True),
        "one is wrong": fault("right", "wrong"),
        "half is wrong": fault("half"),
        "skipped": fault("skipped"),
        "slow": fault("slow"),
        "wrong at its end": fault("breaks_at_its_end"),
        "never ran": fault("absent"),
        "guard not shown": fault("right", off="wrong"),
        "no guard": Fault("", ("test_trial.py::test_right",), ()),
        "a poor message": fault("poor", speaks=True),
        "one of two is poor": fault("right", "poor", speaks=True),
        "no message": fault("half", speaks=True),
    }
    scores.count_first_causes(cases)
    lines = table(cases, scores)
    assert failing(lines) == [*list(cases)[2:], *sorted(set(FIGURES) - {"M2"}, key=lambda name: int(name[1:]))]
    assert scores.figures == {"M2": "1.5", "M5": "0.84", "M8": "2 of 5"}
    assert scores.points(cases["says it"]) == 5


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("M1", "30 of 30", "29 of 30"),
        ("M2", "0.66", "3.01"),
        ("M3", "10", "11"),
        ("M4", "15 of 15", "14 of 15"),
        ("M5", "0.85", "0.84"),
        ("M6", "13.6 ms of a step of 81 ms", "61.0 ms of a step of 60 ms"),
        ("M7", "0.12 s, all gone 2.60 s later", "0.12 s, all gone 7.20 s later"),
        ("M8", "40 of 40", "39 of 40"),
        ("M9", "100 of 100", "99 of 100"),
        ("M10", "1.87 s, 0 lost", "1.87 s, 1 lost"),
    ],
)
def test_bars(name: str, good: str, bad: str) -> None:
    assert FIGURES[name].met(good)
    assert not FIGURES[name].met(bad)


def test_the_page_has_all_of_it() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| [FM]\d+ ", line)]
    assert [row[0].strip() for row in rows] == [*FAULTS, *FIGURES]
    assert list(FAULTS) == [f"F{number}" for number in range(1, 31)]
    assert list(FIGURES) == [f"M{number}" for number in range(1, 11)]
    told = {row[0].strip(): row[1].strip() for row in rows}
    assert told == {name: line.what for name, line in (*FAULTS.items(), *FIGURES.items())}
    assert "make faults" in (faults.ROOT / "Makefile").read_text(encoding="utf-8")
