"""A look inside some steps: --use_profiler.

    Profiler        the watch: waits a step, warms up for two, records three, writes, and is done

Each rank writes to one folder:

    rank-R.TIME.pt.trace.json.gz    for TensorBoard (its profiler plugin) and for ui.perfetto.dev alike
    rank-R.TIME.memory.pickle       on CUDA: what was allocated when, and by which line; for pytorch.org/memory_viz
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from packtrain import log
from packtrain.batch import Batch
from packtrain.distributed.place import Place
from packtrain.train.watch import Watch

WAIT, WARM_UP, ACTIVE = 1, 2, 3
"""Optimizer steps, as in llama-recipes."""

HEAVIEST = 10
"""Operators in the log's table."""

MEMORY_EVENTS = 100_000
"""The latest allocations and releases that the memory snapshot holds."""


class Profiler(Watch):
    """Records steps 4 to 6 of this process into `folder`, which is made."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder, self._place = folder, place
        self._on_cuda = place.device.type == "cuda"
        self._profile: profile | None = None
        self._seen = 0
        self._written: Path | None = None

    @contextmanager
    def step(self, number: int, batches: Sequence[Batch]) -> Iterator[None]:
        """Around every step; those after the sixth cost nothing."""
        self._seen += 1
        if self._seen == 1:
            self._start()
        yield
        if self._profile is not None:
            self._profile.step()
            if self._written is not None:
                self._stop()

    def finish(self) -> dict[str, Any]:
        """profiler_dir, None if the run was too short to record a step."""
        self._stop()
        if self._written is None:
            log.warn(
                f"--use_profiler: the run had {self._seen} steps, and recording begins with step {WAIT + WARM_UP + 1}"
            )
        return {"profiler_dir": str(self._folder) if self._written else None}

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_cuda
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
            with_flops=True,
        )
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        else:
            log.say("profiler: the memory snapshot is of CUDA's memory; there is none on a CPU")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Profiler clears events")  # there is one cycle
            self._profile.start()

    def _stop(self) -> None:
        """End, and write what there is if the run ended while recording."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        if self._on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile) -> None:
        steps = min(self._seen - WAIT - WARM_UP, ACTIVE)
        if steps < 1:  # torch was about to record the next one
            return
        stem = self._folder / f"rank-{self._place.rank}.{time.time_ns() // 1_000_000}"
        self._written = stem.with_name(f"{stem.name}.pt.trace.json.gz")
        recorded.export_chrome_trace(str(self._written))
        if self._on_cuda:
            torch.cuda.memory._dump_snapshot(f"{stem}.memory.pickle")  # type: ignore[no-untyped-call]
        log.say(f"profiler: {steps} steps of each rank are in {self._folder} (TensorBoard, ui.perfetto.dev)")
        for line in heaviest(recorded.key_averages(), steps, on_cuda=self._on_cuda):
            log.say(line)


def heaviest(averages: Sequence[Any], steps: int, *, on_cuda: bool) -> list[str]:
    """A table of the operators that took most time on the device, all ranks alike; `averages` is key_averages()'s."""

    def micros(event: Any) -> float:
        return float(event.self_device_time_total if on_cuda else event.self_cpu_time_total)

    operators = [e for e in averages if e.device_type.name == "CPU" and not e.key.startswith("ProfilerStep")]
    total = sum(map(micros, operators)) or 1.0
    first = sorted(operators, key=micros, reverse=True)[:HEAVIEST]
    device = "GPU" if on_cuda else "CPU"
    lines = [f"{'operator (its own time)':<56} {'calls/step':>10} {device + ' ms/step':>12} {'share':>6}"]
    return lines + [
        f"{e.key[:56]:<56} {e.count / steps:>10.1f} {micros(e) / steps / 1000:>12.3f} {micros(e) / total:>6.1%}"
        for e in first
    ]
