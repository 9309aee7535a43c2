"""Which parameters learn. `requires_grad` is the mark; everything else asks it here.

freeze       nothing learns
trainable    name -> parameter that learns, in the model's order; what the optimizer is given
frozen       the others
count_line   how many, for people
"""

from __future__ import annotations

from math import prod

from torch import nn

from packtrain.model.linear import base_shapes


def freeze(model: nn.Module) -> None:
    """Mark every parameter as not learning."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn by our name for them; a tied one once, under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that stay as they are, by our name for them."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def count_line(model: nn.Module) -> str:
    """For example "trainable 4,884,480 of 139.4 M (3.50 %)": elements of the whole model, whatever this rank holds."""
    whole = base_shapes(model)
    learning = sum(parameter.numel() for parameter in trainable(model).values())
    total = learning + sum(prod(whole[name]) for name in frozen(model) if name in whole)
    share = 100 * learning / total if total else 0.0
    return f"trainable {learning:,} of {_short(total)} ({share:.2f} %)"


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.{2 if letter == 'B' else 1}f} {letter}"
    return f"{count:,}"
