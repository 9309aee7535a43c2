"""A good state held in host memory, to roll back to: what learns, and all that the optimizer keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packtrain.distributed.parallelize import local_rows, reshard
from packtrain.optim import Optimizer
from packtrain.peft.trainable import trainable


class Snapshot:
    """Copies of this rank's rows, taken again and again into the same memory; `step` and `state` are the loop's."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._held: list[Tensor] = []
        self.step = -1
        self.state: dict[str, Any] = {}

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> None:
        """Hold what is now; `state` goes with it. No collective."""
        live = self._live()
        if not self._held:
            self._held = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in live]
        for held, tensor in zip(self._held, live, strict=True):
            held.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in live):
            torch.cuda.current_stream().synchronize()
        self.step, self.state = int(state["step"]), state

    @torch.no_grad()
    def put_back(self) -> dict[str, Any]:
        """Make it so again, to the last bit; returns the loop's state of then."""
        reshard(self._model)  # what is gathered now is of weights that go
        for held, tensor in zip(self._held, self._live(), strict=True):
            tensor.copy_(held)
        self._optimizer.clear()
        return self.state

    def _live(self) -> list[Tensor]:
        """Every tensor that a step changes, on this rank."""
        weights = [local_rows(parameter)[0] for parameter in trainable(self._model).values()]
        states = [tensor for state in self._optimizer.state().values() for tensor in state.values()]
        return [*weights, *states, *self._optimizer.scalars().values()]
