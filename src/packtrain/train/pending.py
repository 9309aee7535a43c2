"""A step's report on its way to the host: a copy queued behind the step, waited for only when it is read.

Mark        a moment of the device's work, and the seconds between two
Pending     the report
"""

from __future__ import annotations

import time

import torch

from packtrain.train.health import Numbers
from packtrain.train.step import VECTOR, StepReport


class Mark:
    """When what is queued now will be done: on CUDA by the device's clock, since the host may look much later."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.monotonic()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until then."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: Mark) -> float:
        """Seconds from an earlier one to this one, which has been waited for."""
        if self._event is None or other._event is None:
            return self._time - other._time
        return float(other._event.elapsed_time(self._event)) / 1000


class Pending:
    """`limits` are those that the step had; `ended` is when the device had done it."""

    def __init__(self, step: int, lr: float, limits: tuple[float, float], report: StepReport) -> None:
        self.step, self.lr = step, lr
        self._limits, self._shape = limits, report.losses.shape
        figures = torch.stack([report.loss, report.grad_norm, report.scale, report.verdict])
        numbers = torch.cat([figures, report.agreed, report.memory, report.losses.flatten()])
        self._host = numbers.to("cpu", non_blocking=True)
        self.ended = Mark(numbers.device)

    def read(self) -> Numbers:
        """Wait for the copy."""
        self.ended.wait()
        loss, norm, scale, verdict, *rest = self._host.tolist()
        ranks, parts = self._shape
        losses = rest[VECTOR + ranks :]
        return Numbers(
            step=self.step,
            loss=loss,
            norm=norm,
            scale=scale,
            verdict=int(verdict),
            agreed=rest[:VECTOR],
            memory=rest[VECTOR : VECTOR + ranks],
            losses=[losses[rank * parts : (rank + 1) * parts] for rank in range(ranks)],
            limits=self._limits,
        )
