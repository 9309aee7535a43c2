"""What a worker of test_launch.py does: `launch_worker.py CASE FOLDER`. torch is imported where a place is needed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])


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
    sys.exit(3)


def killed() -> None:
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    go_on()
    if RANK == 1:
        sys.exit(3)
    time.sleep(60)


def stops_at_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
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
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ready()
    time.sleep(60)


def with_place() -> None:
    """Sums, waits for the test, then what the test wrote into `go`."""
    import torch  # noqa: PLC0415

    from packtrain.distributed.collectives import same_on_all, sum_  # noqa: PLC0415
    from packtrain.distributed.place import open_place  # noqa: PLC0415

    with open_place("cpu") as place:
        try:
            place.join()
            same_on_all(place, "data", "abc")
            ready(str(sum_(torch.tensor(place.rank + 1.0), place).item()))
            go_on()
            if RANK == 1 and (FOLDER / "go").read_text() == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if RANK == 1:
                raise ValueError("bad row")
            sum_(torch.ones(1), place)
        except (RuntimeError, ValueError) as error:
            if place.report(error):
                print(f"error: rank {place.rank}: {error}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    (FOLDER / f"worker-{RANK}").write_text(json.dumps({"pid": os.getpid(), "env": dict(os.environ)}))
    globals()[sys.argv[1]]()
