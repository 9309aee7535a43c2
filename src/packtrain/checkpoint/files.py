"""Files that are there whole or not at all: written beside their place, synced, renamed into it.

replacing      a context that gives a file to write and puts it in place at the end
write_text     the same for a text
copy_file      the same for a copy
sync_folder    makes renames and removals in a folder last
sweep          removes what killed writers left
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_MARK = ".unfinished-"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write; at the end it takes `path`'s place. After an error `path` is as it was.

    Its name begins with a dot, so that nothing that looks for weights by pattern sees it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{_MARK}{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def copy_file(source: Path, target: Path) -> None:
    """Replace `target` by a copy of what `source` (or the file it links to) holds."""
    with source.open("rb") as reader, replacing(target) as writer:
        shutil.copyfileobj(reader, writer)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries, as they are now, are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove unfinished files of writers that were killed. Only for the one process that writes this folder."""
    for left in folder.glob(f".*{_MARK}*"):
        left.unlink(missing_ok=True)
