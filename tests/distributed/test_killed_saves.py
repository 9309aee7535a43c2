"""kill -9 inside a save, at twenty places of two ranks: what counts is the checkpoint before or the new one, whole.

Places are touches of the disk: each write (before it, in the middle, after it), each fsync, each open, rename and
removal, on either rank. A first run of both counts them.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import forkserver

from packtrain.checkpoint import dcp, dcp_file
from packtrain.checkpoint.dcp_folder import STATE, StepFolder, complete, keep_newest, read_state, verify
from packtrain.checkpoint.dcp_index import Index
from packtrain.checkpoint.store import Claim, claim

WORLD, PLACES = 2, 20
SETTINGS = {"--lr": 0.1}
AUDITED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def rows(rank: int, step: int) -> dict[str, dcp.Rows]:
    """This rank's half of two tensors, all of whose elements are the step."""
    return {name: dcp.Rows((64, 8), {(32 * rank, 0): torch.full((32, 8), float(step))}) for name in ("a", "b")}


def save(root: Path, rank: int, step: int, group: dist.ProcessGroup) -> None:
    def small_files(folder: StepFolder) -> None:
        folder.write_json(STATE, {"step": step, "step_items": 8, "fingerprint": SETTINGS})

    dcp.save(root, step, rows(rank, step), small_files, group=group, done=lambda _: keep_newest(root, 1, None))


class Touches:
    """Counts what this process does to the disk, and kills it at number `kill_at`."""

    def __init__(self, kill_at: int) -> None:
        self.count, self._kill_at = 0, kill_at

    def touch(self) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        write, sync = dcp_file._Hashing.write, os.fsync

        def writes(hashing: Any, data: Any) -> int:
            self.touch()
            half = len(data) // 2
            hashing._file.write(data[:half])
            hashing._file.flush()
            self.touch()
            hashing._file.seek(-half, os.SEEK_CUR)
            written = write(hashing, data)
            hashing._file.flush()
            self.touch()
            return written

        def syncs(file: int) -> None:
            self.touch()
            sync(file)
            self.touch()

        dcp_file._Hashing.write = writes  # type: ignore[method-assign]
        os.fsync = syncs
        sys.addaudithook(lambda event, _: self.touch() if event in AUDITED else None)


def life(rank: int, root: Path, store: Path, kill_at: int, told: Any) -> None:
    """A rank that saves steps 1 and 2, and is killed in the second if `kill_at` says so."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), WORLD), rank=rank, world_size=WORLD)
    group = dcp.saving_group()
    save(root, rank, 1, group)
    touches = Touches(kill_at)
    touches.watch()
    try:
        save(root, rank, 2, group)
    finally:
        told.send_bytes(str(touches.count).encode())
    os._exit(0)


def run(root: Path, killed: int, kill_at: int) -> list[int]:
    """Rank `killed` is, at touch `kill_at`; the other ends by itself. With 0 nobody is: touches of each rank."""
    context = forkserver()
    root.mkdir(parents=True)
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(WORLD):
        ours, theirs = context.Pipe(duplex=False)
        work = (rank, root, root.with_suffix(".store"), kill_at if rank == killed else 0, theirs)
        processes.append(context.Process(target=life, args=work, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for process in processes:
        process.join(20)
    alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert alive == [False] * WORLD, "the rank that is left waits for ever"
    assert not kill_at or processes[killed].exitcode == -signal.SIGKILL
    return [] if kill_at else [int(pipe.recv_bytes()) for pipe in pipes]


def places(counts: list[int]) -> list[tuple[int, int]]:
    """Twenty (rank, touch), spread over all there are."""
    every = [(rank, touch) for rank, count in enumerate(counts) for touch in range(1, count + 1)]
    return [every[index * len(every) // PLACES] for index in range(PLACES)]


def whole(folder: Path) -> bool:
    """Whether a checkpoint is verified and of one step alone."""
    index, step = Index(folder), read_state(folder)["step"]
    values = itertools.chain.from_iterable(index.rows(name, 0, 64).flatten().tolist() for name in ("a", "b"))
    return verify(folder) == [] and set(values) == {float(step)} and folder.name == f"step-{step}"


def test_killed_at_twenty_places_the_last_verified_counts(tmp_path: Path) -> None:
    counts = run(tmp_path / "count", 0, 0)
    assert min(counts) > 10
    found = set()
    for number, (rank, touch) in enumerate(places(counts)):
        root = tmp_path / str(number)
        run(root / "checkpoints", rank, touch)
        counts_now = complete(root / "checkpoints")
        assert counts_now, (rank, touch)
        assert all(whole(folder) for folder in counts_now.values()), (rank, touch)
        claimed = claim(root, SETTINGS, overwrite=False, checkpoints=root / "checkpoints", step_items=8)
        assert claimed is Claim.RESUME
        kept = complete(root / "checkpoints")
        assert max(kept) == max(counts_now)
        assert not [path for path in (root / "checkpoints").iterdir() if path.name.startswith(".")]
        found.add(max(kept))
    assert found == {1, 2}


def in_place(root: Path, step: int) -> None:
    """A save as many do it: into the folder that is there, and no word of when it is whole."""
    folder = root / "step-1"
    for name in ("a", "b"):
        (folder / name).write_text(str(step))


def test_a_save_in_place_would_be_mixed(tmp_path: Path) -> None:
    """The same killing shows what it is for: of a careless writer, two generations are left in one folder."""
    (tmp_path / "step-1").mkdir()
    in_place(tmp_path, 1)

    def second(work: Callable[[], None]) -> None:
        child = os.fork()
        if child == 0:
            touches = Touches(2)
            sys.addaudithook(lambda event, _: touches.touch() if event == "open" else None)
            work()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL

    second(partial(in_place, tmp_path, 2))
    assert {(tmp_path / "step-1" / name).read_text() for name in ("a", "b")} == {"1", "2"}
