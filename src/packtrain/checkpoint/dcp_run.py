"""A run's checkpoints: what is in one besides tensors, which of them stay, and how a run goes on from one.

    Checkpoints     save after a step; restore before the first
    Resumed         where a checkpoint says that its run is

`state.json` has the place (step, rows taken), counts and averages, fingerprints of settings, data and weights, and the
versions of what computed. The learning rate is a function of the step, and so are order and dropout, with the seed.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from packtrain import __version__, log
from packtrain.checkpoint import dcp, dcp_folder
from packtrain.checkpoint.dcp_folder import STATE, StepFolder
from packtrain.checkpoint.hf import ADAPTER_CONFIG
from packtrain.checkpoint.publish import CONFIG
from packtrain.distributed.place import Place
from packtrain.optim import Optimizer


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
        return cls(folder=folder, state=dcp_folder.read_state(folder))

    def remarks(self, world_size: int) -> list[str]:
        """Why it is the same run and yet not the same bits."""
        then = {"ranks": self.state["ranks"], **self.state["versions"]}
        now = {"ranks": world_size, **versions()}
        return [f"{name}: {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]


class Checkpoints:
    """Saves and restores model and optimizer; every rank has one, and calls it at the same steps.

    `config` is adapter_config.json's content, or with `adapter` False config.json's; `facts` go into every state.json.
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
    ) -> None:
        self._root, self._model, self._optimizer = root, model, optimizer
        self._place, self._group, self._adapter, self._kind = place, group, adapter, kind
        self._config, self._facts = config, facts

    def save(self, state: Mapping[str, Any], *, optimizer: bool) -> Path:
        """Write what a run is after `state["step"]`; returns the folder. Without `optimizer` no step can follow.

        The newest one stays, and the one of `state["best_step"]` if there is one.
        """
        step = int(state["step"])
        rows = dcp.rows_of(self._model, self._optimizer if optimizer else None, adapter=self._adapter)
        written = {
            **state,
            **self._facts,
            "optimizer": optimizer,
            "ranks": self._place.world_size,
            "versions": versions(),
            "written_at": time.time(),
        }

        def finish(folder: StepFolder) -> None:
            folder.write_json(STATE, written)
            folder.write_json(ADAPTER_CONFIG if self._adapter else CONFIG, self._config)

        weights = "adapter_model" if self._adapter else "model"
        dcp.save(self._root, step, rows, finish, group=self._group, kind=self._kind, weights=weights)
        if self._place.rank == 0:
            dcp_folder.keep_only(self._root, {step, int(state.get("best_step") or step)})
        return self._root / dcp_folder.name_of(step)

    def restore(self, resumed: Resumed) -> None:
        """Give model and optimizer a checkpoint's values."""
        optimizer = self._optimizer if resumed.state["optimizer"] else None
        rows = dcp.rows_of(self._model, optimizer, adapter=self._adapter)
        dcp.load(resumed.folder, rows, group=self._group)
        log.say(f"goes on from {resumed.folder}, after step {resumed.step}")
        for line in resumed.remarks(self._place.world_size):
            log.say(f"{line}: the same run, not to the last bit")
