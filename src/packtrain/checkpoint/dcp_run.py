"""A run's checkpoints: what is in one besides tensors, which of them stay, and how a run goes on from one.

    Checkpoints     save after a step, beside the training; restore before the first
    Resumed         where a checkpoint says that its run is

`state.json` has the place (step, rows taken), counts and averages, fingerprints of settings, data and weights, and the
versions of what computed. The learning rate is a function of the step, and so are order and dropout, with the seed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from packtrain import __version__, log
from packtrain.checkpoint import dcp, dcp_folder
from packtrain.checkpoint.background import Background
from packtrain.checkpoint.dcp_folder import DONE, STATE, StepFolder
from packtrain.checkpoint.hf import ADAPTER_CONFIG
from packtrain.checkpoint.host_copy import HostCopy, Taken
from packtrain.checkpoint.publish import CONFIG
from packtrain.distributed.place import Place
from packtrain.errors import PacktrainError
from packtrain.optim import Optimizer

LAST_SECONDS = 600.0
"""How long a run that ends by an error waits for the checkpoint that is being written."""


def versions() -> dict[str, str]:
    """Of what decides the bits."""
    return {"packtrain": __version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """A checkpoint to go on from."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """The last step taken."""
        return int(self.state["step"])

    @property
    def step_items(self) -> int:
        """Rows, or packs, of a step on all ranks."""
        return int(self.state["step_items"])

    @classmethod
    def read(cls, folder: Path) -> Resumed:
        """From a verified folder."""
        dcp_folder.wait_until_seen(folder / DONE)
        return cls(folder=folder, state=dcp_folder.read_state(folder))

    def changed(self, fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All that was changed on the run's way, then and now: after_step, name, was, now."""
        then = self.state["fingerprint"]
        return [
            *self.state.get("changed", []),
            *(
                {"after_step": self.step, "name": name, "was": then.get(name), "now": fingerprint.get(name)}
                for name in {**then, **fingerprint}
                if then.get(name) != fingerprint.get(name)
            ),
        ]

    def remarks(self, world_size: int) -> list[str]:
        """Why it is the same run and yet not the same bits."""
        then = {"ranks": self.state["ranks"], **self.state["versions"]}
        now = {"ranks": world_size, **versions()}
        return [f"{name}: {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]


class Checkpoints:
    """Saves and restores model and optimizer; every rank has one, and calls it at the same steps.

    `config` is adapter_config.json's content, or with `adapter` False config.json's; `facts` go into every state.json.
    The `keep` newest stay (0: all), and the best one; `note` is told `last_checkpoint` once that counts.
    """

    def __init__(
        self,
        root: Path,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        place: Place,
        group: ProcessGroup,
        adapter: bool,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        kind: dcp.Kind,
        keep: int = 1,
        keep_optimizer: bool = False,
        note: Callable[..., None] = lambda **_: None,
    ) -> None:
        self._root, self._model, self._optimizer = root, model, optimizer
        self._place, self._group, self._adapter, self._kind = place, group, adapter, kind
        self._config, self._facts, self._keep, self._note = config, facts, keep, note
        self._keep_optimizer = keep_optimizer
        self._copies, self._background = HostCopy(place.local_world_size), Background()
        self._writing = 0
        """The step that the background writes, or wrote last."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, and `settle` has not said so yet."""
        return self._background.failed

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises, on every rank, why it could not be."""
        self._background.wait()

    def prepare(self) -> None:
        """Checkpoints will be written beside the training: take host memory for them beside its first steps."""
        rows = dcp.rows_of(self._model, self._optimizer, adapter=self._adapter)

        def work() -> None:
            self._at_the_device()
            self._copies.prepare(rows)

        self._background.start("checkpoint-memory", work)

    def save(self, state: Mapping[str, Any], *, goes_on: bool, wait: bool) -> float:
        """Keep what a run is after `state["step"]`; returns the seconds for which the training stood still.

        With `wait` the checkpoint is on the disk when this returns, and an error of the one before, which it makes up
        for, is only said. Without, it is written while training goes on: `last_checkpoint` is told when it counts, an
        error raised by `settle` or the next save. One is written at a time; the next waits for it. The optimizer's
        state is left out where no step follows, unless it is to be kept.
        """
        began, step = time.monotonic(), int(state["step"])
        self._end_the_last(step, forgive=wait)
        optimizer = goes_on or self._keep_optimizer
        rows = dcp.rows_of(self._model, self._optimizer if optimizer else None, adapter=self._adapter)
        taken = None if wait else self._copies.take(rows)
        written = {
            **state,
            **self._facts,
            "optimizer": optimizer,
            "ranks": self._place.world_size,
            "versions": versions(),
            "written_at": time.time(),
        }
        if taken is None:
            self._write(written, rows)
        else:
            self._optimizer.hold(taken.event)
            self._writing = step
            self._background.start(f"checkpoint-{step}", lambda: self._write_behind(written, taken))
        return time.monotonic() - began

    def close(self) -> None:
        """A run ends by an error: what is being written is waited for, and what it runs into only said."""
        try:
            if not self._background.wait(LAST_SECONDS) and self._writing:
                log.warn(f"the checkpoint of step {self._writing} is still being written, and is given up")
        except Exception as error:
            log.warn(f"the checkpoint of step {self._writing} was not written: {error}")

    def _end_the_last(self, step: int, *, forgive: bool) -> None:
        began, busy = time.monotonic(), self._background.busy
        try:
            self.settle()
        except PacktrainError as error:
            if not forgive:
                raise
            log.warn(f"{error}; step {step} is saved instead")
        if busy and self._writing and not forgive:
            log.once(
                f"the checkpoint of step {step} waited {time.monotonic() - began:.1f} s for that of step "
                f"{self._writing} to be written: the disk is slower than they are asked for; ask for fewer"
            )

    def _write_behind(self, written: Mapping[str, Any], taken: Taken) -> None:
        """In the background's thread."""
        if taken.event is not None:
            self._at_the_device()
            taken.event.synchronize()
        self._write(written, taken.rows)

    def _at_the_device(self) -> None:
        """A thread begins on the first GPU, and would take memory there."""
        if self._place.device.type == "cuda":
            torch.cuda.set_device(self._place.device)

    def _write(self, written: Mapping[str, Any], rows: Mapping[str, dcp.Rows]) -> None:
        step = int(written["step"])

        def finish(folder: StepFolder) -> None:
            folder.write_json(STATE, written)
            folder.write_json(ADAPTER_CONFIG if self._adapter else CONFIG, self._config)

        def done(_: Path) -> None:
            try:
                dcp_folder.keep_newest(self._root, self._keep, written.get("best_step") or None)
            except OSError as error:
                log.warn(f"{self._root}: an older checkpoint could not be removed ({error})")

        weights = "adapter_model" if self._adapter else "model"
        dcp.save(self._root, step, rows, finish, group=self._group, kind=self._kind, weights=weights, done=done)
        self._note(last_checkpoint=str(self._root / dcp_folder.name_of(step)))

    def restore(self, resumed: Resumed) -> None:
        """Give model and optimizer a checkpoint's values."""
        optimizer = self._optimizer if resumed.state["optimizer"] else None
        rows = dcp.rows_of(self._model, optimizer, adapter=self._adapter)
        dcp.load(resumed.folder, rows, group=self._group)
        log.say(f"goes on from {resumed.folder}, after step {resumed.step}")
        for line in resumed.remarks(self._place.world_size):
            log.say(f"{line}: the same run, not to the last bit")
