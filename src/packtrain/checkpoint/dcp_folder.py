"""`step-N/`: a folder that is there whole, with every byte as it was written, or does not count.

    StepFolder      a new one: made under a hidden name, then `commit`
    complete        those that are, by step; newest
    verify          a sentence for everything in one that is not as it was written
    confirm         the same for one just made, with patience for a shared file system
    read_state      its state.json
    keep_newest, keep_only, set_aside, put_away     the others
    check_room      whether there is place for one more
    asked_again     what is asked of a shared file system, with patience

Written in this order: data files, each synced; `manifest.json` with the size and SHA-256 of each; the rename to
`step-N`; and `DONE`, with the manifest's own SHA-256. So a kill at any moment leaves a hidden folder, or one without
DONE, and no folder is ever written into again. Times of files decide nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from packtrain.checkpoint.files import sync_folder, write_text
from packtrain.errors import Fault, UserError

STATE, INDEX, MANIFEST, DONE = "state.json", "index.json", "manifest.json", "DONE"

OLD, DAMAGED = "old", "damaged"
"""Folders beside the steps: what an earlier run left, and what cannot be trusted."""

FORMAT = 1
"""Of the whole layout; a reader that does not know a number refuses it."""

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.step-\d+\.[0-9a-f]{8}")
_BLOCK = 2**22

SEEN_SECONDS = 20.0
"""How long a shared file system may take to show on one machine what another one wrote."""

T = TypeVar("T")


class FileFacts(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str


def facts_of(path: Path) -> FileFacts:
    """Size and SHA-256 of what the disk holds, as far as the system lets one ask past its memory."""
    return asked_again(lambda: _facts_of(path))


def _facts_of(path: Path) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileFacts(size, digest.hexdigest())


class StepFolder:
    """One checkpoint in the making; the leader's. Data files go into `path`."""

    def __init__(self, root: Path, step: int) -> None:
        self._root, self._step = root, step
        self.files: dict[str, FileFacts] = {}
        """What will be in the manifest; whoever writes a file puts it here."""
        self.path = root / f".{name_of(step)}.{secrets.token_hex(4)}"
        self.path.mkdir(parents=True)

    def write_json(self, name: str, value: Any) -> None:
        """A file of the folder, written and in the manifest."""
        write_text(self.path / name, json.dumps(value, indent=1) + "\n")
        self.files[name] = facts_of(self.path / name)

    def commit(self) -> Path:
        """Make it `step-N`. A folder of that name, which can only be a damaged one, is put aside first."""
        manifest = {"format": FORMAT, "step": self._step, "files": {n: f._asdict() for n, f in self.files.items()}}
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        final = self._root / name_of(self._step)
        if final.exists():
            set_aside(final)
        self.path.rename(final)
        try:
            sync_folder(self._root)
            write_text(final / DONE, _done(self._step, facts_of(final / MANIFEST)))
        except BaseException:
            final.rename(self.path)  # out of sight again, for `abandon`
            raise
        return final

    def abandon(self) -> None:
        """Remove what there is of it."""
        shutil.rmtree(self.path, ignore_errors=True)


def name_of(step: object) -> str:
    """The folder's name."""
    return f"step-{step}"


def _done(step: object, manifest: FileFacts) -> str:
    """What DONE holds."""
    return json.dumps({"step": step, "manifest_sha256": manifest.sha256}) + "\n"


def steps(root: Path) -> dict[int, Path]:
    """Every `step-N` in `root`, complete or not, by step."""
    found = [(match, path) for path in root.glob("step-*") if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: int(pair[0][1]))}


def complete(root: Path) -> dict[int, Path]:
    """Those whose last file is there."""
    return {step: path for step, path in steps(root).items() if (path / DONE).is_file()}


def newest(root: Path) -> Path | None:
    """The complete one of the highest step."""
    found = complete(root)
    return found[max(found)] if found else None


def verify(folder: Path, read_back: Collection[str] = ()) -> list[str]:
    """A sentence for everything in a `step-N` folder that is not as it was written; [] if all of it is.

    Of the files `read_back`, whose bytes are known to be right, only presence and size are asked for.
    """
    try:
        done, manifest = _text(folder / DONE), read_object(folder / MANIFEST)
    except ValueError as error:
        return [str(error)]
    step, form = manifest.get("step"), manifest.get("format")
    if done != _done(step, facts_of(folder / MANIFEST)):
        return [
            f"{folder / MANIFEST}: its SHA-256 is not the one in {DONE}: one of them is damaged, or of another step"
        ]
    if form != FORMAT:
        return [f"{folder / MANIFEST}: format {form}, and this version reads {FORMAT} only"]
    if name_of(step) != folder.name:
        return [f"{folder}: holds step {step}; it was renamed"]
    files = manifest["files"]
    with ThreadPoolExecutor(max_workers=min(16, len(files) or 1), thread_name_prefix="verify") as pool:
        answers = pool.map(
            lambda name: _difference(folder, name, FileFacts(**files[name]), digest=name not in read_back), files
        )
    return [answer for answer in answers if answer is not None]


def confirm(folder: Path, read_back: Collection[str]) -> list[str]:
    """`verify` for one just made, asked until all is there or `SEEN_SECONDS` are over."""
    until = time.monotonic() + SEEN_SECONDS
    while (problems := verify(folder, read_back)) and time.monotonic() < until:
        time.sleep(0.1)
    return problems


def wait_until_seen(path: Path) -> None:
    """Wait for what another rank says is there: its machine may see it before this one. Raises Fault in the end."""
    until = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            raise Fault(
                f"{path}: another rank has it, and {SEEN_SECONDS:.0f} s later it is not seen here; every machine "
                "needs the same file system at this path"
            )
        time.sleep(0.05)


def check_room(root: Path, need: int) -> None:
    """Raise Fault, with both numbers, if `need` bytes are not free where `root` is."""
    free = free_bytes(root)
    if free < need:
        raise Fault(
            f"{root}: a checkpoint takes {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make "
            "room, or have it elsewhere"
        )


def free_bytes(folder: Path) -> int:
    """What can still be written where `folder` is, there or not yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified folder. Raises UserError if it is none: verified is what was written, by whomever."""
    try:
        return read_object(folder / STATE)
    except ValueError as error:
        raise UserError(f"{error}; another hand wrote it: set the folder aside") from None


def keep_newest(root: Path, count: int, best: int | None) -> None:
    """Remove all but the `count` newest complete steps (0: none of them) and that of the `best` evaluation."""
    found = sorted(complete(root))
    keep_only(root, {*(found[-count:] if count else found), *([] if best is None else [best])})


def keep_only(root: Path, keep: Iterable[int]) -> None:
    """Remove every other step of `root`, and what killed writers left."""
    kept = set(keep)
    for step, path in steps(root).items():
        if step not in kept:
            _remove(path)
    sweep(root)


def sweep(root: Path) -> None:
    """Remove hidden folders of writers that were killed. Only for the one process that writes here."""
    for left in root.glob(".step-*"):
        if _HIDDEN.fullmatch(left.name):
            shutil.rmtree(left)


def set_aside(folder: Path, kind: str = DAMAGED) -> Path:
    """Move a step's folder into `damaged/` (or another `kind`) beside it; returns where it is now."""
    target = folder.parent / kind / folder.name
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    sync_folder(folder.parent)
    return target


def put_away(root: Path) -> Path | None:
    """Move all steps of an earlier run into `old/`, in place of those of a run before that; None if there are none."""
    found = steps(root)
    if not found:
        return None
    if (root / OLD).exists():
        shutil.rmtree(root / OLD)
    for path in found.values():
        set_aside(path, OLD)
    return root / OLD


def _remove(folder: Path) -> None:
    """Out of sight in one move, then away: a kill in between leaves nothing that looks like a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _difference(folder: Path, name: str, expected: FileFacts, *, digest: bool) -> str | None:
    path = folder / name
    try:
        found = asked_again(path.lstat)
        if Path(name).name != name or not stat.S_ISREG(found.st_mode):
            return f"{path}: the manifest names it, and it is no plain file of the folder"
        if found.st_size != expected.size:
            return f"{path}: {found.st_size:,} bytes, and {expected.size:,} were written"
        if digest and facts_of(path).sha256 != expected.sha256:
            return f"{path}: its bytes are not those that were written (SHA-256)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def asked_again(look: Callable[[], T]) -> T:
    """A shared file system may know a file by what it was (ESTALE); asked again it looks anew."""
    for _ in range(20):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(0.05)
    return look()


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming it."""
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _text(path: Path) -> str:
    try:
        return asked_again(lambda: path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
