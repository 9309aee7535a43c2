"""The launcher of one machine: workers started, watched, told of signals, started again, and never left behind.

    default_nproc       how many workers this machine deserves
    start_workers       runs them to their end and says how it was

Workers come from one process that has imported everything (zygote.py), over a store that this process keeps on loopback
(torchrun's listens on every address). What a worker does with it is in place.py; who hangs is seen in heartbeat.py;
whether to try again is decided in restarts.py.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from packtrain import log
from packtrain.distributed import parent
from packtrain.distributed.heartbeat import Watch
from packtrain.distributed.orders import SIGNALS, StopOrders
from packtrain.distributed.place import HANG_SECONDS, STORE, attempt_prefix, first_report, report_first
from packtrain.distributed.restarts import Failure, Restarts, is_outside, oom_kills
from packtrain.distributed.zygote import Zygote
from packtrain.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER

ENTRY = "packtrain.cli:main"
MODULES = ("packtrain.cli", "packtrain.commands.train", "packtrain.commands.worker")

POLL_SECONDS = 0.05
LOOK_SECONDS = 0.25
SPEAK_SECONDS = 2.0
"""After a failure the culprit may finish its message, and if nobody tries again the others theirs."""


class Outcome(NamedTuple):
    """How the whole ended: 0, 1, 2 or 75 (errors.py), and why if this process knows better than the workers."""

    exit_code: int
    reason: str | None = None


def default_nproc() -> int:
    """Workers to start if nobody says: one a GPU, one without a GPU."""
    return max(1, torch.cuda.device_count())


def start_workers(
    argv: Sequence[str],
    nproc: int,
    *,
    grace: float = 30.0,
    max_restarts: int = 0,
    hang_timeout: float = HANG_SECONDS,
    entry: str = ENTRY,
    modules: Sequence[str] = MODULES,
) -> Outcome:
    """Run `entry` ("module:function" of an argv) with `argv` in `nproc` workers, which import `modules` once.

    The first failure decides: the others end within 5 s, and up to `max_restarts` times all are started again. SIGTERM,
    SIGINT and SIGUSR1 are passed on; workers that have not ended `grace` seconds later, or at a second signal, are
    killed. A rank that stands still for `hang_timeout` seconds (0: for ever) is a failure.
    """
    orders, restarts = StopOrders(grace), Restarts(max_restarts)
    with _forwarded(orders) as listeners, _Launch(nproc, orders, hang_timeout, entry, modules) as launch:
        listeners.append(launch.send)
        while True:
            end = launch.attempt(argv, restarts.used)
            if isinstance(end, Outcome):
                return end
            refusal = "" if orders.asked else restarts.refuse(end)
            launch.end_attempt(patient=refusal is not None)
            if refusal is None:
                log.say(f"packtrain: started again ({restarts.used} of {max_restarts}), from the newest checkpoint")
                continue
            if refusal:
                log.say(f"packtrain: {refusal}")
            return Outcome(end.exit_code, end.text)


class _Launch:
    """The store, the process that workers come from, and the workers of the present try."""

    def __init__(self, nproc: int, orders: StopOrders, patience: float, entry: str, modules: Sequence[str]) -> None:
        self._nproc, self._orders, self._patience = nproc, orders, patience
        self._origin = (entry, modules, _shared_environment(nproc))
        self._zygote = Zygote(*self._origin)
        self._server, self._address = _loopback_store()
        self._id = secrets.token_hex(8)

    def __enter__(self) -> _Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self._zygote.close()

    def send(self, number: int) -> None:
        """Send every worker a signal."""
        self._zygote.send(number)

    def attempt(self, argv: Sequence[str], number: int) -> Outcome | Failure:
        """One try. Workers may be left that a failure did not end."""
        if not self._zygote.alive:
            self._zygote.close()
            self._zygote = Zygote(*self._origin)
        if not self._zygote.ready(lambda: self._orders.asked):
            return Outcome(EXIT_STOPPED)
        killed = oom_kills()
        for rank in range(self._nproc):
            self._zygote.start(rank, argv, self._environment(rank, number))
        store = PrefixStore(attempt_prefix(number), self._server)
        for order in self._orders.told:  # it came while they were started
            self.send(order)
        end = self._watch(store, Watch(store, range(self._nproc), self._patience))
        lacked = isinstance(end, Failure) and end.outside and oom_kills() > killed
        return end._replace(out_of_memory=True) if lacked and isinstance(end, Failure) else end

    def end_attempt(self, *, patient: bool) -> None:
        """No worker is left afterwards; `patient`ly, those that end by themselves may finish their files."""
        if patient:
            self._zygote.wait(SPEAK_SECONDS)
        self._zygote.end_workers()

    def _watch(self, store: Store, watch: Watch) -> Outcome | Failure:
        """Wait for the workers' ends, a failure, a hang, or the end of the time that a signal left them."""
        looked = time.monotonic()
        while True:
            codes = self._zygote.codes()
            for rank, code in codes.items():
                if code not in (None, EXIT_DONE, EXIT_STOPPED) and -code not in self._orders.told:
                    return self._failure(store, watch, rank, code)
            if None not in codes.values():
                stopped = any(code != EXIT_DONE for code in codes.values())
                return Outcome(EXIT_STOPPED if stopped else EXIT_DONE)
            if EXIT_STOPPED in codes.values() and not self._orders.asked:  # one was told alone
                self._orders.add(signal.SIGTERM)
                self.send(signal.SIGTERM)
            if (late := self._late(codes)) is not None:
                return late
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                hang = watch.look()
                if hang is not None and report_first(store, hang.ranks[0], hang.text, step=hang.step):
                    log.say(f"packtrain: {hang.text}")
                    for rank in hang.ranks:
                        self._zygote.workers[rank].send(signal.SIGKILL)
                    return Failure(hang.ranks[0], hang.text, EXIT_FAULT, hang.step)
            time.sleep(POLL_SECONDS)

    def _late(self, codes: Mapping[int, int | None]) -> Outcome | None:
        """The end of the patience with workers that were told to stop."""
        left = self._orders.left()
        if self._orders.at_once:
            text = "stopped at once by a second signal"
        elif left is not None and left <= 0:
            late = ", ".join(str(rank) for rank, code in codes.items() if code is None)
            text = f"rank {late} had not ended {self._orders.grace:g} s after a signal to stop; killed"
        else:
            return None
        log.say(f"packtrain: {text}; what is saved is the last complete checkpoint")
        return Outcome(EXIT_FAULT, text)

    def _failure(self, store: Store, watch: Watch, rank: int, code: int) -> Failure:
        """The first cause of this worker's end: told by a rank, or else found here and said."""
        watch.look()
        worker = self._zygote.workers[rank]
        who = f"rank {rank} (process {worker.pid})"
        beat = watch.beats.get(rank)
        where = f" at {beat.doing}" if beat else ""
        text = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code} and without a word"
        if code == -signal.SIGKILL:
            text += "; the kernel does that when memory runs out"
        step = beat.step if beat else watch.step
        if code != EXIT_USER and report_first(store, rank, text, step=step):
            log.say(f"packtrain: {who}{where} {text}")
            return Failure(rank, f"rank {rank}{where} {text}", EXIT_FAULT, step, outside=is_outside(-code))
        cause = first_report(store)
        if cause is None:
            return Failure(rank, "the input is wrong", EXIT_USER, step)
        if cause.rank != rank:  # this worker only heard the other's end
            self._zygote.wait(SPEAK_SECONDS, [cause.rank])
        return Failure(cause.rank, cause.text, cause.exit_code, cause.step, cause.out_of_memory)

    def _environment(self, rank: int, number: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._nproc),
            "LOCAL_WORLD_SIZE": str(self._nproc),
            STORE: self._address,
            parent.ATTEMPT: str(number),
            parent.LAUNCH: self._id,
        }


@contextmanager
def _forwarded(orders: StopOrders) -> Iterator[list[Callable[[int], None]]]:
    """While it is open, signals to stop are orders, and go to those in the list; then the handlers before are back."""
    listeners: list[Callable[[int], None]] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if orders.add(number):
            return  # the workers are about to be killed
        for listener in listeners:
            listener(number)

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield listeners
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loopback_store() -> tuple[TCPStore, str]:
    """A store that only this machine can reach, on a port chosen and held by the kernel, and its host:port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"127.0.0.1:{port}"


def _shared_environment(nproc: int) -> dict[str, str]:
    """What libraries read when they are loaded."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
        "PACKTRAIN_WORKER": "1",
    }


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
