"""A process that has imported everything and becomes a worker when asked: in hundredths of a second, not in seconds.

    Zygote      the launcher's end: `start` a worker, ask how each stands, end them
    Worker      one of them, as the launcher knows it
    main        the process itself: python -m packtrain.distributed.zygote FD ENTRY MODULE...

The two speak JSON lines over a socket pair. The process has one thread and opens no device, so that it can fork; a
worker that finds CUDA in use by an import starts again as a fresh interpreter. Workers have sessions of their own: a
terminal's Ctrl-C reaches them through the launcher alone.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from packtrain.distributed import parent
from packtrain.errors import Fault

POLL_SECONDS = 0.02
GONE_SECONDS = 5.0


class Worker:
    """A worker's process id, and its exit code once it has ended: minus the signal's number if one ended it."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank, self.pid = rank, pid
        self.code: int | None = None

    def send(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.code is None:
            os.kill(self.pid, number)


class Zygote:
    """`entry` is "module:function" of an argv; `modules` are imported once. After `close` all is gone."""

    def __init__(self, entry: str, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.workers: dict[int, Worker] = {}
        self._socket, theirs = socket.socketpair()
        self._buffer, self._ready = b"", False
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), entry, *modules]
        told = {**os.environ, **environment, parent.PARENT: str(os.getpid())}
        # is_available() by the driver's own library: asking the runtime would make forks useless
        told.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        told.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, at import: a pool of threads that no fork has
        self._process = subprocess.Popen(command, env=told, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def close(self) -> None:
        """End workers and process."""
        self.end_workers()
        self._socket.close()  # at which it ends, once it has buried its dead
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it can start workers: it has not been killed, nor failed in an import."""
        return self._process.poll() is None

    def ready(self, give_up: Callable[[], bool]) -> bool:
        """Wait until the imports are done; False if `give_up` says so first. Raises Fault if they fail."""
        while not self._ready:
            if give_up():
                return False
            self._ready = self._receive(POLL_SECONDS) is not None
        return True

    def start(self, rank: int, argv: Sequence[str], environment: Mapping[str, str]) -> Worker:
        """A worker of this rank that runs the entry with `argv`."""
        request = {"argv": list(argv), "env": {**environment, parent.PARENT: str(self._process.pid)}}
        self._send(request)
        while (told := self._receive(GONE_SECONDS)) is not None and "started" not in told:
            self._ended(told)
        if told is None:
            raise Fault(f"rank {rank} could not be started: the process that starts workers does not answer")
        self.workers[rank] = Worker(rank, told["started"])
        return self.workers[rank]

    def codes(self) -> dict[int, int | None]:
        """Exit code of each rank's worker, None while it runs."""
        try:
            while (told := self._receive(0)) is not None:
                self._ended(told)
        except Fault:  # it was killed, and its children with it
            for worker in self.workers.values():
                worker.code = -signal.SIGKILL if worker.code is None else worker.code
        return {rank: worker.code for rank, worker in self.workers.items()}

    def send(self, number: int) -> None:
        """Send every worker a signal."""
        for worker in self.workers.values():
            worker.send(number)

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> None:
        """Until those workers (all, by default) have ended by themselves, or the time is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            codes = self.codes()
            if None not in [codes[rank] for rank in (codes if ranks is None else ranks)]:
                return
            time.sleep(POLL_SECONDS)

    def end_workers(self) -> None:
        """Kill what still runs; afterwards no worker is there."""
        self.codes()
        self.send(signal.SIGKILL)
        self.wait(GONE_SECONDS)
        self.workers = {}

    def _ended(self, told: Mapping[str, Any]) -> None:
        for worker in self.workers.values():
            if worker.pid == told["ended"] and worker.code is None:
                worker.code = told["code"]
                # only now may the kernel give its number to somebody else
                self._send({"bury": worker.pid})

    def _send(self, request: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError:
            raise Fault("the process that workers come from has been killed") from None

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next line, or None if none comes in time. Raises Fault if none ever will."""
        while b"\n" not in self._buffer:
            if not select.select([self._socket], [], [], seconds)[0]:
                return None
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                raise Fault("the workers could not be started: see above (do packtrain and torch import?)")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        told: dict[str, Any] = json.loads(line)
        return told


def main(words: Sequence[str]) -> NoReturn:
    """Import, then become a worker whenever the launcher asks; ends with the launcher."""
    parent.follow()
    fd, entry, *modules = words
    for module in modules:
        import_module(module)
    # A library that keeps idle threads all the same looks after them itself; Python warns at every fork.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    line = socket.socket(fileno=int(fd))
    line.sendall(b'{"ready": true}\n')
    request = _serve(line)
    if request is None:
        os._exit(0)
    code = _work(entry, request["argv"], request["env"])
    # as multiprocessing ends its children: to take all those modules apart costs a good part of a second
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork at each request and say how the children end. Returns in a child, with its request; None at the end."""
    woken, wakes = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    children: set[int] = set()
    buffer = b""
    while True:
        ready = select.select([line.fileno(), woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(children):
                if (end := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                    children.discard(pid)
                    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                    line.sendall(json.dumps({"ended": pid, "code": code}).encode() + b"\n")
        if line.fileno() not in ready:
            continue
        data = line.recv(65536)
        if not data:
            return None
        buffer += data
        while b"\n" in buffer:
            text, buffer = buffer.split(b"\n", 1)
            request: dict[str, Any] = json.loads(text)
            if "bury" in request:
                os.waitpid(request["bury"], 0)
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run has a handler, without Python's traceback
                for opened in (line.fileno(), woken, wakes):
                    os.close(opened)
                line.detach()
                return request
            children.add(pid)
            line.sendall(json.dumps({"started": pid}).encode() + b"\n")


def _work(entry: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """The life of a worker; returns its exit code."""
    os.setsid()
    os.environ.update(environment)
    parent.follow()
    sys.argv = [sys.argv[0], *argv]
    module, function = entry.split(":")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda._is_in_bad_fork():
        code = f"import sys; from {module} import {function} as entry; sys.exit(entry(sys.argv[1:]))"
        os.execv(sys.executable, [sys.executable, "-c", code, *argv])
    return int(getattr(import_module(module), function)(list(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
