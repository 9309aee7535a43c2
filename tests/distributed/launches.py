"""A launcher in a process of its own, and what a test asks of it: signals, processes, what was said.

    Launched        `packtrain train FLAGS`, or `start_workers` over launch_worker.py, until the test is over
    until           waits for a condition

Launcher and workers come from the forkserver of ranks.py, so nothing is imported anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ranks import forkserver

from packtrain import cli
from packtrain.distributed import launch, zygote


class Launched:
    """`work(*args)` with its standard error in `folder/said`."""

    def __init__(self, folder: Path, work: Callable[..., int], *args: Any) -> None:
        self.folder = folder
        self.process: BaseProcess = forkserver().Process(target=_run, args=(folder, work, args))
        self.process.start()
        self._seen: set[int] = set()

    @property
    def said(self) -> str:
        """By launcher and workers."""
        file = self.folder / "said"
        return file.read_text() if file.exists() else ""

    def send(self, number: signal.Signals) -> None:
        """A signal for the launcher."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 30) -> int | None:
        """Its exit code."""
        self.process.join(seconds)
        return self.process.exitcode

    def zygote(self) -> int:
        """Process id of what the workers come from."""
        assert self.process.pid is not None
        (pid,) = children(self.process.pid)
        return pid

    def workers(self) -> list[int]:
        """Process ids, in rank order; once seen, they are looked after."""
        assert self.process.pid is not None
        found = [worker for origin in children(self.process.pid) for worker in children(origin)]
        self._seen |= set(found)
        return found

    def alive(self) -> list[int]:
        """Workers ever seen that still run."""
        return [pid for pid in self._seen if state(pid) not in {"", "Z", "X"}]

    def close(self) -> None:
        """Nobody is left."""
        self.workers() if self.process.is_alive() else None
        self.process.kill()
        self.process.join()
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)


class _Forked:
    """In place of subprocess.Popen: the same main function, in a fork of a process that has imported everything."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str], pass_fds: Sequence[int], **_: object) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and fd not in pass_fds]
            for fd in fds:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(fd)
            os.environ.clear()
            os.environ.update(env)
            for number in launch.SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            _leave(zygote.main, command[command.index("packtrain.distributed.zygote") + 1 :])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        until_ = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until_:
                raise subprocess.TimeoutExpired("zygote", timeout)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _leave(function: Callable[..., int], *args: Any) -> None:
    """End this process with what a function returns, as an interpreter would end."""
    code = 1
    try:
        code = function(*args)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(folder: Path, work: Callable[..., int], args: tuple[Any, ...]) -> None:
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    subprocess.Popen = _Forked  # type: ignore[assignment,misc]
    _leave(work, *args)


def train(flags: Sequence[str]) -> int:
    """`packtrain train`."""
    return cli.main(["train", *flags])


def children(pid: int) -> list[int]:
    """Of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def state(pid: int) -> str:
    """The kernel's letter; "" for nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


def listening(pid: int) -> list[str]:
    """host:port of the sockets that a process listens on."""
    fds = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    inodes = {fd[8:-1] for fd in fds if fd.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                host, port = columns[1].split(":")
                dotted = ".".join(map(str, reversed(bytes.fromhex(host)))) if table == "tcp" else f"[{host}]"
                found.append(f"{dotted}:{int(port, 16)}")
    return found


def result_of(out: Path) -> dict[str, Any]:
    """run/result.json."""
    found: dict[str, Any] = json.loads((out / "run/result.json").read_text())
    return found
