"""What a worker of test_launch.py does: `main([CASE, FOLDER])` in a process that the launcher made."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from packtrain.distributed.collectives import same_on_all, sum_
from packtrain.distributed.place import Place, open_place
from packtrain.errors import Fault

RANK, FOLDER, TRY = 0, Path(), 0


def main(words: Sequence[str]) -> int:
    """The case's own end, or 0."""
    global RANK, FOLDER, TRY
    RANK, FOLDER, TRY = int(os.environ["RANK"]), Path(words[1]), int(os.environ["PACKTRAIN_ATTEMPT"])
    told = {"pid": os.getpid(), "env": {**os.environ}, "others": [pid for pid in earlier() if alive(pid)]}
    (FOLDER / f"worker-{RANK}-{TRY}").write_text(json.dumps(told))
    globals()[words[0]]()
    return 0


def earlier() -> list[int]:
    """Workers of the tries before."""
    files = [path for path in FOLDER.glob("worker-*") if not path.name.endswith(f"-{TRY}")]
    return [json.loads(path.read_text())["pid"] for path in files]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def ready(text: str = "") -> None:
    """Tell the test that this worker is where it should be."""
    (FOLDER / f"ready-{RANK}").write_text(text)


def go_on() -> None:
    """Wait for the test."""
    while not (FOLDER / "go").exists():
        time.sleep(0.02)


def done() -> None:
    return


def wrong_input() -> None:
    time.sleep(0.0 if RANK == 0 else 60)
    sys.exit(2)


def fault() -> None:
    time.sleep(0.0 if RANK == 1 else 60)
    os._exit(3)


def killed() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def crashes() -> None:
    with open_place("cpu"):
        if RANK == 1:
            time.sleep(0.3)  # until a beat is there
            ctypes.string_at(0)
        time.sleep(60)


def killed_once() -> None:
    if RANK == 1 and TRY == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60 if TRY == 0 else 0)


def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    go_on()
    if RANK == 1:
        sys.exit(3)
    time.sleep(60)


def stops_at_sigterm() -> None:
    """After a while that lets a second one come."""

    def stop(*_: object) -> None:
        time.sleep(0.3)
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    ready()
    time.sleep(60)


def stops_at_sigusr1() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    ready()
    time.sleep(60)


def stopped_alone() -> None:
    time.sleep(0.0 if RANK == 0 else 60)
    sys.exit(75)


def has_no_handler_yet() -> None:
    ready()
    time.sleep(60)


def with_place() -> None:
    """Sums, waits for the test, then what the test wrote into `go`."""
    with open_place("cpu") as place:
        try:
            place.join()
            same_on_all(place, "data", "abc")
            ready(str(sum_(torch.tensor(place.rank + 1.0), place).item()))
            go_on()
            if RANK == 1:
                fails((FOLDER / "go").read_text())
            sum_(torch.ones(1), place)
        except (RuntimeError, ValueError, MemoryError) as error:
            if place.report(error):
                print(f"error: rank {place.rank}: {error}", file=sys.stderr)
            sys.exit(1)


def fails(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise MemoryError("no more") if how == "memory" else ValueError("bad row")


def fails_at_step_3() -> None:
    with open_place("cpu") as place:
        steps(place, 3)
        if RANK == 1:
            place.report(ValueError("bad row"))
            sys.exit(1)
        time.sleep(60)


def fails_a_step_further_each_time() -> None:
    with open_place("cpu") as place:
        steps(place, 3 + TRY)
        if RANK == 1 and TRY < 4:
            place.report(ValueError("bad row"))
            sys.exit(1)


def steps(place: Place, count: int) -> None:
    for step in range(1, count + 1):
        place.heart.at(f"step {step}", step=step, steady=True)


def rests() -> None:
    """Rank 0 waits for what rank 1 would tell."""
    with open_place("cpu") as place:
        ready()
        while RANK == 1:
            place.heart.at("its work")
            time.sleep(0.02)
        with contextlib.suppress(Fault):
            place.wait_for("the work")


def sleeps() -> None:
    """Rank 1 in a sleep that it should not be in, rank 0 in a collective: both beat."""
    hangs(lambda: time.sleep(60))


def holds_the_lock() -> None:
    """The same in a C function that lets no other thread run."""
    hangs(lambda: ctypes.PyDLL(None).sleep(60))


def hangs(how: object) -> None:
    with open_place("cpu") as place:
        place.join()
        steps(place, 2)
        ready()
        time.sleep(0.4)  # two beats
        if RANK == 1 and TRY == 0:
            how()  # type: ignore[operator]
        sum_(torch.ones(1), place)


def both_wait() -> None:
    """Each in another group's sum: none is the one to blame."""
    with open_place("cpu") as place:
        place.join()
        groups = [torch.distributed.new_group([0, 1]) for _ in range(2)]
        steps(place, 1)
        torch.distributed.all_reduce(torch.ones(1), group=groups[RANK])
