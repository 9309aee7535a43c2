"""A run's folder: whose it is, what it holds, and the file that says how the run stands.

    claim           may this run use the folder? new, finished already, or not without a flag
    ResultFile      run/result.json, from the first second to the last; its thread says every 20 s that the run lives
    write_json      how small files are replaced: temporary file, fsync, rename

Paths of a run: `root/run/{config.yaml,metrics.jsonl,result.json,skipped.jsonl}`, the model's or adapter's files in
`root`, the same at the lowest eval_loss in `root/best`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from packtrain.checkpoint.files import write_text
from packtrain.errors import UserError

HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 120.0


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a JSON file that packtrain wrote ({error}); move it away or choose another --output_dir"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; move it away or choose another --output_dir")
    return value


class Claim(Enum):
    """What a folder means for the run that asks for it."""

    NEW = "new"
    FINISHED = "finished"


def claim(root: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> Claim:
    """Decide on the folder; called by one rank. Moves an older `run/` to `run.old-N` where the new run starts afresh.

    `fingerprint` maps the names of settings, data and weights to values that are equal if and only if those are.
    Raises UserError if another run owns the folder, or a finished one with other settings does.
    """
    run = root / "run"
    result = read_json(run / "result.json")
    if result is None:
        _set_aside(run)
        return Claim.NEW
    if result.get("status") == "running":
        _refuse_living_owner(root, result)
        result |= {"status": "failed", "reason": "the process ended without a word (found dead by the next run)"}
        write_json(run / "result.json", result)
    if result.get("status") == "done" and not overwrite:
        differs = differences(result.get("fingerprint", {}), fingerprint)
        if not differs:
            return Claim.FINISHED
        raise UserError(
            f"--output_dir {root}: holds a finished run with other settings ({'; '.join(differs)}); "
            "choose another folder, or pass --overwrite_output_dir to train there again"
        )
    _set_aside(run)
    return Claim.NEW


def record_failure(root: Path, reason: str) -> None:
    """Say in result.json that a run ended before it began; another run's word in the folder is left alone."""
    file = root / "run" / "result.json"
    if read_json(file) is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"status": "failed", "step": 0, "reason": reason, **_signature()})


def _signature() -> dict[str, Any]:
    return {"updated_at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, each with both values."""
    names = [*old, *(name for name in new if name not in old)]
    return [f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names if old.get(name) != new.get(name)]


def _refuse_living_owner(root: Path, result: Mapping[str, Any]) -> None:
    host, pid = str(result.get("host")), int(result.get("pid", 0))
    age = time.time() - float(result.get("updated_at", 0.0))
    here = host == socket.gethostname()
    alive = age < DEAD_AFTER_SECONDS and not (here and not _process_exists(pid))
    if alive:
        raise UserError(
            f"--output_dir {root}: in use by process {pid} on {host}, last heard of {age:.0f} s ago; "
            "wait for it, end it, or choose another folder"
        )


def _process_exists(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def _set_aside(run: Path) -> None:
    if not run.exists():
        return
    number = 1
    while (old := run.with_name(f"run.old-{number}")).exists():
        number += 1
    run.rename(old)


class ResultFile:
    """`run/result.json`: status running, done, stopped or failed, with step and reason; rewritten whole, atomically."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._facts: dict[str, Any] = {
            "status": "running",
            "step": 0,
            "reason": None,
            **_signature(),
            "last_checkpoint": None,
            **facts,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.update()
        self._thread = threading.Thread(target=self._beat, name="result.json", daemon=True)
        self._thread.start()

    def note(self, **facts: Any) -> None:
        """Remember, to be written with the next beat: costs no disk access in a step."""
        with self._lock:
            self._facts |= facts

    def update(self, **facts: Any) -> None:
        """Write now."""
        with self._lock:
            self._facts |= facts
            self._facts["updated_at"] = time.time()
            write_json(self._path, self._facts)

    def finish(self, status: str, reason: str | None, **facts: Any) -> dict[str, Any]:
        """The last word; returns what was written."""
        self._ended.set()
        self._thread.join()
        self.update(status=status, reason=reason, **facts)
        return dict(self._facts)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self.update()
