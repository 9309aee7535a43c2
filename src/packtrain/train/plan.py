"""What a loop is told: when things happen, and where what happens goes.

Plan        the numbers that decide when (steps, evaluations, learning rate), and what sick ones mean
Sinks       metrics, saves, notes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packtrain.batch import Batch
from packtrain.checkpoint.dcp_run import Checkpoints
from packtrain.train.health import Policy
from packtrain.train.metrics import MetricsFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """When things happen, in optimizer steps from 1."""

    total_steps: int
    eval_steps: int
    """Evaluate every so many steps besides the epochs' ends; 0: only there."""
    eval_first: bool
    max_eval_batches: int
    clip: float | None
    prefetch: int
    """Steps whose batches are made ahead by a thread; 0 makes them when they are needed."""
    lr: Callable[[int], float]
    """Learning rate of a step."""
    save_steps: int = 0
    """Checkpoint every so many steps, and at the end."""
    save_seconds: float = 0.0
    """And when so much time has passed since the last. Both 0: wherever the loop evaluates."""
    policy: Policy = field(default_factory=Policy)
    """What is done about steps whose numbers are sick."""
    splits: bool = False
    """Out of memory in a step, take it again in smaller micro-batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinks:
    """Where what happens goes. `save` and `checkpoints` are collective: every rank calls them at the same steps."""

    metrics: MetricsFile
    save: Callable[[bool], float] | None
    """The model as others read it, with whether it is the best; returns seconds."""
    note: Callable[..., None]
    """Facts for result.json."""
    checkpoints: Checkpoints | None = None
    """What the run needs to go on."""
    suspects: Path | None = None
    """Where the leader lists rows of sick steps."""
    shortage: Callable[[str, Exception, Sequence[Batch]], Exception] | None = None
    """What is raised for a want of memory, given what was being done and over which micro-batches."""
