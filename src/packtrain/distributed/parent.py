"""Whose child a worker is, and that it ends with its parent. Imports no torch: it is the first thing a process does.

follow          SIGKILL from the kernel when the parent is gone (Linux)
launch_id       one name for all attempts of a launch
attempt         which of them this is, from 0
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

from packtrain.errors import EXIT_FAULT

LAUNCH = "PACKTRAIN_LAUNCH"
ATTEMPT = "PACKTRAIN_ATTEMPT"
PARENT = "PACKTRAIN_PARENT"
"""What `start_workers` tells its workers: the launch's name, the number of this try, the process they come from."""

AGENT = "TORCHELASTIC_RUN_ID"
"""Set by torchrun's agent, the parent of its workers."""

_PR_SET_PDEATHSIG = 1


def follow() -> None:
    """End when the launcher or torchrun's agent that started this process does; anybody else's child goes on."""
    parent = os.environ.get(PARENT)
    if parent is None and AGENT not in os.environ:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != int(parent):  # it died before the kernel was asked
        os._exit(EXIT_FAULT)


def attempt() -> int:
    """0 for the first try; more after workers died and the launcher, or torchrun, started them again."""
    return int(os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def launch_id() -> str | None:
    """The same for every try of one command, another for the next command; None where nobody starts tries."""
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    if AGENT not in os.environ:
        return None
    agent = os.getppid()
    return f"{os.environ[AGENT]} {socket.gethostname()} {agent} {_started(agent)}"


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; nothing where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""
