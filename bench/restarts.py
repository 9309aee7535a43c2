"""How a run of two workers on this machine comes through kills, stops and signals: python -m bench.restarts [KILLS].

    recovery    SIGKILL of one worker, KILLS times (30): restarts that worked, seconds to a new step, steps done twice
    goodput     three kills in about half a minute: the share of the time that went into steps that count
    hang        SIGSTOP of one worker: seconds until it is named, and until nobody is left
    signal      SIGTERM: seconds to the end, steps lost

The model is a toy of 40 ms a step, so the figures are those of the machinery.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SAVE_STEPS = 10
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Run:
    """`packtrain train` in a folder of its own, seen from outside: processes, metrics.jsonl, standard error."""

    def __init__(self, folder: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
        self.out, self.said = folder / "out", folder / "said"
        command = (
            f"train --random_init {folder} --dataset synthetic_dataset --synthetic_dataset.rows 4000 "
            "--synthetic_dataset.length 64 --context_length 64 --batch_size_training 4 --use_peft "
            f"--run_validation False --save_steps {SAVE_STEPS} --num_epochs 1000 --nproc_per_node 2 "
            f"--output_dir {self.out}"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "packtrain", *command.split(), *flags],
            env=ENVIRONMENT,
            stderr=self.said.open("w"),
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids in rank order."""
        return [worker for zygote in _children(self.process.pid) for worker in _children(zygote)]

    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        try:
            text = (self.out / "run/metrics.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def step(self) -> int:
        """The last one."""
        lines = self.steps()
        return int(lines[-1]["step"]) if lines else 0

    def wait_for(self, step: int, seconds: float = 60) -> bool:
        """Until that step is there; False if the run ends before, or the time."""
        until = time.monotonic() + seconds
        while self.step() < step:
            if self.process.poll() is not None or time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def resumed_after(self) -> list[int]:
        """The steps that it went on from."""
        return [int(n) for n in re.findall(r"goes on from .*, after step (\d+)", self.said.read_text(encoding="utf-8"))]

    def last_before(self, resumed: int, seconds: float = 30) -> int | None:
        """Wait until it has gone on so many times; the last step there was before that. None: it does not.

        A worker that is left may still write down the step in which the other died.
        """
        until, last = time.monotonic() + seconds, self.step()
        while len(self.resumed_after()) < resumed:
            if self.process.poll() is not None or time.monotonic() > until:
                return None
            time.sleep(0.005)
            last = max(last, self.step())
        return last


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Recovery(NamedTuple):
    """What SIGKILLs of one of two workers came to."""

    kills: int
    seconds: list[float]
    """From each kill that was recovered from to the next new step."""
    twice: list[int]
    """Steps done again after each."""

    def __str__(self) -> str:
        median, worst = statistics.median(self.seconds or [0]), max(self.seconds, default=0)
        return (
            f"{len(self.seconds)} of {self.kills} kills; seconds to a new step: median {median:.2f}, most {worst:.2f}; "
            f"steps done twice: median {statistics.median(self.twice or [0]):g}, most {max(self.twice, default=0)}"
        )


def recovery(folder: Path, kills: int) -> Recovery:
    """M1, M2, M3."""
    chance = random.Random(0)
    found = Recovery(kills, [], [])
    with Run(folder, "--max_restarts", str(kills)) as run:
        reached = run.wait_for(SAVE_STEPS + 5)
        for number in range(kills):
            if not reached:
                break
            time.sleep(chance.uniform(0.0, 0.5))
            victim = run.workers()[chance.randrange(2)]
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            before = run.last_before(number + 1)
            if before is None or not run.wait_for(before + 1, 30):
                break
            found.seconds.append(time.monotonic() - began)
            found.twice.append(before - run.resumed_after()[number])
            reached = run.wait_for(before + SAVE_STEPS + 2)
    return found


class Goodput(NamedTuple):
    """Three SIGKILLs in about half a minute."""

    useful: float
    """Seconds of steps that count, each once, as metrics.jsonl has them."""
    wall: float
    steps: int

    @property
    def part(self) -> float:
        """Of the time that went into steps that count."""
        return self.useful / self.wall

    def __str__(self) -> str:
        return f"{self.part:.2f} of {self.wall:.0f} s with three kills, {self.steps} steps"


def goodput(folder: Path) -> Goodput:
    """M5."""
    chance = random.Random(0)
    with Run(folder, "--max_restarts", "3") as run:
        run.wait_for(SAVE_STEPS + 1)
        began, first = time.monotonic(), run.step()
        for _ in range(3):
            time.sleep(chance.uniform(6, 10))
            os.kill(run.workers()[chance.randrange(2)], signal.SIGKILL)
        run.wait_for(run.step() + 1)
        time.sleep(max(0.0, began + 32 - time.monotonic()))
        wall, lines = time.monotonic() - began, run.steps()
    useful = sum(line["step_time"] for line in lines if line["step"] > first)
    return Goodput(useful, wall, int(lines[-1]["step"]) - first)


class Hang(NamedTuple):
    """SIGSTOP of one worker."""

    patience: float
    named: float
    ended: float
    left: int
    """Processes, afterwards."""
    line: str

    def __str__(self) -> str:
        return (
            f"named after {self.named:.2f} s, ended after {self.ended:.2f} s, of {self.patience:g} allowed; "
            f"{self.left} left\n    {self.line}"
        )


def hang(folder: Path, patience: float = 5.0) -> Hang:
    """M7."""
    with Run(folder, "--hang_timeout", str(patience)) as run:
        run.wait_for(5)
        workers = run.workers()
        os.kill(workers[1], signal.SIGSTOP)
        began = time.monotonic()
        while "has not moved" not in run.said.read_text(encoding="utf-8") and time.monotonic() - began < 60:
            time.sleep(0.02)
        named = time.monotonic() - began
        run.process.wait(60)
        ended = time.monotonic() - began
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        line = next(line for line in run.said.read_text(encoding="utf-8").splitlines() if "has not moved" in line)
    return Hang(patience, named, ended, len(left), line)


class Stop(NamedTuple):
    """SIGTERM."""

    code: int
    seconds: float
    lost: int

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.2f} s; {self.lost} steps lost"


def stop(folder: Path) -> Stop:
    """M10."""
    with Run(folder) as run:
        run.wait_for(SAVE_STEPS + 7)
        run.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = run.process.wait(60)
        seconds = time.monotonic() - began
        result = json.loads((run.out / "run/result.json").read_text(encoding="utf-8"))
        lost = run.step() - int(str(result["last_checkpoint"]).rpartition("-")[2])
    return Stop(code, seconds, lost)


def main(words: Sequence[str]) -> int:
    """All of them, a line each."""
    kills = int(words[0]) if words else 30
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        print("recovery:", recovery(root / "recovery", kills), flush=True)
        print("goodput:", goodput(root / "goodput"), flush=True)
        print("hang:", hang(root / "hang"), flush=True)
        print("signal:", stop(root / "signal"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
