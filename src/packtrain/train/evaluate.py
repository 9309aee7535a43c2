"""Validation loss: the mean over every labelled token of the validation rows, none dropped, none counted twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from packtrain.batch import queued
from packtrain.data.loader import Loader
from packtrain.distributed.collectives import sum_
from packtrain.distributed.parallelize import reshard
from packtrain.distributed.place import Place


class Evaluation(NamedTuple):
    """Mean token losses in nats, the same on every rank."""

    loss: float
    batches: list[float]
    """Of each batch, all ranks' together; NaN for one without labels."""


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, place: Place, max_batches: int = 0, stop: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Mean token loss over `loader`. `max_batches` > 0 ends after so many of this rank's batches.

    The number of forwards follows from the row count, so it is the same on every rank. Once `stop` says so on any
    rank, all of them leave after the same batch: None.
    """
    steps = loader.steps_per_epoch if max_batches <= 0 else min(max_batches, loader.steps_per_epoch)
    sums = torch.zeros(steps, 2, dtype=torch.float64, device=place.device)
    was_training = model.training
    model.eval()
    votes = _Votes(place)
    stopped = False
    for index in range(steps):
        place.heart.at(f"evaluation, batch {index + 1} of {steps}", steady=index > 0)
        for batch in loader.step(index):
            sums[index, 0] += model(batch.to(place.device)).double()
            sums[index, 1] += batch.count
        if stopped := index + 1 < steps and votes.stop(stop()):
            break
    model.train(was_training)
    reshard(model)  # a save hands parameters' memory to numpy, and then a gathered one could not be freed
    if stopped:
        return None
    sum_(sums, place)
    loss, labels = sums.sum(0).tolist()
    return Evaluation(loss / labels, (sums[:, 0] / sums[:, 1]).tolist())


class _Votes:
    """Whether any rank wants to stop, the same answer on all; on a GPU a batch late, so that the host need not wait."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._late = place.device.type == "cuda"
        self._pending: deque[tuple[torch.Tensor, torch.Event | None]] = deque()

    def stop(self, mine: bool) -> bool:
        """Cast this rank's vote; the sum of an earlier one."""
        votes = sum_(queued(torch.tensor([float(mine)]), self._place.device), self._place)
        copied = torch.Event(votes.device) if self._late else None
        self._pending.append((votes.to("cpu", non_blocking=True), copied))
        if copied is not None:
            copied.record()
        if len(self._pending) <= int(self._late):
            return False
        told, arrived = self._pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        return bool(told.item() > 0)
