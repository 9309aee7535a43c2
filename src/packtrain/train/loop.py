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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from packtrain.batch import Batch
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place
from packtrain.errors import Fault, Stopped
from packtrain.optim import LOWEST_SCALE, Optimizer
from packtrain.train.evaluate import evaluate
from packtrain.train.interrupt import Interrupt
from packtrain.train.metrics import Averages, MetricsFile, finite_or_none, memory_gb, perplexity
from packtrain.train.progress import Bar
from packtrain.train.step import INPUTS, LABELS, STOP, VECTOR, StepReport, step_vector, train_step
from packtrain.train.watch import Watch


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
    """Checkpoint every so many steps and at the end; 0: wherever the loop evaluates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sinks:
    """Where what happens goes. `save` and `checkpoint` are collective: every rank calls them at the same steps."""

    metrics: MetricsFile
    save: Callable[[bool], float] | None
    """The model as others read it, with whether it is the best; returns seconds."""
    note: Callable[..., None]
    """Facts for result.json."""
    checkpoint: Callable[[dict[str, Any], bool], float] | None = None
    """What the run needs to go on, given `state()` and whether steps are still to come; returns seconds."""


class _Pending:
    """A step's report on its way to the host: a copy queued behind the step, waited for only when it is read."""

    def __init__(self, step: int, lr: float, report: StepReport) -> None:
        self.step, self.lr = step, lr
        figures = torch.stack([report.loss, report.grad_norm, report.scale])
        numbers = torch.cat([figures, report.agreed, report.memory])
        self._host = numbers.to("cpu", non_blocking=True)
        self._copied = torch.Event(numbers.device) if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> tuple[float, float, float, list[float], list[float]]:
        """(loss, gradient norm, fp16's loss scale or 1, summed step vector, memory of each rank)."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, scale, *rest = self._host.tolist()
        return loss, norm, scale, rest[:VECTOR], rest[VECTOR:]


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
        watch: Watch | None = None,
    ) -> None:
        self.model, self.optimizer, self.place = model, optimizer, place
        self.train, self.validation = train, validation
        self.plan, self.sinks, self.interrupt = plan, sinks, interrupt
        self.watch = watch or Watch()
        self.averages = Averages()
        self.best_loss, self.best_step = math.inf, 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.tokens_total = 0
        self.inputs_total = 0
        self.step_seconds = 0.0
        self.step = self.began = 0
        self._owed = False
        """A stop came where evaluation and saving were due."""
        self._epoch_seconds = 0.0

    def state(self) -> dict[str, Any]:
        """Where the run is, as JSON keeps it: all that `restore` needs beside weights and optimizer."""
        return {
            "step": self.step,
            "sample": self.train.seen(self.step),
            "owed": self._owed,
            "tokens_total": self.tokens_total,
            "inputs_total": self.inputs_total,
            "step_seconds": self.step_seconds,
            "epoch_seconds": time.monotonic() - self._epoch_began,
            "best_step": self.best_step,
            "best_loss": finite_or_none(self.best_loss),
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "averages": asdict(self.averages),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `state`; before `run`."""
        self.step = self.began = state["step"]
        self._owed, self._epoch_seconds = state["owed"], state["epoch_seconds"]
        self.tokens_total, self.inputs_total = state["tokens_total"], state["inputs_total"]
        self.step_seconds, self.best_step = state["step_seconds"], state["best_step"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.first_loss, self.last_loss = state["first_loss"], state["last_loss"]
        self.averages = Averages(**state["averages"])

    def run(self) -> None:
        """All steps. Raises `Stopped`, after saving, when a signal asked for it, `Fault` when a loss is not finite."""
        self.model.train()
        with Bar(self.plan.total_steps) as self.bar:
            if self.plan.eval_first and self.validation is not None and self.step == 0:
                self._evaluate(0)
            self._mark = time.monotonic()
            self._epoch_began = self._mark - self._epoch_seconds
            if self._owed:
                self._pause(self.step, stop=False)
            self._steps()
        if self.step < self.plan.total_steps or self._owed:
            name = self.interrupt.signal.name if self.interrupt.signal else "a signal on another rank"
            again = "; the same command goes on from there" if self.sinks.checkpoint is not None else ""
            raise Stopped(f"stopped by {name} after step {self.step} of {self.plan.total_steps}{again}")

    def _steps(self) -> None:
        """Queue a step, then read the one before it; pause where something is due."""
        behind = 1 if self.place.device.type == "cuda" else 0
        pending: deque[_Pending] = deque()
        for step, batches in self._batches():
            lr = self.plan.lr(step)
            self.optimizer.set_lr(lr)
            with self.watch.step(step, batches):
                pending.append(_Pending(step, lr, self._step(batches)))
            stop = len(pending) > behind and self._read(pending.popleft())
            if stop or self._due(step) or self._checkpoint_due(step):
                while pending:
                    stop = self._read(pending.popleft()) or stop
                self._pause(step, stop=stop)
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
        loss, norm, scale, agreed, memory = pending.read()
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
            self._not_finite(pending.step, loss, norm, scale)
        if math.isfinite(loss):
            self.averages.step(loss, labels)
        if self._ends_epoch(pending.step):
            self.averages.end_epoch(now - self._epoch_began)
            self._epoch_began = now
        return bool(agreed[STOP] > 0)

    def _not_finite(self, step: int, loss: float, norm: float, scale: float) -> None:
        """A fault; but with fp16 an overflow was skipped and a smaller scale answers it, until there is none."""
        if scale > LOWEST_SCALE:
            self.sinks.metrics.write(event="overflow", step=step, scale=scale)
            return
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

    def _checkpoint_due(self, step: int) -> bool:
        if self.sinks.checkpoint is None or step == self.began:
            return False
        every = self.plan.save_steps
        return step == self.plan.total_steps or (step % every == 0 if every else self._due(step))

    def _pause(self, step: int, *, stop: bool) -> None:
        """Evaluate and save: the last state always, the best one when it is. A stop leaves no time to evaluate.

        The checkpoint comes last, so that it knows all that was done; or, at a stop, first, and is told what was not.
        """
        due = self._due(step)
        self._owed = due and stop and self.sinks.checkpoint is not None
        seconds = self._checkpoint() if stop else 0.0
        best = due and not stop and self.validation is not None and self._evaluate(step)
        if (due or stop) and self.sinks.save is not None:
            seconds += self.sinks.save(best)
            self.sinks.note(saved_step=step)
        if self._ends_epoch(step) and self.averages.train and not self._owed:
            evaluated = self.averages.evals[-1] if not stop and self.averages.evals else None
            self.sinks.metrics.epoch(step, self.averages.train[-1], evaluated)
        if not stop and self._checkpoint_due(step):
            seconds += self._checkpoint()
        if seconds:
            self.averages.save_seconds.append(seconds)
        self._mark = time.monotonic()

    def _checkpoint(self) -> float:
        goes_on = self.step < self.plan.total_steps
        return 0.0 if self.sinks.checkpoint is None else self.sinks.checkpoint(self.state(), goes_on)

    def _evaluate(self, step: int) -> bool:
        """Validation loss at a step; True if it is the lowest so far (step 0, untrained, never is)."""
        assert self.validation is not None
        loss, batches = evaluate(self.model, self.validation, self.place, self.plan.max_eval_batches)
        self.sinks.metrics.evaluation(step, loss, batches)
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
