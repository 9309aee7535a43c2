"""The launcher with real workers: exit codes, signals, first causes, and nothing left behind or listening outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from ranks import forkserver

from packtrain.distributed.launch import start_workers

WORKER = Path(__file__).parent / "launch_worker.py"


class Launched:
    """`start_workers` in a process of its own, with what its workers wrote."""

    def __init__(self, case: str, folder: Path, nproc: int, grace: float) -> None:
        self.folder, self.nproc = folder, nproc
        args = (case, str(folder), nproc, grace)
        self.process: BaseProcess = forkserver().Process(target=_launch, args=args)
        self.process.start()

    def wait_ready(self) -> None:
        """Until every worker has said that it is ready."""
        _until(lambda: len(list(self.folder.glob("ready-*"))) == self.nproc, 40, "the workers did not get ready")

    def go(self, text: str = "") -> None:
        """Let the waiting workers go on."""
        (self.folder / "go.new").write_text(text)
        (self.folder / "go.new").rename(self.folder / "go")

    def kill(self, number: signal.Signals) -> None:
        """Send the launcher a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float) -> tuple[int | None, str]:
        """(exit code, what launcher and workers said)."""
        self.process.join(seconds)
        return self.process.exitcode, (self.folder / "stderr").read_text()

    def told(self, rank: int) -> dict:
        """A worker's process id and environment."""
        return json.loads((self.folder / f"worker-{rank}").read_text())

    def alive(self) -> list[int]:
        """Process ids of workers that still run."""
        pids = [json.loads(path.read_text())["pid"] for path in self.folder.glob("worker-*")]
        return [pid for pid in pids if _state(pid) not in {"", "Z", "X"}]


def _launch(case: str, folder: str, nproc: int, grace: float) -> None:
    os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(start_workers([case, folder], nproc, grace, command=(sys.executable, str(WORKER))))


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """`launch(case, nproc, grace)`; whatever happens, no worker outlives its launcher."""
    launched: list[Launched] = []

    def start(case: str, nproc: int = 2, grace: float = 30.0) -> Launched:
        launched.append(Launched(case, tmp_path, nproc, grace))
        return launched[-1]

    yield start
    for one in launched:
        one.process.kill()
        one.process.join()
        for pid in one.alive():
            os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_workers_know_their_place(launch: Callable[..., Launched]) -> None:
    run = launch("done", 3)
    assert run.end(30) == (0, "")
    for rank in range(3):
        env = run.told(rank)["env"]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["PACKTRAIN_WORKER"]) == ("3", "3", "1")
        assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
        assert env["PACKTRAIN_STORE"].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("case", "code", "says"), [("wrong_input", 2, ""), ("fault", 1, ""), ("killed", 1, "error: rank 1 (process ")]
)
def test_the_first_failure_decides(launch: Callable[..., Launched], case: str, code: int, says: str) -> None:
    run = launch(case)
    ended, text = run.end(30)  # the other worker would sleep for 60 s
    assert ended == code
    assert text.startswith(says)
    assert text.count("\n") == bool(says)
    assert not run.alive()


def test_a_worker_that_ignores_sigterm_is_gone_within_five_seconds(launch: Callable[..., Launched]) -> None:
    run = launch("ignores_sigterm")
    run.wait_ready()
    run.go()
    began = time.monotonic()
    assert run.end(20)[0] == 1
    assert time.monotonic() - began < 5
    assert not run.alive()


@pytest.mark.parametrize(
    ("case", "number", "code"),
    [
        ("stops_at_sigterm", signal.SIGTERM, 75),
        ("stops_at_sigusr1", signal.SIGUSR1, 75),
        ("has_no_handler_yet", signal.SIGINT, 75),
        ("ignores_sigterm", signal.SIGTERM, 1),
    ],
)
def test_signals_reach_every_worker(
    launch: Callable[..., Launched], case: str, number: signal.Signals, code: int
) -> None:
    run = launch(case, grace=0.5)
    run.wait_ready()
    run.kill(number)
    ended, text = run.end(20)
    assert ended == code
    assert ("had not ended 0.5 s after a signal to stop" in text) == (code == 1)
    assert not run.alive()


def test_one_that_was_stopped_alone_does_not_leave_the_others_waiting(launch: Callable[..., Launched]) -> None:
    run = launch("stopped_alone", grace=0.5)
    ended, text = run.end(20)
    assert ended == 1
    assert "rank 1 had not ended 0.5 s" in text
    assert not run.alive()


@pytest.mark.parametrize(("then", "says"), [("die", "error: rank 1 (process "), ("raise", "error: rank 1: bad row")])
def test_only_the_first_cause_is_told_and_nothing_listens_outside(
    launch: Callable[..., Launched], then: str, says: str
) -> None:
    run = launch("with_place")
    run.wait_ready()
    assert {path.read_text() for path in run.folder.glob("ready-*")} == {"3.0"}
    pids = [run.process.pid, *(run.told(rank)["pid"] for rank in range(2))]
    listening = [address for pid in pids for address in _listening(pid)]
    assert len(listening) >= 3  # the store, and gloo in each worker
    assert all(address.startswith("127.") for address in listening), listening
    run.go(then)
    ended, text = run.end(20)
    assert ended == 1
    assert [line.startswith(says) for line in text.splitlines() if line.startswith("error")] == [True], text
    assert text.count("\n") == 1, text


def test_workers_end_with_a_killed_launcher(launch: Callable[..., Launched]) -> None:
    run = launch("with_place")
    run.wait_ready()
    run.kill(signal.SIGKILL)
    _until(lambda: not run.alive(), 5, "orphans")


def test_a_wildcard_listener_would_be_seen() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        assert any(address.startswith("0.0.0.0:") for address in _listening(os.getpid()))


def _listening(pid: int) -> list[str]:
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
