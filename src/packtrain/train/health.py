"""Sick numbers: what a step's loss and gradient norm say about it, which rows are to blame, and what is done.

    Policy      what the flags ask for
    Spikes      the running estimate: how large a loss or a norm may be
    Health      reads every step's numbers, the same on all ranks; keeps run/suspects.jsonl; decides
    Sick        a step that something is wrong with, and the decision; RollBack is raised for one

The device has refused the update already (train/step.py); here is decided how the run goes on.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from packtrain import log
from packtrain.batch import queued
from packtrain.data.loader import Loader
from packtrain.optim import LOWEST_SCALE
from packtrain.train.metrics import finite_or_none
from packtrain.train.step import NO_LABELS, NOT_FINITE, SPIKE, Guard

Action = Literal["ignore", "warn", "stop", "skip", "rollback"]

WINDOW, FEWEST = 128, 20
"""Steps behind the estimate, at most and at least."""

SIGMAS, FACTOR = 6.0, 2.0
"""A spike is so many robust deviations of the logarithm above its median, and above so many times the median."""

LAG = 2
"""A step's limits are of the steps up to the second before it: what the host of a GPU has read by then."""

IN_A_ROW = 5
"""Skips or rollbacks of steps in a row after which the numbers are no accident."""

SHOWN = 5
"""Rows named in the log; run/suspects.jsonl has all."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is done about a step that is not finite, and about one that stands out."""

    on_nonfinite: Action = "stop"
    on_spike: Action = "warn"
    most_skips: int = 20
    """Steps skipped or rolled back in the whole run; one more ends it."""
    rollback_steps: int = 50
    """How often a state to roll back to is kept."""

    @property
    def keeps_states(self) -> bool:
        """Whether something may be rolled back."""
        return "rollback" in (self.on_nonfinite, self.on_spike)

    def guard(self, limits: tuple[float, float], device: torch.device) -> Guard:
        """What the device decides before a step's update, so that the host may read of it later."""
        known = math.isfinite(max(limits))
        return Guard(
            latches=self.on_nonfinite != "skip",
            limits=queued(torch.tensor(limits, dtype=torch.float64), device) if known else None,
            refuses_spikes=self.on_spike in ("stop", "skip", "rollback"),
            spikes_latch=self.on_spike in ("stop", "rollback"),
        )


@dataclass(frozen=True, slots=True)
class Numbers:
    """A step's figures on the host, the same on every rank."""

    step: int
    loss: float
    norm: float
    scale: float
    """fp16's loss scale, or 1."""
    verdict: int
    """Of train/step.py."""
    agreed: Sequence[float]
    """The step vector."""
    memory: Sequence[float]
    """GiB of each rank."""
    losses: Sequence[Sequence[float]]
    """By rank and micro-batch: sums of token losses."""
    limits: tuple[float, float]
    """Above which loss and norm were a spike."""

    @property
    def finite(self) -> bool:
        """Loss and gradient norm are numbers."""
        return not self.verdict & NOT_FINITE

    @property
    def spike(self) -> bool:
        """They are, and stand out."""
        return bool(self.verdict & SPIKE)


@dataclass(frozen=True, slots=True)
class Sick:
    """A step with something wrong, in words; `rows` are those that may have caused it."""

    step: int
    action: Action
    text: str
    rows: tuple[int, ...]


class RollBack(Exception):
    """A step's numbers ask for it; raised where they are read."""

    def __init__(self, sick: Sick) -> None:
        super().__init__(sick.text)
        self.sick = sick


class Spikes:
    """How large loss and gradient norm have been: median and median deviation of their logarithms."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + LAG)

    def add(self, step: int, loss: float, norm: float) -> None:
        """Take in a step that was well."""
        self._seen.append((step, loss, norm))

    def limits(self, step: int) -> tuple[float, float]:
        """The largest loss and norm of this step that are no spike; infinity until enough has been seen."""
        known = [figures for at, *figures in self._seen if at <= step - LAG][-WINDOW:]
        if len(known) < FEWEST:
            return math.inf, math.inf
        loss, norm = (_limit(column) for column in zip(*known, strict=True))
        return loss, norm

    def state(self) -> list[list[float]]:
        """For a checkpoint: its steps go on with the same limits."""
        return [list(entry) for entry in self._seen]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """What `state` gave."""
        self._seen.clear()
        self._seen.extend((int(step), loss, norm) for step, loss, norm in state)


def _limit(values: Sequence[float]) -> float:
    logs = [math.log(max(value, 1e-30)) for value in values]
    middle = median(logs)
    deviation = 1.4826 * median(abs(value - middle) for value in logs)  # a normal distribution's standard deviation
    return math.exp(middle + max(SIGMAS * deviation, math.log(FACTOR)))


class Health:
    """One run's. `suspects`: the file on the rank that writes, None on the others."""

    def __init__(self, policy: Policy, train: Loader, suspects: Path | None) -> None:
        self.policy, self.spikes = policy, Spikes()
        self._train, self._file = train, suspects
        self.treated: list[int] = []
        """Steps that were skipped or rolled back, in the order of time."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON keeps it."""
        return {"spikes": self.spikes.state(), "treated": list(self.treated), "left_out": self._train.left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.spikes.restore(state["spikes"])
        self.treated = list(state["treated"])
        self._train.leave_out(state["left_out"])

    def judge(self, numbers: Numbers) -> tuple[dict[str, Any] | None, Sick | None]:
        """Take in a step's numbers: (an event for metrics.jsonl, what is wrong), None where there is nothing to say.

        With fp16 an overflow is answered by a smaller scale, until there is none.
        """
        at = {"step": numbers.step}
        if numbers.verdict & NO_LABELS:
            return {"event": "no_labels", **at}, None
        if not numbers.finite and numbers.scale > LOWEST_SCALE:
            return {"event": "overflow", **at, "scale": numbers.scale}, None
        sick = self._sick(numbers)
        if sick is None:
            return None, None
        kind = "spike" if numbers.finite else "not_finite"
        figures = {"loss": numbers.loss, "grad_norm": numbers.norm, "action": sick.action}
        return {"event": kind, **at, **figures}, sick

    def _sick(self, numbers: Numbers) -> Sick | None:
        """The decision; the log and the file have it too."""
        if numbers.finite and not numbers.spike:
            self.spikes.add(numbers.step, numbers.loss, numbers.norm)
            return None
        action = self.policy.on_spike if numbers.finite else self.policy.on_nonfinite
        if numbers.finite and action in ("ignore", "warn"):
            self.spikes.add(numbers.step, numbers.loss, numbers.norm)  # it was taken: the next one is no surprise
        if action == "ignore":
            return None
        what = _what(numbers)
        if action in ("skip", "rollback") and (spent := self._spent(numbers.step)):
            action, what = "stop", f"{what}; {spent}"
        found = self._suspects(numbers)
        self._write(numbers, found, action)
        rows = tuple(row for _, _, rows in found for row in rows)
        flag = "--on_spike" if numbers.finite else "--on_nonfinite"
        text = f"{what}. Suspected: {self._named(found)}. {CONSEQUENCE[action].format(flag=flag)}"
        if action != "stop":
            log.warn(text)
        return Sick(numbers.step, action, text, rows)

    def _spent(self, step: int) -> str:
        """Why this step may not be skipped too, or nothing."""
        self.treated.append(step)
        if len(self.treated) > self.policy.most_skips:
            return f"{self.policy.most_skips} steps were skipped or rolled back before (--max_skipped_steps)"
        last = self.treated[-IN_A_ROW - 1 :]
        if len(last) > IN_A_ROW and last[-1] - last[0] <= IN_A_ROW:
            return f"so were the {IN_A_ROW} before it, which is no accident of a sample"
        return ""

    def _suspects(self, numbers: Numbers) -> list[tuple[int, int, list[int]]]:
        """(rank, micro-batch, its rows) of those whose own loss is sick; of all if none is."""
        step = self._train.rows_of(numbers.step - 1)
        places = [(r, m, rows) for r, parts in enumerate(step) for m, rows in enumerate(parts) if rows]
        found = [place for place in places if self._stands_out(numbers, self._mean(numbers, *place))]
        return found or places

    def _stands_out(self, numbers: Numbers, mean: float) -> bool:
        return not math.isfinite(mean) or (numbers.spike and mean > numbers.limits[0])

    def _mean(self, numbers: Numbers, rank: int, part: int, rows: list[int]) -> float:
        """A micro-batch's loss; NaN and infinity stay what they are."""
        return numbers.losses[rank][part] / max(1, self._train.labels(rows))

    def _named(self, found: list[tuple[int, int, list[int]]]) -> str:
        """For example "train.csv rows 7, 9 (rank 1, micro-batch 2)"."""
        named, left = [], SHOWN
        for rank, part, rows in found:
            if left > 0:
                shown = ", ".join(str(self._train.origin(row)[1]) for row in rows[:left])
                more = ", ..." if len(rows) > left else ""
                place = f"rank {rank}, micro-batch {part + 1}"
                named.append(f"{self._train.origin(rows[0])[0]} row {shown}{more} ({place})")
                left -= len(rows)
        total = sum(len(rows) for _, _, rows in found)
        return "; ".join(named) + (f"; {total} rows in all, listed in run/suspects.jsonl" if left < 0 else "")

    def _write(self, numbers: Numbers, found: list[tuple[int, int, list[int]]], action: Action) -> None:
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as out:
            for rank, part, rows in found:
                line = {
                    "step": numbers.step,
                    "reason": _reason(numbers),
                    "action": action,
                    "rank": rank,
                    "micro_batch": part + 1,
                    "rows": [dict(zip(("file", "row"), self._train.origin(row), strict=True)) for row in rows],
                    "loss": finite_or_none(self._mean(numbers, rank, part, rows)),
                    "step_loss": finite_or_none(numbers.loss),
                    "grad_norm": finite_or_none(numbers.norm),
                }
                out.write(json.dumps(line) + "\n")


CONSEQUENCE: dict[Action, str] = {
    "warn": "The step was taken; {flag} skip would leave out such an update",
    "stop": "That update was not taken. Lower --lr, use --gradient_clipping, look at these rows, or go on without the "
    "step: {flag} skip or rollback",
    "skip": "This update is not taken, the run goes on",
    "rollback": "The run goes back to its last good state, and on without these rows",
}


def _reason(numbers: Numbers) -> str:
    if numbers.finite:
        return "loss spike" if numbers.loss > numbers.limits[0] else "gradient spike"
    return "loss not finite" if not math.isfinite(numbers.loss) else "gradient not finite"


def _what(numbers: Numbers) -> str:
    """The finding, in a sentence."""
    if not numbers.finite:
        return f"step {numbers.step}: the loss ({numbers.loss}) or the gradient norm ({numbers.norm}) is not finite"
    loss, norm = numbers.limits
    return (
        f"step {numbers.step}: a spike: loss {numbers.loss:.4g} (expected below {loss:.4g}), gradient norm "
        f"{numbers.norm:.4g} (expected below {norm:.4g})"
    )
