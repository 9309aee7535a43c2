"""When: step, read the report, log, evaluate, save, stop. What each of them is lives elsewhere.

    Plan        the numbers that decide when (steps, evaluations, learning rate)
    Loop        one run's training, from a first step to a last; `run` is the story

A step's report is read after the next step has been queued, so that the host never waits for the device; before
an evaluation, a save or the end it is read at once. All ranks read the same summed numbers, so all of them
stop, evaluate and save at the same step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from packtrain.batch import Batch
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place
from packtrain.errors import Fault, Stopped
from packtrain.optim import Optimizer
from packtrain.train.evaluate import evaluate
from packtrain.train.interrupt import Interrupt
from packtrain.train.metrics import Averages, MetricsFile, memory_gb, perplexity
from packtrain.train.progress import Bar
from packtrain.train.step import INPUTS, LABELS, STOP, VECTOR, StepReport, step_vector, train_step


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinks:
    """Where what happens goes. `save(best)` is collective: every rank calls it; it returns its seconds."""

    metrics: MetricsFile
    save: Callable[[bool], float] | None
    note: Callable[..., None]
    """Facts for result.json."""


class _Pending:
    """A step's report on its way to the host: a copy queued behind the step, waited for only when it is read."""

    def __init__(self, step: int, lr: float, report: StepReport) -> None:
        self.step, self.lr = step, lr
        numbers = torch.cat([report.loss[None], report.grad_norm[None], report.agreed, report.memory])
        self._host = numbers.to("cpu", non_blocking=True)
        self._copied = torch.Event(numbers.device) if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> tuple[float, float, list[float], list[float]]:
        """(loss, gradient norm, summed step vector, memory of each rank)."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, *rest = self._host.tolist()
        return loss, norm, rest[:VECTOR], rest[VECTOR:]


class Loop:
    """Training of one run on one rank. `validation` None: no evaluation."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train: Loader,
        validation: Loader | None,
        *,
        place: Place,
        plan: Plan,
        sinks: Sinks,
        interrupt: Interrupt,
    ) -> None:
        self.model, self.optimizer, self.place = model, optimizer, place
        self.train, self.validation = train, validation
        self.plan, self.sinks, self.interrupt = plan, sinks, interrupt
        self.averages = Averages()
        self.best_loss, self.best_step = math.inf, 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.tokens_total = 0
        self.inputs_total = 0
        self.step_seconds = 0.0
        self.step = 0

    def run(self) -> None:
        """All steps. Raises `Stopped`, after saving, when a signal asked for it, `Fault` when a loss is not finite."""
        self.model.train()
        with Bar(self.plan.total_steps) as self.bar:
            if self.plan.eval_first and self.validation is not None:
                self._evaluate(0)
            self._epoch_began = self._mark = time.monotonic()
            self._steps()
        if self.step < self.plan.total_steps:
            name = self.interrupt.signal.name if self.interrupt.signal else "a signal on another rank"
            raise Stopped(f"stopped by {name} after step {self.step} of {self.plan.total_steps}")

    def _steps(self) -> None:
        """Queue a step, then read the one before it; pause where something is due."""
        behind = 1 if self.place.device.type == "cuda" else 0
        pending: deque[_Pending] = deque()
        for step, batches in self._batches():
            lr = self.plan.lr(step)
            self.optimizer.set_lr(lr)
            pending.append(_Pending(step, lr, self._step(batches)))
            stop = len(pending) > behind and self._read(pending.popleft())
            if stop or self._due(step):
                while pending:
                    stop = self._read(pending.popleft()) or stop
                self._pause(step, evaluates=not stop)
            if stop:
                return

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches on the device), made ahead by one thread."""
        steps = range(self.step + 1, self.plan.total_steps + 1)
        if self.plan.prefetch == 0:
            for step in steps:
                yield step, [batch.to(self.place.device) for batch in self.train.step(step - 1)]
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            queue = {s: pool.submit(self.train.step, s - 1) for s in list(steps)[: self.plan.prefetch]}
            for step in steps:
                ahead = step + self.plan.prefetch
                if ahead <= self.plan.total_steps:
                    queue[ahead] = pool.submit(self.train.step, ahead - 1)
                yield step, [batch.to(self.place.device) for batch in queue.pop(step).result()]

    def _step(self, batches: list[Batch]) -> StepReport:
        device = self.place.device
        return train_step(
            self.model,
            batches,
            step_vector(batches, self.interrupt.asked, device),
            self.optimizer,
            self.place,
            clip=self.plan.clip,
            memory=lambda: memory_gb(device),
        )

    def _read(self, pending: _Pending) -> bool:
        """Wait for a step's numbers and write them down; True if the run is to stop after it."""
        loss, norm, agreed, memory = pending.read()
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        labels, inputs = int(agreed[LABELS]), int(agreed[INPUTS])
        self.step = pending.step
        self.tokens_total += labels
        self.inputs_total += inputs
        self.step_seconds += seconds
        self.last_loss = loss
        self.sinks.metrics.write(
            step=pending.step,
            epoch=pending.step / self.train.steps_per_epoch,
            loss=loss,
            grad_norm=norm,
            lr=pending.lr,
            tokens=labels,
            tokens_total=self.tokens_total,
            step_time=seconds,
            tokens_per_second=inputs / seconds,
            memory_gb=max(memory),
        )
        self.sinks.note(step=pending.step)
        left = self.step_seconds / self.step * (self.plan.total_steps - self.step)
        self.bar.update(pending.step, loss, inputs / seconds, left)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(pending.step, loss, norm)
        self.averages.step(loss, labels)
        if self._ends_epoch(pending.step):
            self.averages.end_epoch(now - self._epoch_began)
            self._epoch_began = now
        return bool(agreed[STOP] > 0)

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        self.sinks.metrics.write(event="not_finite", step=step, loss=loss, grad_norm=norm)
        if self.sinks.save is not None:
            self.sinks.save(False)
        raise Fault(
            f"step {step}: the loss ({loss}) or the gradient norm ({norm}) is not finite. That update and later ones "
            "were not taken; the weights as they were before it are saved. Lower --lr, use --gradient_clipping, or "
            "look at the step's rows"
        )

    def _ends_epoch(self, step: int) -> bool:
        return step % self.train.steps_per_epoch == 0 or step == self.plan.total_steps

    def _due(self, step: int) -> bool:
        """Whether the loop pauses after this step to evaluate and save."""
        return self._ends_epoch(step) or bool(self.plan.eval_steps and step % self.plan.eval_steps == 0)

    def _pause(self, step: int, *, evaluates: bool) -> None:
        """Evaluate, then save: the last state always, the best one when it is. A stop leaves no time to evaluate."""
        best = evaluates and self.validation is not None and self._evaluate(step)
        if self.sinks.save is not None:
            self.averages.save_seconds.append(self.sinks.save(best))
            self.sinks.note(saved_step=step)
        self._mark = time.monotonic()

    def _evaluate(self, step: int) -> bool:
        """Validation loss at a step; True if it is the lowest so far (step 0, untrained, never is)."""
        assert self.validation is not None
        loss = evaluate(self.model, self.validation, self.place, self.plan.max_eval_batches)
        self.sinks.metrics.evaluation(step, loss)
        text = f"step {step}: eval_loss {loss:.4f}, perplexity {perplexity(loss):.3f}"
        if step == 0:
            self.first_loss = loss
            self._say(text)
            return False
        self.averages.evals.append(loss)
        best = loss < self.best_loss
        if best:
            self.best_loss, self.best_step = loss, step
            self.sinks.note(best_eval_loss=loss, best_step=step)
        self._say(text + (" (best)" if best else ""))
        return best

    def _say(self, text: str) -> None:
        self.bar.note(text)
