"""What the parts of `python -m bench.multi_gpu` are made with, and what comes of one.

Size, Tolerance     GPUS and DRY: shapes, lengths, learning rates, time limits, what is the same
Plan                a size, a machine, numbers of GPUs; flags that all runs have; MFU
Part                a table, a line of the summary
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.runs import Machine
from bench.shapes import LLAMA_8B, LLAMA_70B, SMALL, TINY, step_flops
from packtrain.train.flops import peak

RANK = 16
"""Of every LoRA."""


@dataclass(frozen=True)
class Tolerance:
    """Differences, relative, up to which two runs are the same."""

    loss: float
    norm: float
    curve: float
    """Of any loss of the run."""


@dataclass(frozen=True)
class Size:
    """What differs between GPUs and the dry run."""

    small: dict[str, Any]
    middle: dict[str, Any]
    large: dict[str, Any]
    document: int
    """Tokens of a document of part 1."""
    length: int
    """Tokens of a row of the others; of a GPU's step there are 2, in part 3 one."""
    rates: tuple[float, float]
    """Learning rates of part 1, LoRA's and full's: the loss falls to the last step, so that places can be told."""
    tolerance: Tolerance
    limits: tuple[float, float, float, float]
    """Seconds a run of each part may take."""
    whole: bool
    """Else part 1 has LoRA with every strategy, all other kinds with FULL_SHARD, and part 2 has no float8."""
    steps: int
    """Of part 2."""
    saving_steps: int
    """Of part 4, where it is not killed: more than its checkpoint takes to be written."""


GPUS = Size(
    small=SMALL,
    middle=LLAMA_8B,
    large=LLAMA_70B,
    document=512,
    length=4096,
    rates=(3e-3, 3e-5),
    tolerance=Tolerance(loss=1e-3, norm=1e-2, curve=5e-3),
    limits=(120, 150, 240, 240),
    whole=True,
    steps=20,
    saving_steps=60,
)
DRY = Size(
    small=TINY,
    middle=TINY,
    large=TINY,
    document=32,
    length=64,
    rates=(3e-3, 3e-3),
    tolerance=Tolerance(loss=1e-5, norm=1e-4, curve=1e-3),
    limits=(60, 60, 60, 60),
    whole=False,
    steps=13,
    saving_steps=400,
)


@dataclass(frozen=True)
class Plan:
    """What the parts are made with."""

    size: Size
    machine: Machine
    counts: Sequence[int]
    """Of GPUs; the last is the most."""
    gpu: str
    """torch's name of one; "" for a CPU."""

    @property
    def most(self) -> int:
        return self.counts[-1]

    def words(self, shape: dict[str, Any], *, rows: int, length: int, context: int, batch: int) -> list[str]:
        """Flags that all runs have; the first two are the model."""
        file = self.machine.folder / f"{shape['hidden_size']}-{shape['num_hidden_layers']}.json"
        file.write_text(json.dumps(shape), encoding="utf-8")
        words = f"--random_init {file} --dataset synthetic_dataset --run_validation False --save_model False"
        words += f" --synthetic_dataset.rows {rows} --synthetic_dataset.length {length} --num_epochs 1"
        return [*words.split(), "--context_length", str(context), "--batch_size_training", str(batch)]

    def mfu(self, shape: dict[str, Any], flags: Sequence[str], rate: float) -> str:
        """Of the 16-bit peak, in float8 too, at so many tokens/s of a GPU."""
        length, top = self.size.length, peak(self.gpu)
        tera = step_flops(shape, length, RANK if "--use_peft" in flags else None) / length * rate / 1e12
        return f"{tera / top:.1%}" if top else f"{tera:.3g} TFLOP/s"


@dataclass(frozen=True)
class Part:
    """What came of one."""

    title: str
    head: str
    rows: list[str]
    summary: str
    good: bool
