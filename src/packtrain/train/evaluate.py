"""Validation loss: the mean over every labelled token of the validation rows, none dropped, none counted twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

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
def evaluate(model: nn.Module, loader: Loader, place: Place, max_batches: int = 0) -> Evaluation:
    """Mean token loss over `loader`. `max_batches` > 0 ends after so many of this rank's batches.

    The number of forwards follows from the row count, so it is the same on every rank.
    """
    steps = loader.steps_per_epoch if max_batches <= 0 else min(max_batches, loader.steps_per_epoch)
    sums = torch.zeros(steps, 2, dtype=torch.float64, device=place.device)
    was_training = model.training
    model.eval()
    for index in range(steps):
        for batch in loader.step(index):
            sums[index, 0] += model(batch.to(place.device)).double()
            sums[index, 1] += batch.count
    model.train(was_training)
    reshard(model)  # a save hands parameters' memory to numpy, and then a gathered one could not be freed
    sum_(sums, place)
    loss, labels = sums.sum(0).tolist()
    return Evaluation(loss / labels, (sums[:, 0] / sums[:, 1]).tolist())
