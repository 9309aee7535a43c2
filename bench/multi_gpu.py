"""packtrain on several GPUs of one host: is it right, how does it scale, what do loading and saving cost?

    python -m bench.multi_gpu [--parts 1,2,3,4] [--gpus 1,2,4,8] [--out FOLDER] [--seconds 570] [--dry_run]

    1  right        one global batch on one GPU and on several, by strategy and by what trains: first loss, first
                    gradient norm, all losses; and a run whose worker is killed, gone on with on half the GPUs
    2  scaling      Llama-3.1-8B's shape: tokens/s of a GPU, against fewer GPUs (the same rows a GPU), MFU, peak
                    memory, communication that nothing hides (bench/overlap.py says how that is seen)
    3  70B          its shape on all GPUs; host memory while a checkpoint is loaded
    4  checkpoints  8B, every weight trained: seconds of standing still, of writing, of going on

All are runs of `packtrain train` on random weights and rows (bench/runs.py). Each has a time limit; one that fails or
comes too late is a row that says so. FOLDER gets results.jsonl, a line a run as it ends, and tables.md.

On a machine that is had for a while, in two calls, each ended by --seconds before ten minutes are over:

    python -m bench.multi_gpu --parts 1,2 --out first       is it right, how does it scale
    python -m bench.multi_gpu --parts 3,4 --out second      70B, half of it writing 140 GB; checkpoints

Expected seconds, none of them measured: part 1 230 on 8 GPUs, 300 on 2; part 2 340, 170 on 2; part 3 250; part 4 300.
What no time is left for is a row that says so. In part 2 those are the numbers of GPUs between the least and the most;
`--parts 2 --gpus 1,8` is 200 s. Part 3 wants 160 GB of disk, and makes do with fewer layers; part 4 wants 130 GB.

`--dry_run` does the same on this machine's cores over gloo with a toy, in about 3 minutes on two of them. It proves
the script and no figure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.multi_gpu_parts import PARTS
from bench.multi_gpu_plan import DRY, GPUS, Part, Plan
from bench.runs import NO_MULTICAST, Machine, Outcome, gpus


def main() -> int:
    """All tables; 1 if something was not right."""
    options = _options()
    found = gpus()
    counts = [n for n in options.gpus if options.dry_run or n <= len(found)]
    if not counts:
        raise SystemExit(f"{len(found)} GPUs here: --dry_run proves the script on CPU workers")
    gpu = "" if options.dry_run else found[0]
    with (
        tempfile.TemporaryDirectory(prefix="packtrain-gpus-", dir=options.folder) as folder,
        Report(options.out) as report,
    ):
        machine = Machine(Path(folder), counts[-1], dry=options.dry_run, seconds=options.seconds, note=report.outcome)
        plan = Plan(DRY if options.dry_run else GPUS, machine, counts, gpu)
        report.say(_where(plan))
        for number in options.parts:
            report.part(number, plan)
        report.say("\n".join(["", "| part | |", "|---|---|", *report.summary]))
        return int(not report.good)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.multi_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return sorted({int(word) for word in text.split(",")})

    parser.add_argument("--parts", type=numbers, default=[1, 2, 3, 4])
    parser.add_argument("--gpus", type=numbers, help="by default 1,2,4,8 as far as there are; of a dry run 1,4")
    parser.add_argument("--seconds", type=float, default=570, help="all runs of this call may take")
    parser.add_argument("--out", type=Path, default=Path("multi-gpu"), help="where results go")
    parser.add_argument("--folder", help="where runs and checkpoints are written; by default the temporary folder")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    options.gpus = options.gpus or ([1, 4] if options.dry_run else [1, 2, 4, 8])
    return options


def _where(plan: Plan) -> str:
    device = f"{plan.most} x {plan.gpu}" if plan.gpu else f"dry run: up to {plan.most} gloo workers on CPU cores"
    off = " ".join(f"{name}={value}" for name, value in NO_MULTICAST.items())
    return f"{device}; torch {importlib.metadata.version('torch')}; NVLink multicast is off in all runs ({off})"


class Report:
    """What is printed, and written to a folder as it comes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tables = (folder / "tables.md").open("w", encoding="utf-8")
        self._results = (folder / "results.jsonl").open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self.summary: list[str] = []
        self.good = True

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.close()
        self._results.close()

    def say(self, text: str) -> None:
        """On the screen and in tables.md."""
        print(text, flush=True)
        print(text, file=self._tables, flush=True)

    def outcome(self, name: str, outcome: Outcome) -> None:
        """A line of results.jsonl; runs that are side by side tell theirs from threads."""
        kept = vars(outcome) | {"memory": vars(outcome.memory)}
        kept["result"] = {key: value for key, value in outcome.result.items() if key != "fingerprint"}
        with self._lock:
            print(f"{outcome.seconds:5.0f} s  {name}: {outcome.failed or 'done'}", file=sys.stderr, flush=True)
            print(json.dumps({"run": name} | kept), file=self._results, flush=True)

    def part(self, number: int, plan: Plan) -> None:
        """Make it and say what came of it; what goes wrong in it is its own."""
        began = time.monotonic()
        try:
            part = PARTS[number](plan)
        except Exception as error:
            part = Part(f"{number}: failed", "", [], f"{type(error).__name__}: {error}", good=False)
        line = "|---" * (part.head.count("|") + 1) + "|"
        self.say("\n".join(["", part.title, "", f"| {part.head} |", line, *part.rows]))
        self.summary.append(f"| {number} | {part.summary} |")
        self.good &= part.good
        print(f"part {number}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
