"""Whose an output folder is while a run uses it: a lock that the kernel frees when its process is gone.

    Owner       `take` the folder, and it is this process's until the end of the context

The file that is locked, `ROOT/.owner`, says who has it; nothing else is read from it. A lock of Linux's NFS is seen on
other machines too. Where a file system has none, what run/result.json says has to do (store.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from packtrain import log
from packtrain.errors import UserError

NAME = ".owner"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

WRITTEN_SECONDS = 1.0
"""How long an owner may take to write its name, once it has the lock."""


class Owner:
    """Of the folder `root`, from `take` to the end of the context."""

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / NAME
        self._file: int | None = None

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # before the lock goes: `take` looks whether its file still is this one
            os.close(self._file)
            self._file = None

    def take(self) -> None:
        """Raises UserError, naming the owner, if another run has the folder."""
        self._root.mkdir(parents=True, exist_ok=True)
        while (file := self._locked()) is not None and not self._is_there(file):
            os.close(file)
        if file is None:
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._file = file

    def _locked(self) -> int | None:
        """The open, locked file; None where nothing can be locked."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _name_in(file)
            os.close(file)
            raise UserError(
                f"--output_dir {self._root}: in use by {who}; wait for it, end it, or choose another folder"
            ) from None
        except OSError as error:
            os.close(file)
            if error.errno not in NO_LOCKS:
                raise
            log.warn(f"{self._root}: the file system has no locks; start no two runs there at the same moment")
            return None
        return file

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.lstat())
        except FileNotFoundError:
            return False


def _name_in(file: int) -> str:
    until = time.monotonic() + WRITTEN_SECONDS
    while not (text := os.pread(file, 300, 0).decode(errors="replace")) and time.monotonic() < until:
        time.sleep(0.02)
    return text or "another process"
