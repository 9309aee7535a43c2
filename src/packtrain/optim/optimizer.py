"""The optimizer as a step sees it: gradients in, one update out, whatever the rule and wherever the weights are.

A trainable parameter has three things on a rank: its local rows, the value that the rule changes, and a gradient. For
an fp32 parameter they are its own. For a bf16 or fp16 one the value is an fp32 master, unless the rule can do without,
and gradients are added up in fp32: in bf16 many small ones would vanish beside their sum. What is no sum, the only
micro-batch's gradient, stays as it came if the rule reads it so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from packtrain.distributed.parallelize import local_rows
from packtrain.optim.anyprecision import AnyPrecisionAdamW
from packtrain.optim.rules import NO_TORCHAO, AdamW, AdamW8bit, Rule, has_torchao
from packtrain.optim.scaling import LossScale

RULES: dict[str, Callable[..., Rule]] = {
    "AdamW": AdamW,
    "anyprecision": AnyPrecisionAdamW,
    "adamw8bit": AdamW8bit,
}
"""--optimizer -> its rule."""


def problems(rule: str) -> list[str]:
    """A sentence on what a rule needs and this machine has not."""
    return [NO_TORCHAO] if rule == "adamw8bit" and not has_torchao() else []


class Weight:
    """A trainable parameter as the optimizer sees it on this rank: plain tensors of the local rows."""

    def __init__(self, parameter: nn.Parameter, *, needs_master: bool) -> None:
        self.parameter = parameter
        self.local, _ = local_rows(parameter)
        self.is_fp32 = self.local.dtype == torch.float32
        self.has_master = needs_master
        self.value = self.local.float() if needs_master else self.local
        """What the rule changes; shares the parameter's storage unless it is a master."""
        self._sum: Tensor | None = None
        """fp32, or the parameter's dtype: a single gradient, of a value that is no master."""
        if not self.is_fp32:
            mine = WeakMethod(self._collect)  # else parameter and hook would keep one another for ever

            def collect(parameter: Tensor) -> None:
                if (live := mine()) is not None:
                    live(parameter)

            parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]

    def _collect(self, parameter: Tensor) -> None:
        """Runs on the stream that made a gradient: a plain parameter's backward, a sharded one's reduction."""
        if parameter.grad is None:
            return
        gradient, _ = local_rows(parameter.grad)
        _wait_for_the_host_copy(parameter.grad, gradient)
        if self._sum is not None:
            self._sum = self._sum.float().add_(gradient)
        else:
            self._sum = gradient.float() if self.has_master else gradient
        parameter.grad = None

    def gradient(self, *, fp32: bool = False) -> Tensor:
        """Of the local rows; changing it in place changes the step. No gradient is a zero one, on every rank.

        The parameter's dtype if it is a single one of a value that is no master, else fp32, or always if asked.
        """
        if not self.is_fp32:
            if self._sum is None:
                self._sum = torch.zeros_like(self.value)
            if fp32:
                self._sum = self._sum.float()
            return self._sum
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return local_rows(self.parameter.grad)[0]

    def forget(self) -> None:
        """Drop the gradient."""
        self.parameter.grad = self._sum = None


def _wait_for_the_host_copy(gradient: Tensor, local: Tensor) -> None:
    """An offloaded shard's gradient is on its way from the GPU when its hook runs; torch 2.13 waits itself."""
    if isinstance(gradient, DTensor) and gradient.device_mesh.device_type != local.device.type:
        torch.accelerator.synchronize()


class Optimizer:
    """A rule with the seams that a step needs.

    `trainable` maps names to parameters, plain or sharded; their values are read at the start, so weights are loaded
    before. `rule` is one of RULES: all but anyprecision change fp32 masters of parameters that are not fp32, and
    anyprecision those of fp16 ones. `use_kahan` and `moments` are anyprecision's; `fp16` scales losses.
    """

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: str = "AdamW",
        use_kahan: bool = True,
        moments: Literal["bf16", "8bit"] = "bf16",
        fp16: bool = False,
    ) -> None:
        if not trainable:
            raise ValueError("nothing to optimize: no trainable parameter")
        as_they_are = {torch.float32} | ({torch.bfloat16} if rule == "anyprecision" else set())
        self._weights = {
            name: Weight(parameter, needs_master=parameter.dtype not in as_they_are)
            for name, parameter in trainable.items()
        }
        values = [weight.value for weight in self._weights.values()]
        settings = {"use_kahan": use_kahan, "moments": moments} if rule == "anyprecision" else {}
        self._rule = RULES[rule](values, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **settings)
        self._verdict = torch.zeros((), device=values[0].device)
        self._loss_scale = LossScale(values[0].device) if fp16 else None
        self._scaled = fp16
        self._reader: torch.cuda.Event | None = None

    def scale(self, loss: Tensor) -> Tensor:
        """What to call backward on: the loss, times fp16's scale."""
        if self._loss_scale is None:
            return loss
        return loss * self._loss_scale.scale.to(loss.device)

    @torch.no_grad()
    def gradients(self, *, fp32: bool = False) -> list[Tensor]:
        """Gradients of this rank's rows, in the order of `trainable`; changing them in place changes the step.

        fp32, or as in `Weight.gradient`; with `fp32` all of them are, and stay so until `zero_grad`.
        """
        found = [weight.gradient(fp32=fp32) for weight in self._weights.values()]
        if self._loss_scale is not None and self._scaled:
            torch._foreach_mul_(found, 1.0 / self._loss_scale.scale)
            self._scaled = False
        return found

    @torch.no_grad()
    def step(
        self,
        found_inf: Tensor,
        *,
        factor: Tensor | None = None,
        latches: bool = True,
        refused: Tensor | None = None,
        stands: Tensor | None = None,
    ) -> None:
        """One update, or none if `found_inf` (0-dim fp32, 0 or 1) is 1 or was since `clear`; nothing is waited for.

        With fp16 an overflow refuses its own step and halves the scale; only at the lowest scale does it stand.
        Without `latches` it never does. `refused` leaves out this update for another reason, `stands` later ones too.
        Gradients count `factor` times (0-dim fp32), and may have been multiplied by it then.
        """
        if self._reader is not None:
            self._reader.wait()
            self._reader = None
        found = found_inf.to(self._verdict.device)
        lasting = found if self._loss_scale is None else self._loss_scale.hopeless(found)
        for verdict in (lasting if latches else None, stands):
            if verdict is not None:
                self._verdict.copy_(torch.maximum(self._verdict, verdict.to(self._verdict.device)))
        left_out = torch.maximum(self._verdict, found)
        if refused is not None:
            left_out = torch.maximum(left_out, refused.to(left_out.device))
        self._rule.step(self.gradients(), left_out, factor)
        kept = [weight for weight in self._weights.values() if weight.has_master]
        if kept:
            torch._foreach_copy_([weight.local for weight in kept], [weight.value for weight in kept])
        if self._loss_scale is not None:
            self._loss_scale.update(found)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for weight in self._weights.values():
            weight.forget()
        self._scaled = self._loss_scale is not None

    def hold(self, reader: torch.cuda.Event | None) -> None:
        """Queue the next update behind `reader`: until then something copies weights and states as they are now."""
        self._reader = reader

    def clear(self) -> None:
        """Forget that a step was refused; the next one counts again."""
        self._verdict.zero_()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        self._rule.lr = lr

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Live tensors by parameter name: the rule's (see its `state`), and `master` (fp32) where one is kept.

        All but `step` have the local rows' shape; copying into them restores a state.
        """
        states = zip(self._weights.items(), self._rule.state(), strict=True)
        return {
            name: {**state, **({"master": weight.value} if weight.has_master else {})}
            for (name, weight), state in states
        }

    def scalars(self) -> dict[str, Tensor]:
        """Live 0-dim tensors that belong to no parameter: fp16's loss scale. Copying into them restores a state."""
        return {} if self._loss_scale is None else self._loss_scale.state()
