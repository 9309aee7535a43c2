"""A run of a few steps that was stopped half way and goes on, against one that was not.

Compared are every step's loss and gradient norm, and every element of what is saved. The bound is nothing at all;
where two unbroken runs differ themselves (GPU kernels that add in any order), it is three times their difference.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from packtrain import finetuning, log
from packtrain.building import Inputs
from packtrain.checkpoint.places import output_root
from packtrain.commands.verify_numbers import Row, let_go, whole_norm
from packtrain.configs.run import RunConfig
from packtrain.distributed.place import Place
from packtrain.errors import Fault, Stopped
from packtrain.train.interrupt import Interrupt

FIGURES = ("loss", "grad_norm")
NOISE = 3.0


class _StopAfter(Interrupt):
    """Says after so many steps that a signal has come; never with 0."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    @property
    def asked(self) -> bool:
        """Once a step."""
        self._left -= 1
        return self._left == 0


def rows(cfg: RunConfig, place: Place, inputs: Inputs) -> list[Row]:
    """The comparisons, on rank 0; nothing on the others."""
    steps = cfg.train_config.verify_steps
    _train(cfg, place, inputs, "whole", "whole")
    if not _train(cfg, place, inputs, "stopped", "stopped", steps):
        raise Fault(f"a run that was to stop after step {steps} did not stop")
    _train(cfg, place, inputs, "stopped", "resumed")
    root = output_root(cfg)
    differs = place.agree("verify/differs", lambda: any(_differences(root / "stopped", root / "whole").values()))
    if differs:
        _train(cfg, place, inputs, "again", "again")
    if place.rank:
        return []
    noise = _differences(root / "again", root / "whole") if differs else {}
    return _compared(root / "stopped", root / "whole", noise, steps)


def _train(cfg: RunConfig, place: Place, inputs: Inputs, folder: str, name: str, stop: int = 0) -> bool:
    """A run in `folder`; whether it was stopped. `name` is the run's own among those of this group."""
    train = replace(cfg.train_config, output_dir=str(output_root(cfg) / folder))
    own = replace(place, store=PrefixStore(f"verify/{name}", place.store))
    log.quiet()
    try:
        finetuning.run(replace(cfg, train_config=train), own, inputs, _StopAfter(stop))
    except Stopped:
        return True
    finally:
        log.quiet(place.rank != 0)
        let_go()
    return False


def _figures(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {figure: [line[figure] for line in lines if "event" not in line] for figure in FIGURES}


def _saved(folder: Path) -> dict[str, Tensor]:
    """What others would read, by file and name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    return found


def _differences(ours: Path, whole: Path) -> dict[str, float]:
    """The largest relative difference of each figure, and of what is saved (to its tensor's largest element)."""
    left, right = _figures(ours), _figures(whole)
    found = {figure: _largest(left[figure], right[figure]) for figure in FIGURES}
    mine, theirs = _saved(ours), _saved(whole)
    if mine.keys() != theirs.keys():
        return {**found, "saved": float("inf")}
    return {**found, "saved": max(_apart(mine[name], theirs[name]) for name in theirs)}


def _largest(ours: list[float], reference: list[float]) -> float:
    if len(ours) != len(reference):
        return float("inf")
    pairs = [(a, b) for a, b in zip(ours, reference, strict=True) if a != b]
    return max((float("inf") if None in (a, b) else abs(a - b) / abs(b) for a, b in pairs), default=0.0)


def _apart(ours: Tensor, reference: Tensor) -> float:
    if torch.equal(ours, reference):
        return 0.0
    difference = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    return float(difference)


def _compared(stopped: Path, whole: Path, noise: dict[str, float], steps: int) -> list[Row]:
    found = _differences(stopped, whole)
    ours, reference = _figures(stopped), _figures(whole)
    last = {figure: (ours[figure][-1], reference[figure][-1]) for figure in FIGURES}
    norms = whole_norm(_saved(stopped).values()), whole_norm(_saved(whole).values())
    when = f"stopped after step {steps} of {2 * steps}"
    named = (("loss", "loss", last["loss"]), ("grad_norm", "gradient norm", last["grad_norm"]))
    return [
        Row(f"{name}, {when}", *figures, found[key], NOISE * noise.get(key, 0.0))
        for key, name, figures in (*named, ("saved", "saved tensors", norms))
    ]
