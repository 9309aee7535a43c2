"""fp16's loss scale: gradients that fp16 would round to zero are made larger, those that it cannot hold are noticed."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
LOWEST_SCALE = 1.0
"""At this scale what overflows is no matter of scale: the update is refused for good."""


class LossScale:
    """torch.amp.GradScaler's rule and constants, without its waiting for the device.

    Doubled after 2,000 finite steps in a row, halved at once by one that is not. A power of two, so that scaling and
    unscaling round nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(FIRST_SCALE, device=device)
        """0-dim fp32."""
        self._finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def hopeless(self, found_inf: Tensor) -> Tensor:
        """`found_inf` where a smaller scale would not help, else 0."""
        return torch.where(self.scale <= LOWEST_SCALE, found_inf, 0.0)

    def update(self, found_inf: Tensor) -> None:
        """What follows from a step; `found_inf` 0-dim fp32, 0 or 1."""
        torch._amp_update_scale_(self.scale, self._finite_steps, found_inf, 2.0, 0.5, 2000)
        self.scale.clamp_(min=LOWEST_SCALE)

    def state(self) -> dict[str, Tensor]:
        """`loss_scale`, and `finite_steps` in a row since it last changed."""
        return {"loss_scale": self.scale, "finite_steps": self._finite_steps}
