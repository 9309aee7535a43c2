"""What must hold in every run, looked at in its first steps, before more time goes into it.

    same_start          all ranks have the same settings, the same order of the data, the same weights
    FirstSteps          all that is to learn has a gradient and moves; what is frozen does not

A factor beside one that starts at zero (LoRA's A, whose B is zero; a prompt behind a gate) has no gradient in the first
step, so all are asked after the second update that was taken, and after the first those that have no such excuse.
Frozen tensors and copies of the model are compared by some elements of each tensor (`_sample`), to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.data.loader import Loader
from packtrain.distributed.collectives import same_on_all, sum_
from packtrain.distributed.parallelize import local_rows
from packtrain.distributed.place import Place
from packtrain.errors import Fault
from packtrain.optim import Optimizer
from packtrain.peft.trainable import frozen, trainable

SAMPLES = 8
ORDERED_STEPS = 4
"""Steps whose rows ranks compare."""
UPDATES = 2
SHOWN = 5


def same_start(place: Place, settings: Mapping[str, Any], train: Loader, model: nn.Module) -> None:
    """Raises Fault on every rank, naming those at odds, unless all begin the same run. Through the store, in one go."""
    same_on_all(place, "the settings, data or weights file", _digest(json.dumps(settings, sort_keys=True, default=str)))
    steps = range(min(ORDERED_STEPS, train.steps_per_epoch))
    same_on_all(place, "the order of the data", _digest(json.dumps([train.rows_of(step) for step in steps])))
    held = {name: local_rows(parameter) for name, parameter in model.named_parameters()}
    rows = [(name, first, list(local.shape)) for name, (local, first) in held.items()]
    values = [_sample(local) for local, _ in held.values()]
    among = _digest(json.dumps(rows))  # ranks that hold the same rows hold copies of them
    same_on_all(place, "the model", _digest(b"".join(value.cpu().numpy().tobytes() for value in values)), among)


class FirstSteps:
    """Made before the first step of a process; `taken` is told of every update until `done`. Collective."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, place: Place) -> None:
        self._optimizer, self._place = optimizer, place
        self._frozen = {name: local_rows(parameter)[0] for name, parameter in frozen(model).items()}
        self._frozen |= {name: buffer for name, buffer in model.named_buffers() if buffer.numel()}
        self._samples = [_sample(tensor) for tensor in self._frozen.values()]
        states = optimizer.state()
        self._values = {n: _values(states[n], local_rows(p)[0]) for n, p in trainable(model).items()}
        self._marks = self._now()
        largest = torch.tensor([_largest(tensors[0]) for tensors in self._values.values()])
        self._excused = _beside_zeros(list(self._values), sum_over(place, largest).tolist())
        self._grains = largest * torch.tensor([_grain(tensors) for tensors in self._values.values()])
        self._updates = 0

    @property
    def done(self) -> bool:
        """Whether everything has been seen."""
        return self._updates >= UPDATES

    def taken(self, step: int, lr: float) -> None:
        """An update was taken, in a step that has been read. Raises Fault, with names, for what should not be."""
        if lr == 0 or self.done:
            return
        self._updates += 1
        gradients = torch.tensor([self._gradient(name) for name in self._values])
        shift = lr * gradients / (gradients + 1e-8)  # Adam's, of the element with the largest gradient
        owed = (shift > self._grains).float()
        moved = torch.tensor([float(now != before) for now, before in zip(self._now(), self._marks, strict=True)])
        marks = sum_over(self._place, torch.stack([gradients, moved, owed]))
        changed = [
            not torch.equal(_sample(tensor), before)
            for tensor, before in zip(self._frozen.values(), self._samples, strict=True)
        ]
        flags = sum_over(self._place, torch.tensor(changed, dtype=torch.float32))
        problems = [*self._still(marks), *self._restless(flags)]
        if problems:
            raise Fault(f"after step {step}: {'; '.join(problems)}. The run ends before more time goes into it")

    def _still(self, marks: Tensor) -> list[str]:
        """What is wrong with tensors that should learn; `marks` fp32 [gradient, moved, should have; tensors]."""
        columns = list(zip(self._values, *marks.tolist(), strict=True))
        if not self.done:
            columns = [column for column in columns if column[0] not in self._excused]
        blind = [name for name, gradient, _, _ in columns if gradient == 0]
        stuck = [name for name, gradient, moved, owed in columns if gradient > 0 and owed and not moved]
        return [
            f"{_listed(names)} of {len(self._values)} trained {what}"
            for names, what in (
                (blind, "have had no gradient: nothing in the loss depends on them"),
                (stuck, "have a gradient and have not moved"),
            )
            if names
        ]

    def _restless(self, flags: Tensor) -> list[str]:
        names = [name for name, flag in zip(self._frozen, flags.tolist(), strict=True) if flag]
        return [f"{_listed(names)} of {len(self._frozen)} frozen have changed"] if names else []

    def _now(self) -> list[tuple[float, bytes]]:
        """Of each that learns a sum, which sees a few rows move, and a sample, which sees as many ups as downs."""
        sums = torch.stack([torch.stack([t.sum().double() for t in ts]).sum() for ts in self._values.values()]).tolist()
        samples = [b"".join(_sample(t).cpu().numpy().tobytes() for t in ts) for ts in self._values.values()]
        return list(zip(sums, samples, strict=True))

    def _gradient(self, name: str) -> float:
        """The largest entry of a tensor's first moment here: 0 if no gradient has come so far."""
        state = self._optimizer.state()[name]
        moment = state["exp_avg"] if "exp_avg" in state else state["exp_avg_scales"]
        return _largest(moment)


def sum_over(place: Place, tensor: Tensor) -> Tensor:
    """A host's tensor summed over all ranks, on the host."""
    return sum_(tensor.to(place.device), place).cpu()


def _values(state: Mapping[str, Tensor], weight: Tensor) -> list[Tensor]:
    """What an update changes of a parameter: its master or itself, and what rounding left over."""
    return [state.get("master", weight), *(state[name] for name in ("remainder",) if name in state)]


def _norm(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():  # a remainder's bits
        return tensor.sum(dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; no copy is made."""
    return float(torch.linalg.vector_norm(tensor, ord=torch.inf)) if tensor.numel() else 0.0


def _grain(tensors: list[Tensor]) -> float:
    """A relative change that an element of a parameter would show for certain."""
    fine = len(tensors) > 1 or tensors[0].dtype == torch.float32
    return 8 * torch.finfo(torch.float32 if fine else tensors[0].dtype).eps


def _beside_zeros(names: list[str], largest: list[float]) -> set[str]:
    """Tensors of a module in which another one begins as zeros, and so keeps their gradient zero for one update."""
    zero = {name.rpartition(".")[0] for name, value in zip(names, largest, strict=True) if value == 0}
    return {n for n, value in zip(names, largest, strict=True) if value != 0 and n.rpartition(".")[0] in zero}


def _sample(tensor: Tensor) -> Tensor:
    """Elements spread over the first two dims, SAMPLES to 2 SAMPLES - 1 of each (all of a shorter one), as bytes."""
    for dim in range(min(2, tensor.dim())):
        tensor = tensor[(slice(None),) * dim + (slice(None, None, max(1, tensor.shape[dim] // SAMPLES)),)]
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def _digest(content: str | bytes) -> str:
    return sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}: {len(names)}"
