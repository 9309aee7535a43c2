"""wandb_config: the run's place at Weights & Biases, with `--use_wandb`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """What is told to wandb.init; all of it optional."""

    project: str = "llama_cookbook"
    """The project's name."""

    entity: str | None = None
    """The user or team."""

    job_type: str | None = None
    """The kind of run."""

    tags: tuple[str, ...] | None = None
    """Words to find the run by."""

    group: str | None = None
    """The group of runs that it belongs to."""

    notes: str | None = None
    """A longer description."""

    mode: Literal["online", "offline", "disabled", "shared"] | None = None
    """Whether anything is sent."""
