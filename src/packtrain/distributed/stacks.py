"""Where a process stands, told even by one that hangs: Python's fault handler writes, another process reads.

listen          in a worker: at SIGUSR2 its stacks go to a file in memory; at a crash, to standard error
Told            what others must know to ask: process id, file, main thread
ask             the main thread's stack of a process of this machine; wakes one that SIGSTOP holds
state           how the kernel sees it
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ANSWER_SECONDS = 1.0
SHOWN = 12
"""Innermost frames that are shown."""

_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device", "Z": "dead"}


class Told(NamedTuple):
    """Of a process that listens."""

    pid: int
    fd: int
    """Of its file; -1: it does not listen."""
    thread: int
    """Of the main one, as the fault handler names it."""


def listen() -> Told:
    """Be ready to be asked, from any thread and whatever this process does; another process opens its file in /proc."""
    ident = threading.main_thread().ident or 0
    try:
        faulthandler.enable(all_threads=False)
    except (OSError, ValueError, AttributeError):  # a standard error that is no file, as in a notebook
        return Told(os.getpid(), -1, ident)
    if sys.platform != "linux":
        return Told(os.getpid(), -1, ident)
    fd = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR2, file=fd)
    return Told(os.getpid(), fd, ident)


def ask(told: Told) -> list[str]:
    """The main thread's frames, innermost first, at most `SHOWN`; [] if it does not answer."""
    try:
        with Path(f"/proc/{told.pid}/fd/{told.fd}").open("rb") as file:  # ours even if the process ends of it
            file.seek(0, os.SEEK_END)
            os.kill(told.pid, signal.SIGUSR2)
            if state(told.pid) == _STATES["T"]:
                os.kill(told.pid, signal.SIGCONT)
            dump, until = "", time.monotonic() + ANSWER_SECONDS
            while time.monotonic() < until:
                time.sleep(0.02)
                more = file.read().decode()
                dump += more
                if not more and (frames := frames_of(dump, told.thread)):
                    return frames
    except OSError:
        return []
    return []


def state(pid: int) -> str:
    """In words; "" for a process that runs, sleeps, or is not there."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return _STATES.get(letter, "")


def frames_of(dump: str, thread: int) -> list[str]:
    """A thread's frames in what the fault handler wrote."""
    for block in re.split(r"\n(?=Thread|Current thread)", dump):
        head, *lines = block.strip().splitlines() or [""]
        found = re.match(r"(?:Current thread|Thread) 0x([0-9a-f]+)", head)
        if found and int(found[1], 16) == thread:
            return [line.strip() for line in lines if line.startswith("  File")][:SHOWN]
    return []
