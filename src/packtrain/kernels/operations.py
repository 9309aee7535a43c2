"""Own kernels as operations of torch, for whoever looks at a step through it: what they write, and their FLOPs.

    operation       makes a function one that torch knows as packtrain::NAME
    again, is_again what runs inside is computed a second time, by a backward

While one of torch's modes watches (fake tensors, the FLOP counter, a tracer), such a function goes through torch's
dispatcher; on fake tensors it computes nothing. Otherwise it is called as it is: the dispatcher would take some 30 us
of the host for each of a step's hundreds of calls (docs/LOG.md). Kernels that do little with what they read have no
operation of their own: they are skipped for fake tensors (kernels/rows_triton.py), and no FLOPs are counted for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_AGAIN = [0]


def operation(
    schema: str, flops: Callable[..., int], fake: Callable[..., Any] = lambda *_: None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Register a function, called by position, as torch's operation of `schema`, "NAME(Tensor x, Tensor(a!) y) -> ()".

    `flops` and `fake` take its arguments, for the first with shapes in place of tensors; `fake` gives its result if it
    has one.
    """
    name, _, arguments = schema.partition("(")

    def register(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        written = [word.split()[-1] for word in arguments.rpartition("->")[0].strip(" )").split(",") if "!" in word]
        made = torch.library.custom_op(f"packtrain::{name}", function, mutates_args=written, schema=f"({arguments}")
        made.register_fake(fake)
        register_flop_formula(getattr(torch.ops.packtrain, name))(lambda *shapes, out_shape=None, **_: flops(*shapes))

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            # one C call: what there is for "some mode is active"
            return made(*args, **kwargs) if torch._C._len_torch_dispatch_stack() else function(*args, **kwargs)

        return call

    return register


@contextmanager
def again() -> Iterator[None]:
    """What runs inside has been computed before."""
    _AGAIN[0] += 1
    try:
        yield
    finally:
        _AGAIN[0] -= 1


def is_again() -> bool:
    """Whether this runs inside `again`."""
    return _AGAIN[0] > 0
