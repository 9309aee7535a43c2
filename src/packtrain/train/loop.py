"""When: step, read the report, log, evaluate, save, stop. What each of them is lives elsewhere.

    Loop        one run's training, from a first step to a last; `run` is the story

A step's report is read after the next step has been queued, so that the host never waits for the device; before
an evaluation, a save or the end it is read at once. All ranks read the same summed numbers, so all of them
stop, evaluate and save at the same step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from packtrain import log
from packtrain.batch import Batch
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place, is_out_of_memory
from packtrain.errors import Fault, Stopped
from packtrain.optim import Optimizer
from packtrain.train.evaluate import evaluate
from packtrain.train.health import Health, Numbers, RollBack, Sick
from packtrain.train.interrupt import Interrupt
from packtrain.train.invariants import FirstSteps
from packtrain.train.metrics import Averages, finite_or_none, memory_gb, perplexity
from packtrain.train.pending import Mark, Pending
from packtrain.train.plan import Plan, Sinks
from packtrain.train.progress import Bar
from packtrain.train.snapshot import Snapshot
from packtrain.train.step import FAILED, INPUTS, LABELS, SAVE, STOP, StepReport, step_vector, train_step
from packtrain.train.watch import Watch

BEHIND = {"cuda": 1}
"""Steps that are queued on a device before the numbers of an earlier one are waited for."""


class Asked(Flag):
    """What ranks asked for in a step, the same on all of them."""

    NOTHING = 0
    STOP = auto()
    SAVE = auto()
    """A checkpoint, since it is time."""
    SETTLE = auto()
    """To say why an earlier one could not be written."""


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
        first_steps: FirstSteps | None = None,
    ) -> None:
        self.model, self.optimizer, self.place = model, optimizer, place
        self.train, self.validation = train, validation
        self.plan, self.sinks, self.interrupt = plan, sinks, interrupt
        self.watch, self._first_steps = watch or Watch(), first_steps
        self.health = Health(plan.policy, train, sinks.suspects)
        self.snapshot = Snapshot(model, optimizer) if plan.policy.keeps_states else None
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
        self._stopped = False
        self._saved_at = time.monotonic()
        self._epoch_seconds = 0.0
        self._pieces = 1
        """Batches that a micro-batch of this rank comes in, since it was too large for the memory."""
        self._doing: tuple[str, Sequence[Batch]] = ("the start", ())

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
            "health": self.health.state(),
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
        if "health" in state:
            self.health.restore(state["health"])

    def run(self) -> None:
        """All steps. Raises `Stopped`, after saving, when a signal asked for it, `Fault` when a loss is not finite."""
        self.place.heart.at("the begin of training", step=self.step)
        self.model.train()
        with Bar(self.plan.total_steps) as self.bar:
            if self.plan.eval_first and self.validation is not None and self.step == 0 and self._evaluate(0) is None:
                raise Stopped(f"stopped by {self._signal()} before the first step")
            self._mark = Mark(self.place.device)
            self._saved_at = time.monotonic()
            self._epoch_began = self._saved_at - self._epoch_seconds
            try:
                if self._owed:
                    self._pause(self.step, Asked.NOTHING)
                if not self._stopped:
                    self._steps()
            except (RuntimeError, MemoryError) as error:
                if self.sinks.shortage is None or not is_out_of_memory(error):
                    raise
                raise self.sinks.shortage(self._doing[0], error, self._doing[1]) from error
        if self.step < self.plan.total_steps or self._owed:
            again = "; the same command goes on from there" if self.sinks.checkpoints is not None else ""
            raise Stopped(f"stopped by {self._signal()} after step {self.step} of {self.plan.total_steps}{again}")

    def _signal(self) -> str:
        return self.interrupt.signal.name if self.interrupt.signal else "a signal on another rank"

    def _steps(self) -> None:
        """All that are left; again from the last good state if the policy asks for it."""
        if self.snapshot is not None:
            self.snapshot.take(self.state())
        while True:
            try:
                return self._stretch()
            except RollBack as asked:
                sick = asked.sick
            self._roll_back(sick)

    def _stretch(self) -> None:
        """Queue a step, then read the one before it; pause where something is due."""
        behind = BEHIND.get(self.place.device.type, 0)
        pending: deque[Pending] = deque()
        for step, batches in self._batches():
            lr = self.plan.lr(step)
            self.optimizer.set_lr(lr)
            limits = self.health.spikes.limits(step)
            with self.watch.step(step, batches):
                pending.append(Pending(step, lr, limits, self._step(step, batches, limits)))
            asked = self._read(pending.popleft()) if len(pending) > behind else Asked.NOTHING
            holds = self.snapshot is not None and step % self.plan.policy.rollback_steps == 0
            pauses = bool(asked) or self._due(step) or self._checkpoint_due(step)
            checks = self._first_steps is not None and not self._first_steps.done
            while (pauses or holds or checks) and pending:
                asked |= self._read(pending.popleft())
            if pauses or asked:
                self._pause(step, asked)
            if self._stopped:
                return
            if self.snapshot is not None and (pauses or holds):
                self.snapshot.take(self.state())

    def _roll_back(self, sick: Sick) -> None:
        """To the state that is held, and on from there without a step's rows."""
        assert self.snapshot is not None
        began, treated = self.began, self.health.treated
        self.restore(self.snapshot.put_back())
        self.began, self.health.treated = began, treated
        self.train.leave_out(sick.rows)
        self.sinks.metrics.rewind(self.step)
        self.sinks.metrics.write(event="rollback", step=self.step, sick_step=sick.step, left_out=len(sick.rows))
        self._mark = Mark(self.place.device)

    def _batches(self) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches on the device), made ahead by one thread."""
        steps = range(self.step + 1, self.plan.total_steps + 1)
        if self.plan.prefetch == 0:
            for step in steps:
                yield step, [batch.to(self.place.device) for batch in self.train.step(step - 1, self._pieces)]
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            queue = {s: pool.submit(self.train.step, s - 1, self._pieces) for s in list(steps)[: self.plan.prefetch]}
            for step in steps:
                ahead = step + self.plan.prefetch
                if ahead <= self.plan.total_steps:
                    queue[ahead] = pool.submit(self.train.step, ahead - 1, self._pieces)
                yield step, [batch.to(self.place.device) for batch in queue.pop(step).result()]

    def _wishes(self, batches: list[Batch]) -> Tensor:
        """This rank's step vector. Rank 0's clock decides when it is time to save."""
        every, checkpoints = self.plan.save_seconds, self.sinks.checkpoints
        return step_vector(
            batches,
            self.interrupt.asked,
            self.place.device,
            save=self.place.rank == 0 and every > 0 and time.monotonic() - self._saved_at >= every,
            failed=checkpoints is not None and checkpoints.failed,
        )

    def _step(self, step: int, batches: list[Batch], limits: tuple[float, float]) -> StepReport:
        device = self.place.device
        self._doing = f"step {step}", batches
        self.place.heart.at(f"step {step}", step=step, steady=step > self.began + 1)
        splits = self.plan.splits and not isinstance(self.model, FSDPModule)
        return train_step(
            self.model,
            batches,
            self._wishes(batches),
            self.optimizer,
            self.place,
            clip=self.plan.clip,
            memory=lambda: memory_gb(device),
            guard=self.plan.policy.guard(limits, device),
            pieces=len(batches) // self.train.micro_batches(step - 1),
            smaller=(lambda error: self._smaller(step, error)) if splits else None,
        )

    def _smaller(self, step: int, error: Exception) -> list[Batch]:
        """The same rows in twice as many batches, from now on; the error, if no row is left to be parted from another.

        This rank alone does so: the others wait for it where gradients are summed, and the sums stay what they are.
        """
        failed = len(self._doing[1]) // self.train.micro_batches(step - 1)
        if failed >= self.train.most_rows(step - 1):
            raise error
        self._pieces = max(2 * failed, self._pieces)  # this step's may have been made ahead, before it grew
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warn(f"step {step}: out of memory; taken again with each micro-batch in {self._pieces} (--on_oom split)")
        batches = [batch.to(self.place.device) for batch in self.train.step(step - 1, self._pieces)]
        self._doing = f"step {step}", batches
        return batches

    def _read(self, pending: Pending) -> Asked:
        """Wait for a step's numbers and write them down; what is to be done after it."""
        numbers = pending.read()
        loss, norm, agreed, memory = numbers.loss, numbers.norm, numbers.agreed, numbers.memory
        now = time.monotonic()
        seconds, self._mark = pending.ended.since(self._mark), pending.ended
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
        self._judge(numbers)
        if self._first_steps is not None and not numbers.verdict:
            self._first_steps.taken(pending.step, pending.lr)
        if math.isfinite(loss):
            self.averages.step(loss, labels)
        if self._ends_epoch(pending.step):
            self.averages.end_epoch(now - self._epoch_began)
            self._epoch_began = now
        asked = ((Asked.STOP, STOP), (Asked.SAVE, SAVE), (Asked.SETTLE, FAILED))
        return Asked(sum(ask.value for ask, place in asked if agreed[place] > 0))

    def _judge(self, numbers: Numbers) -> None:
        """What follows from a step's numbers. Raises RollBack, or, the weights saved, Fault, as the policy says."""
        event, sick = self.health.judge(numbers)
        if event is not None:
            self.sinks.metrics.write(**event)
        if sick is not None and sick.action == "rollback":
            raise RollBack(sick)
        if sick is not None and sick.action == "stop":
            if self.sinks.save is None:
                raise Fault(sick.text)
            self.sinks.save(False)
            raise Fault(f"{sick.text}. The weights without it are saved")

    def _ends_epoch(self, step: int) -> bool:
        return step % self.train.steps_per_epoch == 0 or step == self.plan.total_steps

    def _due(self, step: int) -> bool:
        """Whether the loop pauses after this step to evaluate and save."""
        return self._ends_epoch(step) or bool(self.plan.eval_steps and step % self.plan.eval_steps == 0)

    def _checkpoint_due(self, step: int, asked: Asked = Asked.NOTHING) -> bool:
        if self.sinks.checkpoints is None or step == self.began:
            return False
        every, by_time = self.plan.save_steps, self.plan.save_seconds > 0
        if step == self.plan.total_steps or Asked.SAVE in asked:
            return True
        return step % every == 0 if every else not by_time and self._due(step)

    def _pause(self, step: int, asked: Asked) -> None:
        """Evaluate and save: the last state always, the best one when it is. A stop leaves no time to evaluate.

        The checkpoint comes last, so that it knows all that was done; or, at a stop, first, and is told what was not.
        A stop's checkpoint makes up for one that could not be written; else that is the end.
        """
        stop = Asked.STOP in asked
        if Asked.SETTLE in asked and not stop and self.sinks.checkpoints is not None:
            self.sinks.checkpoints.settle()
        due = self._due(step)
        best = self._evaluate(step) if due and not stop and self.validation is not None else False
        self._stopped = stop = stop or best is None
        self._owed = due and stop and self.sinks.checkpoints is not None
        seconds = self._checkpoint(wait=True) if stop and step > self.began else 0.0
        if (due or stop) and self.sinks.save is not None:
            self.place.heart.at(f"saving the model after step {step}")
            seconds += self.sinks.save(bool(best))
            self.sinks.note(saved_step=step)
        if self._ends_epoch(step) and self.averages.train and not self._owed:
            evaluated = self.averages.evals[-1] if not stop and self.averages.evals else None
            self.sinks.metrics.epoch(step, self.averages.train[-1], evaluated)
        if not stop and self._checkpoint_due(step, asked):
            seconds += self._checkpoint(wait=step == self.plan.total_steps)
        if seconds:
            self.averages.save_seconds.append(seconds)
        self._mark = Mark(self.place.device)

    def _checkpoint(self, *, wait: bool) -> float:
        """Seconds for which training stood still."""
        self._saved_at = time.monotonic()
        self.place.heart.at(f"the checkpoint of step {self.step}")
        if self.sinks.checkpoints is None:
            return 0.0
        return self.sinks.checkpoints.save(self.state(), goes_on=self.step < self.plan.total_steps, wait=wait)

    def _evaluate(self, step: int) -> bool | None:
        """Validation loss at a step; True if it is the lowest so far (step 0, untrained, never is); None: stopped."""
        assert self.validation is not None
        self._doing = f"the evaluation after step {step} (--val_batch_size {self.validation.batch_size})", ()
        limit = self.plan.max_eval_batches
        found = evaluate(self.model, self.validation, self.place, limit, stop=lambda: self.interrupt.asked)
        if found is None:
            return None
        loss, batches = found
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
