"""A run's folder: whose it is, what it holds, and the file that says how the run stands.

    folder_problems whether results can go there at all, before there are any
    claim           may this run use the folder? new, to go on with, finished already, or not without a flag
    settle          what result.json says of a run that was killed
    begun           whether the folder's run is an earlier try of this one
    ResultFile      run/result.json, from the first second to the last; its thread says every 20 s that the run lives
    write_json      how small files are replaced: temporary file, fsync, rename

Paths of a run: `root/run/{config.yaml,metrics.jsonl,result.json,skipped.jsonl}`, the model's or adapter's files in
`root`, the same at the lowest eval_loss in `root/best`.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from packtrain import log
from packtrain.checkpoint.dcp_folder import put_away, read_state, set_aside, steps, sweep, verify
from packtrain.checkpoint.files import write_text
from packtrain.errors import UserError, raise_if

HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 120.0

RUN, RESULT = "run", "result.json"

SHOWN = 8
"""Differences between two runs that a message lists before it counts."""


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def read_json(path: Path, remedy: str = "move it away, or choose another --output_dir") -> dict[str, Any] | None:
    """The object in `path`, or None if there is no such file. Raises UserError, ending in `remedy`, if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}; {remedy}")
    return value


def folder_problems(root: Path) -> list[str]:
    """Whether results can be written into `root`, which need not be there yet, and nobody writes there now."""
    if problems := unwritable(root / RUN, root, "--output_dir"):
        return problems
    try:
        result = read_json(root / RUN / RESULT)
    except UserError as error:
        return error.problems
    owner = None if result is None else _living_owner(root, result)
    return [] if owner is None else [owner]


def unwritable(folder: Path, told: Path, flag: str) -> list[str]:
    """A sentence if nothing can be written into `folder`, there or not yet; it names `told`, which `flag` gave."""
    there, remedy = folder, f"give another folder with {flag}"
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            return [f"{flag} {told}: {there} is a file, expected a folder; {remedy}"]
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return [f"{flag} {told}: {there} cannot be written to ({error.strerror}); {remedy}, or change its rights"]
    return []


class Claim(Enum):
    """What a folder means for the run that asks for it."""

    NEW = "new"
    RESUME = "resume"
    """The newest of the checkpoints is this run's, and whole."""
    FINISHED = "finished"


SPLIT = ("--batch_size_training", "--gradient_accumulation_steps")
"""Settings that only split a step's rows: another number of ranks, and the same rows a step, is the same run."""


def claim(
    root: Path,
    fingerprint: Mapping[str, Any],
    *,
    overwrite: bool,
    checkpoints: Path | None = None,
    step_items: int = 0,
    allow_change: Collection[str] = (),
) -> Claim:
    """Decide on the folder; called by one rank. Moves an older `run/` to `run.old-N` where the new run starts afresh.

    `fingerprint` maps the names of settings, data and weights to values that are equal if and only if those are.
    `checkpoints` is where steps are, of `step_items` rows (packs) each if nothing is to be gone on with. What is named
    in `allow_change` may differ.
    Raises UserError if another run owns the folder, or a finished or resumable one with other settings does.
    """
    run = root / RUN
    result = read_json(run / RESULT)
    allowed = _allowed(allow_change, fingerprint, (result or {}).get("fingerprint", {}))
    if result is not None and result.get("status") == "running":
        if owner := _living_owner(root, result):
            raise UserError(owner)
        result |= {"status": "failed", "reason": "the process ended without a word (found dead by the next run)"}
        write_json(run / RESULT, result)
    if result is not None and result.get("status") == "done" and not overwrite:
        differs = differences(result.get("fingerprint", {}), fingerprint)
        if not differs:
            return Claim.FINISHED
        if not allowed.issuperset(_differing(result.get("fingerprint", {}), fingerprint)):
            raise UserError(
                f"--output_dir {root}: holds a finished run with other settings ({_listed(differs)}); "
                "choose another folder, or pass --overwrite_output_dir to train there again"
            )
    if checkpoints is not None and not overwrite and (found := _resumable(checkpoints)) is not None:
        folder, state = found
        if not checkpoints.resolve().is_relative_to(root.resolve()) and state["root"] != str(root.resolve()):
            raise UserError(
                f"{checkpoints}: holds checkpoints of the run in {state['root']}, and --output_dir is {root}; give "
                "another --dist_checkpoint_folder, or pass --overwrite_output_dir to put them away"
            )
        _refuse_changes(root, folder, state, fingerprint, step_items, allowed)
        return Claim.RESUME
    _set_aside(run)
    if checkpoints is not None and (old := put_away(checkpoints)) is not None:
        log.say(f"checkpoints of an earlier run are now in {old}")
    return Claim.NEW


def _resumable(checkpoints: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest step that is whole. What is newer and is not is moved out of the way."""
    sweep(checkpoints)
    for folder in reversed(steps(checkpoints).values()):
        if not (problems := verify(folder)):
            return folder, read_state(folder)
        log.say(f"{problems[0]}; moved to {set_aside(folder)}, and an older checkpoint is used if there is one")
    return None


def _refuse_changes(
    root: Path,
    folder: Path,
    state: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    step_items: int,
    allowed: Collection[str],
) -> None:
    """Raise UserError if what differs from a checkpoint is more than was allowed."""
    old = state["fingerprint"]
    names = [name for name in _differing(old, fingerprint) if name not in SPLIT and name not in allowed]
    differs = differences(*({name: side.get(name) for name in names} for side in (old, fingerprint)))
    insist = f"pass --allow_change {','.join(map(_plain, names))} to go on all the same, "
    if step_items != state["step_items"] and (
        split := differences(*({name: side.get(name) for name in SPLIT} for side in (old, fingerprint)))
    ):
        differs.append(
            f"rows of a step: {state['step_items']} then, {step_items} now ({', '.join(split)}), which are a run's "
            "place in its data and never change"
        )
        insist = ""
    if differs:
        raise UserError(
            f"--output_dir {root}: holds an unfinished run with other settings ({_listed(differs)}), which can go on "
            f"from {folder}; use its settings or another folder, {insist}or pass --overwrite_output_dir to begin again"
        )


def _allowed(names: Iterable[str], *fingerprints: Mapping[str, Any]) -> set[str]:
    """The fingerprint's names of what --allow_change names: `lr`, `--lr` and `train_config.lr` are the same."""
    known = {_plain(name): name for fingerprint in fingerprints for name in fingerprint}
    last = {name.rpartition(".")[2]: name for name in known}
    found, problems = set(), []
    for name in names:
        plain = _plain(name)
        match = plain if plain in known else last.get(plain.rpartition(".")[2])
        if match is None:
            like = get_close_matches(plain, known, n=1)
            meant = f"; did you mean {like[0]}?" if like else f"; there are {', '.join(known)}"
            problems.append(f"--allow_change {name}: is nothing that makes a run this run{meant}")
        else:
            found.add(known[match])
    raise_if(problems)
    return found


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").replace(" ", "_")


def record_failure(root: Path, reason: str) -> None:
    """Say in result.json why a run could not begin; nothing where an earlier one did, or where none can."""
    run = root / RUN
    if not folder_problems(root) and (_never_began(run) or not (run / RESULT).exists()):
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / RESULT, {"status": "failed", "step": 0, "reason": reason, **_signature()})


def settle(root: Path, reason: str) -> None:
    """Say in result.json that a run has failed, if it still says that it runs and its process is gone."""
    if (result := read_json(root / RUN / RESULT)) is None or _living_owner(root, result) is not None:
        return
    if result.get("status") == "running":
        write_json(root / RUN / RESULT, result | {"status": "failed", "reason": reason, "updated_at": time.time()})


def begun(root: Path, launch: str | None) -> bool:
    """Whether an earlier try of this launch, started again after a failure, has begun the run in the folder."""
    result = read_json(root / RUN / RESULT)
    return launch is not None and result is not None and result.get("launch") == launch


def _signature() -> dict[str, Any]:
    return {"updated_at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, each with both values."""
    return [f"{name}: {old.get(name)} then, {new.get(name)} now" for name in _differing(old, new)]


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def _listed(differs: list[str]) -> str:
    more = len(differs) - SHOWN
    return "; ".join(differs[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _living_owner(root: Path, result: Mapping[str, Any]) -> str | None:
    """A sentence about the process that uses the folder now; None if there is none."""
    if result.get("status") != "running":
        return None
    host, pid = str(result.get("host")), int(result.get("pid", 0))
    age = time.time() - float(result.get("updated_at", 0.0))
    if age >= DEAD_AFTER_SECONDS or (host == socket.gethostname() and not _process_exists(pid)):
        return None
    return (
        f"--output_dir {root}: in use by process {pid} on {host}, last heard of {age:.0f} s ago; "
        "wait for it, end it, or choose another folder"
    )


def _process_exists(pid: int) -> bool:
    """Not one that has ended and whose parent has not asked how: the kernel keeps its number."""
    try:
        return pid > 0 and Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _never_began(run: Path) -> bool:
    """Whether all that is known of the last run is why it could not start."""
    return [path.name for path in run.glob("*")] == [RESULT] and "fingerprint" not in (read_json(run / RESULT) or {})


def _set_aside(run: Path) -> None:
    if not run.exists() or _never_began(run):
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
