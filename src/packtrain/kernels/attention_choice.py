"""Which attention kernel a run uses, and why: --attention against the device, the dtype and what is installed.

choose      the kernel that is meant by a name, and the reason, for the log
problems    why a forced one cannot run here
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from packtrain.kernels import flash, flex
from packtrain.kernels.attention import Kernel


class Choice(NamedTuple):
    """A kernel, and why that one; auto where it depends on the batch."""

    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        which = "sdpa, and flex for rows of short documents" if self.kernel == "auto" else self.kernel
        return f"attention: {which} ({self.reason})"


def choose(asked: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """`asked`; for auto the fastest that can train here: flash-attn-4, else SDPA, which runs everywhere, and flex."""
    if asked != "auto":
        return Choice(asked, "as --attention says")
    reason = flash.obstacle(device, dtype, head_dim)
    if reason is None:
        return Choice("flash", "flash-attn-4 is installed, and the fastest on this GPU")
    return Choice("auto" if flex.fits(device, dtype, head_dim) else "sdpa", reason)


def problems(asked: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """A sentence, beginning with the kernel's name, if a forced kernel cannot run on such tensors."""
    reason = None
    if asked == "flash":
        reason = flash.obstacle(device, dtype, head_dim)
    elif asked == "flex":
        reason = flex.obstacle(device, head_dim)
    if reason is None:
        return []
    remedy = "pip install flash-attn-4, or " if reason.endswith("not installed") and asked == "flash" else ""
    return [f"{asked}: {reason}; {remedy}leave the choice to packtrain (auto) or take sdpa"]
