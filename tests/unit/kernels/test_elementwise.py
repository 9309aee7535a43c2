"""Operations between products against autograd's own in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from packtrain.kernels.elementwise import rms_norm, swiglu, turn


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up


def plain_turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[object, ...]]] = {
    "swiglu": (swiglu, plain_swiglu, (drawn(7, 26),)),
    "turn": (turn, plain_turn, (drawn(7, 3, 10), drawn(7, 1, 5, seed=1), drawn(7, 1, 5, seed=2))),
    "turn, a view": (turn, plain_turn, (drawn(7, 50)[:, 6:36].view(7, 3, 10), drawn(7, 1, 5), drawn(7, 1, 5, seed=2))),
    "norm": (rms_norm, plain_norm, (drawn(7, 12), drawn(12, seed=1), 1e-2)),
    "no tokens": (rms_norm, plain_norm, (drawn(0, 12), drawn(12, seed=1), 1e-2)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    ours, theirs, (x, *rest) = CASES[case]
    assert isinstance(x, Tensor)
    x = x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    found = ours(x, *rest)
    expected = theirs(exact, *(t.double() if isinstance(t, Tensor) else t for t in rest))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    gradient = drawn(*found.shape, seed=5)
    (one,) = torch.autograd.grad(found, x, gradient)
    (other,) = torch.autograd.grad(expected, exact, gradient.double())
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)
    assert one.shape == x.shape


def test_turn_in_16_bits_rounds_each_product() -> None:
    x, cos, sin = (t.bfloat16() for t in (drawn(9, 2, 8), drawn(9, 1, 4, seed=1), drawn(9, 1, 4, seed=2)))
    assert torch.equal(turn(x, cos, sin), plain_turn(x, cos, sin))
