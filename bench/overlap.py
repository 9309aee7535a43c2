"""How much of a step's communication nothing hides, from the traces of `--use_profiler`.

A GPU's time between its first and its last recorded event is split by what runs there: kernels of NCCL's alone
(exposed), both, others alone, or nothing (idle). A wait for a slower rank is inside NCCL's kernel and counts as
communication. The profiler makes the host slower, so `idle` is told too: where it is large, the share is too small.

A CPU's trace has no device: there gloo's operations stand for NCCL's and aten's for the others, which proves that
traces are read and nothing about overlap.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}

Spans = list[tuple[float, float]]


class Overlap(NamedTuple):
    """Shares of the recorded time, a mean over ranks."""

    exposed: float
    """Communication alone."""
    communication: float
    """Communication, hidden or not."""
    idle: float


def overlap(folder: Path) -> Overlap:
    """Of all ranks whose traces are in a folder. Raises FileNotFoundError if there is none."""
    traces = sorted(folder.glob("*.pt.trace.json.gz"))
    if not traces:
        raise FileNotFoundError(f"{folder}: no trace")
    with ProcessPoolExecutor(min(8, len(traces))) as pool:
        found = list(pool.map(_of_trace, traces))
    return Overlap(*(sum(column) / len(found) for column in zip(*found, strict=True)))


def _of_trace(trace: Path) -> Overlap:
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return of_events(json.load(file)["traceEvents"])


def of_events(events: Sequence[dict[str, Any]]) -> Overlap:
    """Of one rank's events, as Chrome's trace format has them (microseconds)."""
    whole = [e for e in events if e.get("ph") == "X" and e.get("dur")]
    if any(e.get("cat") in DEVICE for e in whole):
        whole = [e for e in whole if e.get("cat") in DEVICE]
        sent = [e for e in whole if "nccl" in e["name"].lower()]
        others = [e for e in whole if "nccl" not in e["name"].lower()]
    else:
        sent = [e for e in whole if e["name"].startswith("gloo:")]
        others = [e for e in whole if e["name"].startswith("aten::")]
    communication, computation = _union(sent), _union(others)
    both = _union([*sent, *others])
    if not both:
        return Overlap(0.0, 0.0, 0.0)
    span = both[-1][1] - both[0][0]
    busy = _length(both)
    return Overlap((busy - _length(computation)) / span, _length(communication) / span, 1 - busy / span)


def _union(events: Iterable[dict[str, Any]]) -> Spans:
    found: Spans = []
    for start, stop in sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def _length(spans: Spans) -> float:
    return sum(stop - start for start, stop in spans)
