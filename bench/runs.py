"""One `packtrain train` after another, or side by side on a machine's GPUs: for scripts that compare runs.

    Machine     its GPUs, or the workers that a dry run takes for them, and when the time is over
    Train       a run as it goes: process, workers, metrics.jsonl, host memory
    Outcome     what it left: figures of run/metrics.jsonl and run/result.json, or why there are none

Nothing a run does ends the others: it has a time limit of its own, and its failure is an outcome like others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30
POLL_SECONDS = 0.01
LOOK_SECONDS = 0.1
"""Between two looks at the host memory of a run's processes."""

LEAST_SECONDS = 10.0
"""No run begins with less time than this."""

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast is off: a program that uses it can take GPUs from everybody on a host that is shared."""


@dataclass
class Memory:
    """Host memory of all of a run's processes until its first step, in bytes."""

    private: int = 0
    """RssAnon and RssShmem, summed over processes, at its highest; pages that forks share count in each."""
    resident: int = 0
    """The kernel's high-water marks (VmHWM), summed: mapped files count in every process that touches them."""

    def look(self, pids: Collection[int]) -> None:
        """Take in how things are now."""
        found = [_status(pid) for pid in pids]
        self.private = max(self.private, sum(s.get("RssAnon", 0) + s.get("RssShmem", 0) for s in found))
        self.resident = max(self.resident, sum(s.get("VmHWM", 0) for s in found))


@dataclass(frozen=True)
class Outcome:
    """A run's end."""

    failed: str | None
    """None: it ended as it should."""
    refused: bool
    """The failure is that packtrain does not do this (exit code 2)."""
    steps: list[dict[str, Any]]
    """The lines of metrics.jsonl that are steps."""
    result: dict[str, Any]
    seconds: float
    first_step: float | None
    """Seconds from the command to its first new line in metrics.jsonl."""
    memory: Memory
    said: str
    """The end of standard error."""


@dataclass(frozen=True)
class Job:
    """A run to make: its name, its flags, the seconds it may take."""

    name: str
    flags: Sequence[str]
    limit: float
    watch: Callable[[Train], bool] = field(default=lambda run: False)
    """Asked a hundred times a second; true: the run has shown what it was for, and is killed."""


class Train:
    """A `packtrain train` that has been started."""

    def __init__(self, folder: Path, flags: Sequence[str], environment: dict[str, str]) -> None:
        self.out = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._said = folder.with_name(f"{folder.name}.said")
        self._before = self.lines()
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "packtrain", "train", *flags, "--output_dir", str(folder)],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=self._said.open("w", encoding="utf-8"),
        )

    def lines(self) -> list[dict[str, Any]]:
        """All that is whole in metrics.jsonl."""
        try:
            text = (self.out / "run/metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self) -> int:
        """The last one taken."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def result(self) -> dict[str, Any]:
        """What result.json holds now."""
        try:
            return dict(json.loads((self.out / "run/result.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def workers(self) -> list[int]:
        """Process ids in rank order; a run of one is its own worker."""
        found = [worker for zygote in _children(self.process.pid) for worker in _children(zygote)]
        return found or [self.process.pid]

    def kill(self) -> None:
        """End all of it, and wait until it is gone, with its memory."""
        left = [*_children(self.process.pid), *self.workers()]
        self.process.kill()  # its workers end with it
        self.process.wait()
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def wait(self, limit: float, watch: Callable[[Train], bool]) -> Outcome:
        """Until its end, the time's, or `watch`'s."""
        try:
            return self._wait(limit, watch)
        finally:
            if self.process.poll() is None:
                self.kill()

    def _wait(self, limit: float, watch: Callable[[Train], bool]) -> Outcome:
        memory, first, ended, looked = Memory(), None, "", 0.0
        while self.process.poll() is None:
            now = time.monotonic()
            if first is None and now - looked >= LOOK_SECONDS:
                memory.look({self.process.pid, *_children(self.process.pid), *self.workers()})
                looked = now
            if first is None and self.stepped():
                first = now - self.began
            if watch(self):
                ended = "killed"
            elif now - self.began > limit:
                ended = f"took more than {limit:.0f} s"
            if ended:
                self.kill()
                break
            time.sleep(POLL_SECONDS)
        seconds, said = time.monotonic() - self.began, self._said.read_text(encoding="utf-8")
        if first is None and self.stepped():
            first = seconds
        code = self.process.returncode
        failed = None if code == 0 or ended == "killed" else ended or self._reason(said, code)
        steps = [line for line in self.lines() if "loss" in line]
        return Outcome(failed, code == 2, steps, self.result(), seconds, first, memory, said[-8000:])

    def stepped(self) -> bool:
        """Whether there is a line that an earlier part of the run had not; its times are never the same twice."""
        return any(line not in self._before for line in self.lines()[-1:])

    def _reason(self, said: str, code: int) -> str:
        lines = [line for line in said.splitlines() if line.strip()] or [""]
        own = [line for line in lines if line.startswith("packtrain:")]
        text = str(self.result().get("reason") or (own or lines)[-1])
        return f"exit code {code}: {' '.join(text.split())[:200]}"


class Machine:
    """Where runs are made: `gpus` of them at most, for `seconds` from now on; every outcome is told to `note`."""

    def __init__(
        self, folder: Path, gpus: int, *, dry: bool, seconds: float, note: Callable[[str, Outcome], None]
    ) -> None:
        self.folder, self.gpus, self._dry, self._note = folder, gpus, dry, note
        self._until = time.monotonic() + seconds
        self._names = _visible() or [str(number) for number in range(gpus)]

    def left(self) -> float:
        """Seconds until the time is over."""
        return self._until - time.monotonic()

    def run(self, job: Job, workers: int) -> Outcome:
        """One run alone on the first GPUs."""
        return self._one(job, tuple(self._names[:workers]) if not self._dry else (), workers)

    def beside(self, jobs: Sequence[Job], workers: int) -> list[Outcome]:
        """Runs of so many workers each, as many at a time as there are GPUs; a dry run takes a core for one."""
        places = self.gpus if not self._dry else min(self.gpus, os.cpu_count() or 1)
        slots = max(1, places // workers)
        free: queue.Queue[tuple[str, ...]] = queue.Queue()
        for slot in range(slots):
            free.put(() if self._dry else tuple(self._names[slot * workers : (slot + 1) * workers]))

        def one(job: Job) -> Outcome:
            mine = free.get()
            try:
                return self._one(job, mine, workers)
            finally:
                free.put(mine)

        with ThreadPoolExecutor(slots) as pool:
            return list(pool.map(one, jobs))

    def _one(self, job: Job, mine: tuple[str, ...], workers: int) -> Outcome:
        limit = min(job.limit, self.left())
        if limit < LEAST_SECONDS:
            outcome = Outcome("no time was left", False, [], {}, 0.0, None, Memory(), "")
        else:
            flags = [*job.flags, "--nproc_per_node", str(workers)]
            environment = NO_MULTICAST | {"CUDA_VISIBLE_DEVICES": ",".join(mine), "HF_HUB_OFFLINE": "1"}
            if self._dry:
                environment["OMP_NUM_THREADS"] = "1"
            outcome = Train(self.folder / job.name, flags, environment).wait(limit, job.watch)
        self._note(job.name, outcome)
        return outcome


def gpus() -> list[str]:
    """Names of this machine's, by nvidia-smi, as many as may be used: to ask CUDA would take memory of one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return []
    names = [name.strip() for name in names if name.strip()]
    return names if (mine := _visible()) is None else names[: len(mine)]


def _visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, None for all."""
    found = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if found is None else [name for name in found.split(",") if name]


def checkpoints(out: Path) -> list[Path]:
    """Those of a run that are whole, the newest last."""
    return sorted((done.parent for done in out.glob("checkpoints/step-*/DONE")), key=lambda p: int(p.name[5:]))


def kill_a_worker(step: int) -> Callable[[Train], bool]:
    """A `watch` that ends the last worker by SIGKILL once the run is past a step, and sees what becomes of it."""
    done: list[int] = []

    def watch(run: Train) -> bool:
        if not done and run.step() >= step:
            done.append(run.workers()[-1])
            os.kill(done[0], signal.SIGKILL)
        return False

    return watch


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _status(pid: int) -> dict[str, int]:
    try:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words and words[-1] == "kB"}
    except (FileNotFoundError, ProcessLookupError):
        return {}
