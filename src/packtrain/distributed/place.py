"""Where a process stands among the ranks, and how ranks speak beside the collectives.

    open_place      rank, device and store, found from the launcher's environment; closes all of it
    Place.join      forms the process group: before it ranks speak through the store alone, after it collectives work
    Place.tell, wait_for, agree     small JSON messages, waited for however long the other rank works
    Place.report, first_cause       the first error of a run is told once; its echoes on other ranks are not

Three launchers are understood: `start_workers` (launch.py), torchrun's env://, and none at all: one rank.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.rendezvous import rendezvous

from packtrain import log
from packtrain.distributed import parent
from packtrain.distributed.heartbeat import Hang, Heart, Watch
from packtrain.errors import EXIT_FAULT, Fault, PacktrainError, Stopped, UserError

STORE = "PACKTRAIN_STORE"
"""Where `start_workers` has its store: host:port."""

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")

CAUSE = "first_cause"
ECHO_SECONDS = 2.0
"""How long a rank whose peer went away waits for that peer, or the launcher, to say why."""

HANG_SECONDS = 600.0
"""How long a rank may stand still."""

_ECHOES = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe")
_NO_MEMORY = ("can't allocate memory", "out of memory")


class Cause(NamedTuple):
    """The first error of a run: whose, in words, the exit code it means, the step it came in."""

    rank: int
    text: str
    exit_code: int
    step: int = 0
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One process among `world_size`; `machine` counts from 0, `device` is this rank's own."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    machine: int
    device: torch.device
    store: Store
    heart: Heart = field(default_factory=Heart)

    @property
    def leads_machine(self) -> bool:
        """Whether this rank does what is done once a machine (downloads, files of its own disk)."""
        return self.local_rank == 0

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks; there is none before `join`."""
        group = dist.group.WORLD
        if group is None:
            raise Fault("a collective was asked for before the ranks joined: call Place.join first")
        return group

    def join(self, timeout: timedelta = timedelta(minutes=10), host_collectives: bool = False) -> None:
        """Form the group of all ranks. `timeout` ends a collective that some rank never reaches.

        On GPUs it is NCCL's, and with `host_collectives` gloo's too (weights offloaded to host memory need it).
        """
        on_gpus = self.device.type == "cuda"
        # A bound device makes NCCL connect at once. One rank never needs NCCL, so it is left to connect on first use.
        bound = self.device if on_gpus and self.world_size > 1 else None
        dist.init_process_group(
            ("cpu:gloo,cuda:nccl" if host_collectives else "nccl") if on_gpus else "gloo",
            store=PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=bound,
        )

    def tell(self, key: str, value: Any) -> None:
        """Leave a JSON value for any rank that waits for `key`; a key is used once a run."""
        self.store.set(f"told/{key}", json.dumps(value))

    def wait_for(self, key: str, timeout: float | None = None) -> Any:
        """What some rank told under `key`. Waits as long as the teller works, `timeout` seconds at most if given.

        Raises Fault when a rank has failed meanwhile, or the time is over.
        """
        began = time.monotonic()
        while not self.store.check([f"told/{key}"]):
            cause = first_report(self.store)
            if cause is not None:
                raise Fault(f"rank {cause.rank} failed: {cause.text}")
            if timeout is not None and time.monotonic() - began > timeout:
                raise Fault(f"rank {self.rank} waited {timeout:.0f} s for {key!r}, which no rank has told")
            time.sleep(0.02 if time.monotonic() - began < 1 else 0.2)
        return json.loads(self.store.get(f"told/{key}"))

    def agree(self, name: str, decide: Callable[[], T], *, each_machine: bool = False) -> T:
        """What `decide` returned on rank 0, as JSON, on every rank; its UserError is every rank's too.

        With `each_machine` the first rank of each machine decides for that machine. `name` is used once a run.
        """
        key = f"{name}/{self.machine}" if each_machine else name
        if self.leads_machine if each_machine else self.rank == 0:
            try:
                self.tell(key, {"value": decide()})
            except UserError as error:
                self.tell(key, {"problems": error.problems})
        answer = self.wait_for(key)
        if "problems" in answer:
            raise UserError(answer["problems"])
        value: T = answer["value"]
        return value

    def report(self, error: BaseException) -> bool:
        """Say that this rank fails of `error`; True if that is the run's first cause, so this rank's to print."""
        if self.first_cause(error) is None:
            code = error.exit_code if isinstance(error, PacktrainError) else EXIT_FAULT
            text, lacked = describe(error), is_out_of_memory(error)
            first = report_first(self.store, self.rank, text, code, step=self.heart.step, out_of_memory=lacked)
            if first and parent.AGENT in os.environ:
                _tell_agent(f"rank {self.rank}: {text}")
        cause = first_report(self.store)
        return cause is None or cause.rank == self.rank

    def first_cause(self, error: BaseException | None = None) -> str | None:
        """The first error that any rank reported; None if none did. For an echo it gives the culprit time to report."""
        until = time.monotonic() + (ECHO_SECONDS if error is not None and is_echo(error) else 0)
        while (cause := first_report(self.store)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return None if cause is None else cause.text


def describe(error: BaseException) -> str:
    """An error in a line or a few: our own are sentences already."""
    if is_echo(error):
        return f"another rank is gone, and without a word ({str(error).splitlines()[0]})"
    return str(error) if isinstance(error, PacktrainError) else f"{type(error).__name__}: {error}"


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank, or the way to it, is gone."""
    if isinstance(error, dist.DistError | ConnectionError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _ECHOES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the machine's."""
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):  # said in other words
        return True
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in _NO_MEMORY))


def report_first(
    store: Store, rank: int, text: str, exit_code: int = EXIT_FAULT, *, step: int = 0, out_of_memory: bool = False
) -> bool:
    """Record a run's first error; True if nobody had, False if another rank's stands (it is kept)."""
    mine = json.dumps(Cause(rank, text, exit_code, step, out_of_memory))
    try:
        return bool(store.compare_set(CAUSE, "", mine) == mine.encode())
    except (dist.DistError, RuntimeError):  # the store's host is gone: nobody can know better
        return True


def first_report(store: Store) -> Cause | None:
    """The first error that a rank recorded, if one did and the store can still be asked."""
    try:
        return Cause(*json.loads(store.get(CAUSE))) if store.check([CAUSE]) else None
    except (dist.DistError, RuntimeError):
        return None


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets the same environment, started this process."""
    return all(name in os.environ for name in TORCHRUN)


@contextmanager
def open_place(device: str = "auto", hang_timeout: float | None = None) -> Iterator[Place]:
    """This process's place, its store connected and no group formed yet. `device` is auto, cpu or cuda.

    Raises UserError if the device is not there. At the end the process group is closed, or aborted after an error:
    an orderly close can wait for ever on a rank that is gone. With `hang_timeout` (0: for ever) ranks 0 and 1 look for
    hangs, where no `start_workers` does.
    """
    parent.follow()
    told = os.environ if launched() else {}  # else RANK and its like may be anyone's
    rank, world_size = int(told.get("RANK", "0")), int(told.get("WORLD_SIZE", "1"))
    local_rank, local_world_size = int(told.get("LOCAL_RANK", "0")), int(told.get("LOCAL_WORLD_SIZE", "1"))
    place = Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        machine=int(told.get("GROUP_RANK", rank // local_world_size)),
        device=_device(device, local_rank),
        store=_connect(rank, world_size) or HashStore(),
        heart=Heart(rank),
    )
    if hang_timeout is not None or STORE in os.environ:
        beats = _connect(rank, world_size, again=True) or place.store
        place.heart.begin(beats, _watchman(place, beats, hang_timeout or 0.0))
    try:
        yield place
    except Stopped:
        raise
    except BaseException:
        if dist.is_initialized():
            _abort_process_group()
        raise
    finally:
        place.heart.end()
        if dist.is_initialized():
            dist.destroy_process_group()


def launched() -> bool:
    """Whether this process is one of a launcher's workers."""
    return STORE in os.environ or under_torchrun()


def _device(wanted: str, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count <= local_rank:
        raise UserError(
            f"worker {local_rank} of this machine needs GPU {local_rank}, but torch sees {count} GPUs here; "
            "start at most one worker a GPU (--nproc_per_node), or look at CUDA_VISIBLE_DEVICES and the driver"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _connect(rank: int, world_size: int, *, again: bool = False) -> Store | None:
    """The store, under a prefix of this try alone: a restarted rank must not read what its dead peer left.

    `again`: a second connection, for a thread that must not wait for what another one asked; None without a launcher.
    """
    prefix = attempt_prefix(parent.attempt())
    if STORE in os.environ:
        host, port = os.environ[STORE].rsplit(":", 1)
        return PrefixStore(prefix, TCPStore(host, int(port), is_master=False))
    if not under_torchrun():
        return None
    if again:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        return PrefixStore(prefix, TCPStore(host, int(port), is_master=False, wait_for_workers=False))
    store, _, _ = next(rendezvous("env://", rank, world_size))
    return PrefixStore(prefix, store)


def attempt_prefix(attempt: int) -> str:
    """Where in the store one try of a run keeps its keys."""
    return f"packtrain/attempt_{attempt}"


def _watchman(place: Place, store: Store, patience: float) -> Callable[[], None] | None:
    """What looks for hangs in this process: nothing under `start_workers`; else rank 0 after all, rank 1 after rank 0.

    A hang is told and ends this process, and whoever hangs on this machine; torchrun's agents end the others.
    """
    if STORE in os.environ or place.rank > 1:
        return None
    watch = Watch(store, range(place.world_size) if place.rank == 0 else [0], patience)

    def look() -> None:
        hang = watch.look()
        if hang is not None and report_first(store, hang.ranks[0], hang.text, step=hang.step):
            log.quiet(False)
            log.say(f"packtrain: {hang.text}")
            _end_hung(hang)

    return look


def _end_hung(hang: Hang) -> None:
    if parent.AGENT in os.environ:
        _tell_agent(hang.text)
    for pid in hang.pids:
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os._exit(EXIT_FAULT)


def _tell_agent(text: str) -> None:
    """Leave the first cause where torchrun's agent looks for it, so that its table of failures holds it too."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        facts = {"timestamp": str(int(time.time())), "py_callstack": text}
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": facts}}), encoding="utf-8")
