"""Whose a run's folder is, and what result.json says through a run's life."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from packtrain.checkpoint import store
from packtrain.checkpoint.store import Claim, ResultFile, claim, folder_problems, record_failure
from packtrain.errors import UserError

SETTINGS = {"--lr": 1e-4, "train data": "abc"}


def left(root: Path, **facts: Any) -> None:
    """A run that went before."""
    (root / "run").mkdir(parents=True)
    (root / "run" / "metrics.jsonl").write_text("{}\n")
    (root / "run" / "result.json").write_text(json.dumps(facts))


def says(root: Path, folder: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / folder / "result.json").read_text())
    return found


def test_a_new_folder_is_free(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    assert folder_problems(root) == []
    assert claim(root, SETTINGS, overwrite=False) is Claim.NEW
    assert not (tmp_path / "not").exists(), "asking writes nothing"


def test_a_finished_run_is_recognised_and_not_written_over(tmp_path: Path) -> None:
    left(tmp_path, status="done", fingerprint=SETTINGS)
    assert claim(tmp_path, SETTINGS, overwrite=False) is Claim.FINISHED
    with pytest.raises(UserError, match=r"other settings \(--lr: 0.0001 then, 0.01 now\).*--overwrite_output_dir"):
        claim(tmp_path, SETTINGS | {"--lr": 1e-2}, overwrite=False)
    assert claim(tmp_path, SETTINGS | {"--lr": 1e-2}, overwrite=True) is Claim.NEW
    assert says(tmp_path, "run.old-1")["status"] == "done"


def test_many_differences_are_counted(tmp_path: Path) -> None:
    left(tmp_path, status="done", fingerprint={f"--{n}": 0 for n in range(20)})
    with pytest.raises(UserError) as caught:
        claim(tmp_path, {f"--{n}": 1 for n in range(20)}, overwrite=False)
    assert f"--{store.SHOWN - 1}: 0 then, 1 now; and {20 - store.SHOWN} more)" in str(caught.value)


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_what_an_unfinished_run_left_is_set_aside(tmp_path: Path, status: str) -> None:
    for number in (1, 2):
        left(tmp_path, status=status)
        assert claim(tmp_path, SETTINGS, overwrite=False) is Claim.NEW
        assert says(tmp_path, f"run.old-{number}")["status"] == status


def test_a_living_owner_keeps_its_folder(tmp_path: Path) -> None:
    left(tmp_path, status="running", host=socket.gethostname(), pid=os.getpid(), updated_at=time.time())
    (problem,) = folder_problems(tmp_path)
    assert f"in use by process {os.getpid()}" in problem
    with pytest.raises(UserError, match="in use by process"):
        claim(tmp_path, SETTINGS, overwrite=True)
    record_failure(tmp_path, "another run wants it")
    assert says(tmp_path)["status"] == "running"


@pytest.mark.parametrize(
    "owner",
    [
        {"host": socket.gethostname(), "pid": 2**22 + 1, "updated_at": time.time()},
        {"host": "elsewhere", "pid": 1, "updated_at": time.time() - store.DEAD_AFTER_SECONDS},
    ],
    ids=["no such process", "long silent"],
)
def test_a_dead_owner_is_said_to_have_failed(tmp_path: Path, owner: dict[str, Any]) -> None:
    left(tmp_path, status="running", step=7, **owner)
    assert folder_problems(tmp_path) == []
    assert claim(tmp_path, SETTINGS, overwrite=False) is Claim.NEW
    dead = says(tmp_path, "run.old-1")
    assert (dead["status"], dead["step"]) == ("failed", 7)
    assert "without a word" in dead["reason"]


def test_failures_to_start_leave_one_file_that_a_run_takes_over(tmp_path: Path) -> None:
    for reason in ("first", "second"):
        record_failure(tmp_path, reason)
        assert (says(tmp_path)["status"], says(tmp_path)["reason"]) == ("failed", reason)
    assert claim(tmp_path, SETTINGS, overwrite=False) is Claim.NEW
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    ResultFile(tmp_path / "run" / "result.json", fingerprint=SETTINGS).finish("done", None)
    record_failure(tmp_path, "third")
    assert says(tmp_path)["status"] == "done"


def test_result_json_from_the_first_second_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "HEARTBEAT_SECONDS", 0.01)
    file = ResultFile(tmp_path / "run" / "result.json", fingerprint=SETTINGS)
    assert (says(tmp_path)["status"], says(tmp_path)["pid"]) == ("running", os.getpid())
    first = says(tmp_path)["updated_at"]
    file.note(step=3)
    until = time.monotonic() + 10
    while says(tmp_path)["step"] != 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert says(tmp_path)["step"] == 3
    assert says(tmp_path)["updated_at"] > first
    assert file.finish("stopped", "SIGTERM") == says(tmp_path)
    assert (says(tmp_path)["status"], says(tmp_path)["reason"]) == ("stopped", "SIGTERM")
