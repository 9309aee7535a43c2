"""Several ranks in one test: real processes, a real gloo group, torch already imported.

    def sums(place, x):                     # at a test module's top level, so that it can be pickled by name
        return sum_(torch.tensor(x), place).item()

    assert run_ranks(sums, 2, 3.0) == [6.0, 6.0]

Ranks come from one forkserver that has torch in memory, so a group costs hundredths of a second after the first. They
meet through a file; nothing listens beyond loopback. At the time limit, or after a failure, every one is killed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from packtrain.distributed.place import Place, is_echo

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "peft",
    "packtrain.preflight",
    "pytest",
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
SECONDS_FOR_PEERS = 5.0
"""After one rank's failure: what the others have to say for themselves."""


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60) -> list[Any]:
    """`function(place, *args)` on every rank of a group; its results, picklable, in rank order.

    An exception on any rank fails the test with that rank's traceback; so does running past `timeout` seconds.
    """
    context = forkserver()
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            work = (theirs, Path(folder), (rank, world), timeout, pickle.dumps((function, args)))
            process = context.Process(target=_run, args=work, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        with _killed_at_the_end(processes):
            return _results(pipes, timeout, Path(folder))


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have torch in memory already."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@contextmanager
def _killed_at_the_end(processes: list[BaseProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _results(pipes: list[Connection], timeout: float, folder: Path) -> list[Any]:
    """Collect every rank's answer; after a failure the others get a little time, then the test fails."""
    deadline = time.monotonic() + timeout
    answers: dict[int, tuple[str, Any]] = {}
    while len(answers) < len(pipes) and (left := deadline - time.monotonic()) > 0:
        for pipe in wait([p for rank, p in enumerate(pipes) if rank not in answers], left):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            answers[rank] = _receive(pipes[rank])
            if answers[rank][0] != "value":
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_PEERS)
    failures = [
        f"rank {rank}: {text}" for kind in ("error", "echo") for rank, (k, text) in answers.items() if k == kind
    ]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    silent = [rank for rank in range(len(pipes)) if rank not in answers]
    if silent:
        stacks = "\n".join(f"rank {rank}: {(folder / f'stack-{rank}').read_text()}" for rank in silent)
        pytest.fail(f"ranks {silent} of {len(pipes)} did not answer within {timeout:g} s\n{stacks}", pytrace=False)
    return [answers[rank][1] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        kind, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "error", "ended without an answer (killed by a signal?)"
    return kind, value


def _run(pipe: Connection, folder: Path, numbers: tuple[int, int], timeout: float, work: bytes) -> None:
    """The life of rank `numbers[0]` of `numbers[1]`, in its own process."""
    rank, world = numbers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the forkserver
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    stack = (folder / f"stack-{rank}").open("w")
    faulthandler.dump_traceback_later(0.9 * timeout, file=stack)
    place = Place(
        rank=rank,
        world_size=world,
        local_rank=rank,
        local_world_size=world,
        machine=0,
        device=torch.device("cpu"),
        store=dist.FileStore(str(folder / "store"), world),
    )
    try:
        function, args = pickle.loads(work)
        place.join(timeout=timedelta(seconds=2 * timeout))
        answer: tuple[str, Any] = ("value", function(place, *args))
    except BaseException as error:
        answer = ("echo" if is_echo(error) else "error", traceback.format_exc())
    # Plain pickle: torch's own way to send a tensor leaves it in this process, which is about to end.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized() and answer[0] == "value":
        dist.destroy_process_group()
    os._exit(0)
