"""How gradients change values: what every rule does, torch's fused AdamW, and torchao's with 8-bit moments."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from packtrain.errors import UserError
from packtrain.optim.codes import block_of

NO_TORCHAO = "--optimizer adamw8bit: needs torchao, which is not installed here: pip install torchao"


class Rule(Protocol):
    """One optimizer over this rank's values, plain tensors in a fixed order."""

    lr: float
    """Of the next step."""

    def step(self, gradients: Sequence[Tensor], refused: Tensor, factor: Tensor | None = None) -> None:
        """Change the values by their gradients, times `factor` (0-dim fp32) if there is one.

        Nothing, the count too, if `refused` (0-dim fp32, 0 or 1) is 1. Gradients are fp32, or of their value's dtype.
        """

    def state(self) -> list[dict[str, Tensor]]:
        """Each value's live tensors."""


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), torch's fused one, over fp32 values; fp32 moments."""

    def __init__(
        self, values: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.lr = lr
        self._values = values
        self._adamw = torch.optim.AdamW(values, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # Read by torch's fused step: 1 makes it leave weights, moments and its own count as they are.
        self._refused = torch.zeros((), device=values[0].device)
        self._adamw.found_inf = self._refused  # type: ignore[attr-defined]
        for value in values:
            self._adamw.state[value] = {
                "step": torch.zeros((), device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }

    def step(self, gradients: Sequence[Tensor], refused: Tensor, factor: Tensor | None = None) -> None:
        """One update; nothing is waited for."""
        _multiply_(gradients, factor)
        self._refused.copy_(refused)
        self._adamw.param_groups[0]["lr"] = self.lr
        _run(self._adamw, self._values, gradients)

    def state(self) -> list[dict[str, Tensor]]:
        """`step` (0-dim), `exp_avg`, `exp_avg_sq`, there from the start."""
        return [dict(self._adamw.state[value]) for value in self._values]


class AdamW8bit:
    """torchao's AdamW over fp32 values: moments of 8 bits, and a scale a block (Dettmers et al., arXiv 2110.02861).

    Blocks are up to 256 neighbours of one row (codes.py); what has none keeps fp32 moments.
    """

    def __init__(
        self, values: Sequence[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        if not has_torchao():
            raise UserError(NO_TORCHAO)
        made: Any = importlib.import_module("torchao.optim").AdamW8bit
        self.lr = lr
        self._values = values
        self._held = [value for value in values if value.numel() > 0]
        self._adamw: torch.optim.Optimizer = made(self._held, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for value in self._held:  # torchao leaves as they are what is there before its first step
            self._adamw.state[value] = {
                "step": torch.tensor(0.0),
                "exp_avg": _moment(value, signed=True),
                "exp_avg_sq": _moment(value, signed=False),
            }

    def step(self, gradients: Sequence[Tensor], refused: Tensor, factor: Tensor | None = None) -> None:
        """One update. The host waits for the verdict: torchao's step takes none."""
        if refused.item():
            return
        _multiply_(gradients, factor)
        self._adamw.param_groups[0]["lr"].fill_(self.lr)
        _run(self._adamw, self._held, [gradient for gradient in gradients if gradient.numel() > 0])

    def state(self) -> list[dict[str, Tensor]]:
        """`step` (0-dim, on the host); a moment is fp32, or NAME_codes uint8 and NAME_scales fp32, one a block."""
        return [
            {plain: part for name, state in self._adamw.state[value].items() for plain, part in _plain(name, state)}
            for value in self._values
        ]


def _moment(value: Tensor, signed: bool) -> Tensor:
    """Zeros, in 8 bits if the shape allows it."""
    if not (block := block_of(value)):
        return torch.zeros_like(value)
    made: Any = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    zeros: Tensor = made.zeros(value.shape, signed, block, value.device, dtype=value.dtype)
    return zeros


def _plain(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    if hasattr(state, "codes"):
        yield f"{name}_codes", state.codes
        yield f"{name}_scales", state.scale.view(len(state), -1)
    else:
        yield name, state


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def _multiply_(gradients: Sequence[Tensor], factor: Tensor | None) -> None:
    if factor is not None:
        torch._foreach_mul_(list(gradients), factor.to(gradients[0].device))


def _run(optimizer: torch.optim.Optimizer, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for value, gradient in zip(values, gradients, strict=True):
        value.grad = gradient
    optimizer.step()
    for value in values:
        value.grad = None
