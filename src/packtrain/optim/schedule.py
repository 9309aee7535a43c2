"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULERS = ("gamma", "constant", "linear", "cosine")


def schedule(
    scheduler: str, *, total_steps: int, warmup_steps: int, steps_per_epoch: int, gamma: float
) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step, which counts from 1.

    Warm-up rises from 1/warmup_steps to 1. Then `gamma` is gamma to the number of finished epochs (llama-recipes'
    StepLR, warmed up or not), `constant` 1, `linear` and `cosine` fall so that the step after the last one would be 0.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown schedule {scheduler!r}; there are {', '.join(SCHEDULERS)}")

    def factor(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        if scheduler == "gamma":
            return float(warm * gamma ** ((step - 1) // steps_per_epoch))
        if scheduler == "constant" or step <= warmup_steps:
            return warm
        done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
        return 1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor
