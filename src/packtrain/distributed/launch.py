"""The launcher of one machine: workers started, watched, told of signals, and never left behind.

    default_nproc       how many workers this machine deserves
    start_workers       runs them to their end and returns the exit code of the whole

Workers are torch.distributed.elastic's subprocesses, each in a session of its own, over a store that this process
keeps on loopback (torchrun's listens on every address). What a worker does with it is in place.py.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    SubprocessContext,
    start_processes,
)

from packtrain import log
from packtrain.distributed.place import (
    ATTEMPT,
    PARENT,
    STORE,
    attempt_prefix,
    first_report,
    report_first,
)
from packtrain.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TORCH_TAKES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals whose handlers start_processes replaces."""

POLL_SECONDS = 0.05
SPEAK_SECONDS = 2.0
TERMINATE_SECONDS = 3
"""After a failure the culprit may finish its message, then the rest have until SIGKILL: 5 s in all."""


def default_nproc() -> int:
    """Workers to start if nobody says: one a GPU, one without a GPU."""
    return max(1, torch.cuda.device_count())


def start_workers(
    argv: Sequence[str],
    nproc: int,
    grace: float = 30.0,
    command: Sequence[str] = (sys.executable, "-m", "packtrain"),
) -> int:
    """Run `command` with `argv` in `nproc` workers; returns 0, 1, 2 or 75 (errors.py) for the whole.

    The first failure decides and ends the others within 5 s. SIGTERM, SIGINT and SIGUSR1 are passed on; workers that
    have not ended `grace` seconds after one, or after another worker has stopped, are killed.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    server, address = _loopback_store()
    store = PrefixStore(attempt_prefix("0"), server)
    ranks = range(nproc)
    context = None
    with _handlers_kept() as signals:
        try:
            context = start_processes(
                "packtrain",
                command[0],
                args=dict.fromkeys(ranks, (*command[1:], *argv)),
                envs={rank: _environment(rank, nproc, address) for rank in ranks},
                logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            )
            signals.forward_to([handler.proc for handler in context.subprocess_handlers.values()])
            return _watch(context, store, signals, grace)
        except SignalException:  # torch's own handler, before ours is in place: nothing has begun
            return EXIT_STOPPED
        finally:
            if context is not None:
                context.close(signal.SIGKILL)


class _Signals:
    """Passes signals on to the workers and remembers which."""

    def __init__(self) -> None:
        self.passed_on: list[int] = []
        self._workers: list[subprocess.Popen[bytes]] = []

    def forward_to(self, workers: list[subprocess.Popen[bytes]]) -> None:
        self._workers = workers
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.passed_on.append(number)
        for worker in self._workers:
            worker.send_signal(number)


@contextmanager
def _handlers_kept() -> Iterator[_Signals]:
    """Put the signal handlers back at the end; start_processes and `_Signals` install their own."""
    before = {number: signal.getsignal(number) for number in {*FORWARDED, *TORCH_TAKES}}
    try:
        yield _Signals()
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _loopback_store() -> tuple[TCPStore, str]:
    """A store that only this machine can reach, on a port chosen and held by the kernel, and its host:port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"127.0.0.1:{port}"


def _environment(rank: int, nproc: int, address: str) -> dict[str, str]:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
        "PACKTRAIN_WORKER": "1",
        STORE: address,
        ATTEMPT: "0",
        PARENT: str(os.getpid()),
    }


def _watch(context: SubprocessContext, store: Store, signals: _Signals, grace: float) -> int:
    """Wait for the workers' ends; the first failure ends the others, and so does a stop that they do not follow."""
    workers = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
    stopping: float | None = None
    while True:
        codes = {rank: _exit_code(worker.poll(), signals) for rank, worker in workers.items()}
        for rank, code in codes.items():
            if code not in (None, EXIT_DONE, EXIT_STOPPED):
                return _fail(context, store, rank, code, workers)
        if None not in codes.values():
            return EXIT_STOPPED if EXIT_STOPPED in codes.values() else EXIT_DONE
        if stopping is None and (signals.passed_on or EXIT_STOPPED in codes.values()):
            stopping = time.monotonic()
        if stopping is not None and time.monotonic() - stopping > grace:
            late = ", ".join(str(rank) for rank, code in codes.items() if code is None)
            log.warn(f"rank {late} had not ended {grace:g} s after a signal to stop; killed")
            return EXIT_FAULT
        time.sleep(POLL_SECONDS)


def _exit_code(code: int | None, signals: _Signals) -> int | None:
    """A worker that the passed-on signal itself ended had not begun to train: it stopped as asked."""
    return EXIT_STOPPED if code is not None and -code in signals.passed_on else code


def _fail(
    context: SubprocessContext,
    store: Store,
    rank: int,
    code: int,
    workers: Mapping[int, subprocess.Popen[bytes]],
) -> int:
    """End the other workers after `rank` ended with `code`; returns the exit code of the first cause."""
    if code < 0:
        text = f"rank {rank} (process {workers[rank].pid}) was ended by {_signal_name(-code)}"
        if -code == signal.SIGKILL:
            text += "; the kernel does that when memory runs out"
        if report_first(store, rank, text):
            log.say(f"error: {text}")
    cause = first_report(store)
    if cause is not None and cause.rank != rank:  # this worker only heard the other's end
        _wait(workers[cause.rank], SPEAK_SECONDS)
    context.close(signal.SIGTERM, timeout=TERMINATE_SECONDS)
    if cause is not None:
        return cause.exit_code
    return code if code == EXIT_USER else EXIT_FAULT


def _wait(worker: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        worker.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
