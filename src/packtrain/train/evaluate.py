"""Validation loss: the mean over every labelled token of the validation rows, none dropped, none counted twice."""

from __future__ import annotations

import torch
from torch import nn

from packtrain.data.loader import Loader
from packtrain.distributed.collectives import sum_
from packtrain.distributed.place import Place


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, place: Place, max_batches: int = 0) -> float:
    """Mean token loss over `loader` (in nats). `max_batches` > 0 ends after so many of this rank's batches.

    The number of forwards follows from the row count, so it is the same on every rank.
    """
    steps = loader.steps_per_epoch if max_batches <= 0 else min(max_batches, loader.steps_per_epoch)
    total = torch.zeros(2, dtype=torch.float64, device=place.device)
    was_training = model.training
    model.eval()
    for index in range(steps):
        for batch in loader.step(index):
            total[0] += model(batch.to(place.device)).double()
            total[1] += batch.count
    model.train(was_training)
    sum_(total, place)
    loss, labels = total.tolist()
    return float(loss / labels)
