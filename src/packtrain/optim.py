"""Optimizers and schedules: what a step does with gradients, on any number of ranks, wrapped or not.

    Optimizer       AdamW over fp32 masters and fp32 gradients of everything trainable, rank by rank
    grad_norm, not_finite, clip_    0-dim fp32 tensors that stay on the device
    schedule        the learning rate's factor as a function of the step

A trainable parameter has three things on a rank: its local rows, an fp32 value and an fp32 gradient. For an fp32
parameter they are its own; for a bf16 or fp16 one a master is kept, and each micro-batch's gradient is moved into an
fp32 sum as soon as it is there: added up in bf16, many small gradients would vanish beside their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from packtrain.distributed.collectives import sum_
from packtrain.distributed.parallelize import copies, local_rows
from packtrain.distributed.place import Place

SCHEDULERS = ("gamma", "constant", "linear", "cosine")


class Weight:
    """A trainable parameter as the optimizer sees it on this rank: plain fp32 tensors of the local rows."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.local, _ = local_rows(parameter)
        self.has_master = self.local.dtype != torch.float32
        self.value = self.local.float() if self.has_master else self.local
        """fp32; shares the parameter's storage unless it is a master."""
        self._sum: Tensor | None = None
        if self.has_master:
            parameter.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]

    def _collect(self, parameter: Tensor) -> None:
        """Runs on the stream that made a gradient: a plain parameter's backward, a sharded one's reduction."""
        if parameter.grad is None:
            return
        gradient, _ = local_rows(parameter.grad)
        self._sum = gradient.float() if self._sum is None else self._sum.add_(gradient)
        parameter.grad = None

    def gradient(self) -> Tensor:
        """fp32, of the local rows; changing it in place changes the step. No gradient is a zero one, on every rank."""
        if self.has_master:
            if self._sum is None:
                self._sum = torch.zeros_like(self.value)
            return self._sum
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return local_rows(self.parameter.grad)[0]

    def forget(self) -> None:
        """Drop the gradient."""
        self.parameter.grad = self.value.grad = self._sum = None


class Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101; torch's fused one) with the seams that a step needs.

    `trainable` maps names to parameters, plain or sharded; their values are read at the start, so weights are loaded
    before. Moments and masters are fp32, on the parameters' devices, there from the start.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not trainable:
            raise ValueError("nothing to optimize: no trainable parameter")
        self._weights = {name: Weight(parameter) for name, parameter in trainable.items()}
        values = [weight.value for weight in self._weights.values()]
        self._verdict = torch.zeros((), device=values[0].device)
        self._adamw = torch.optim.AdamW(values, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        # Read by torch's fused step: 1 makes it leave weights, moments and its own count as they are.
        self._adamw.found_inf = self._verdict  # type: ignore[attr-defined]
        for value in values:
            self._adamw.state[value] = {
                "step": torch.zeros((), device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }

    def gradients(self) -> list[Tensor]:
        """fp32 gradients of this rank's rows, in the order of `trainable`; changing them in place changes the step."""
        return [weight.gradient() for weight in self._weights.values()]

    def scale(self, loss: Tensor) -> Tensor:
        """What to call backward on: the loss itself."""
        return loss

    @torch.no_grad()
    def step(self, found_inf: Tensor) -> None:
        """One update, or none if `found_inf` (0-dim fp32, 0 or 1) is 1 or was since `clear`; nothing is waited for."""
        self._verdict.copy_(torch.maximum(self._verdict, found_inf.to(self._verdict.device)))
        for weight in self._weights.values():
            weight.value.grad = weight.gradient()
        self._adamw.step()
        kept = [weight for weight in self._weights.values() if weight.has_master]
        if kept:
            torch._foreach_copy_([weight.local for weight in kept], [weight.value for weight in kept])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for weight in self._weights.values():
            weight.forget()

    def clear(self) -> None:
        """Forget that a step was refused; the next one counts again."""
        self._verdict.zero_()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self._adamw.param_groups:
            group["lr"] = lr

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Live fp32 tensors by parameter name: `step` (0-dim), `exp_avg`, `exp_avg_sq`, and `master` where one is kept.

        All but `step` have the local rows' shape; copying into them restores a state.
        """
        return {
            name: {**self._adamw.state[weight.value], **({"master": weight.value} if weight.has_master else {})}
            for name, weight in self._weights.items()
        }


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor], model: nn.Module, place: Place) -> Tensor:
    """2-norm of the whole gradient, 0-dim fp32, the same bits on every rank: one all-reduce, of the squares."""
    # In float64: torch's fp32 norm of 30 million numbers is off by 0.16 % on a CPU.
    squares = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64)).square().sum()
    return sum_(squares / copies(model, place), place).sqrt().float()


def not_finite(norm: Tensor) -> Tensor:
    """1.0 if a 0-dim norm is NaN or infinite, else 0.0; on the device, fp32."""
    return (~norm.isfinite()).float()


@torch.no_grad()
def clip_(gradients: Sequence[Tensor], norm: Tensor, threshold: float) -> None:
    """Scale gradients in place so that their `norm` is at most `threshold`, as torch's clip_grad_norm_ does."""
    torch._foreach_mul_(list(gradients), (threshold / (norm + 1e-6)).clamp(max=1.0))


def schedule(
    scheduler: str, *, total_steps: int, warmup_steps: int, steps_per_epoch: int, gamma: float
) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the step, which counts from 1.

    Warm-up rises from 1/warmup_steps to 1. Then `gamma` is gamma to the number of finished epochs (llama-recipes'
    StepLR, warmed up or not), `constant` 1, `linear` and `cosine` fall so that the step after the last one would be 0.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown schedule {scheduler!r}; there are {', '.join(SCHEDULERS)}")

    def factor(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        if scheduler == "gamma":
            return float(warm * gamma ** ((step - 1) // steps_per_epoch))
        if scheduler == "constant" or step <= warmup_steps:
            return warm
        done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
        return 1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor
