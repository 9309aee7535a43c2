"""A worker ends with what started it, and knows which try of which launch it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packtrain.distributed import parent

WORKER = """
import time
from packtrain.distributed import parent
parent.follow()
print("there", flush=True)
time.sleep(60)
"""
AGENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.parametrize("agent", [True, False])
def test_a_worker_of_torchruns_ends_with_a_killed_agent_and_nobody_elses_does(agent: bool) -> None:
    """Before it has joined anything."""
    env = {k: v for k, v in os.environ.items() if k not in {parent.PARENT, parent.AGENT}}
    env |= {parent.AGENT: "7"} if agent else {}
    with subprocess.Popen([sys.executable, "-c", AGENT, WORKER], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().strip() for _ in range(2)]
        pid = int(next(word for word in said if word != "there"))
        process.kill()
    until = time.monotonic() + 2
    while running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert running(pid) == (not agent)
    if running(pid):
        os.kill(pid, 9)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_tries_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (parent.LAUNCH, parent.ATTEMPT, parent.AGENT, "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (parent.attempt(), parent.launch_id()) == (0, None)
    monkeypatch.setenv(parent.AGENT, "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert parent.attempt() == 2
    first = parent.launch_id()
    assert first == parent.launch_id()
    assert str(os.getppid()) in str(first)
    monkeypatch.setenv(parent.LAUNCH, "abc")
    monkeypatch.setenv(parent.ATTEMPT, "1")
    assert (parent.attempt(), parent.launch_id()) == (1, "abc")
