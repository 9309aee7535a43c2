"""The gradient through a frozen head in float8, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from packtrain.kernels import head, loss
from packtrain.kernels.head import Float8Head, HeadScale
from packtrain.kernels.loss import linear_cross_entropy


def inputs(n: int, d: int, v: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + d + v)
    hidden = torch.randn(n, d, generator=generator).requires_grad_()
    weight = 2 * spread * torch.randn(v, d, generator=generator) * d**-0.5
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def run(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None, **more: Any
) -> tuple[Tensor, Any]:
    total = linear_cross_entropy(hidden, weight, targets, scale=scale, **more)
    return total, torch.autograd.grad(2.5 * total, hidden)[0]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 70),
    d=st.integers(4, 40),
    v=st.integers(2, 300),
    rows=st.integers(1, 40),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_equals_float64(n: int, d: int, v: int, rows: int, spread: float) -> None:
    """The loss is that of without, to the bit; the gradient is as exact as e4m3, whatever the weight's size."""
    hidden, weight, targets = inputs(n, d, v, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_LOGITS", rows * v)
        total, gradient = run(hidden, weight, targets, HeadScale()(weight))
        plain, _ = run(hidden, weight, targets)
    assert torch.equal(total, plain)
    twin = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(twin @ weight.double().T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(2.5 * exact, twin)
    # a number of e4m3 is off by 1/16 at most; numbers below 2^-10 of the unit are lost
    bound = 2.5 * (2 / 16 * twin.shape[1] ** 0.5 + v * 2**-10 / head.UNIT) * weight.norm(dim=1).max() + 1e-6
    assert (gradient.double() - expected).norm(dim=1).max() < bound
    assert (gradient.double() - expected).norm() < 0.08 * expected.norm() + n**0.5 * 1e-3 * weight.norm(dim=1).max()


def test_many_tokens_average_out() -> None:
    """Rounding has no direction of its own: what all tokens learn from together is as long, and as it was."""
    hidden, weight, targets = inputs(2000, 64, 500)
    _, gradient = run(hidden, weight, targets, HeadScale()(weight))
    _, exact = run(hidden, weight, targets)
    along = (gradient.double() * exact.double()).sum() / exact.double().square().sum()
    assert abs(along - 1) < 3e-3
    assert (gradient - exact).norm() < 0.04 * exact.norm()


def test_what_else_learns_goes_without() -> None:
    hidden, weight, targets = inputs(30, 16, 50)
    scale = HeadScale()(weight)
    for more in ({"low_rank": (torch.ones(30, 2), torch.ones(50, 2))}, {"bias": torch.ones(50).requires_grad_()}):
        assert torch.equal(run(hidden, weight, targets, scale, **more)[1], run(hidden, weight, targets, **more)[1])
    weight.requires_grad_()
    assert torch.equal(run(hidden, weight, targets, scale)[1], run(hidden, weight, targets)[1])


def test_without_tokens() -> None:
    hidden, weight, _ = inputs(0, 16, 50)
    total, gradient = run(hidden, weight, torch.empty(0, dtype=torch.int64), HeadScale()(weight))
    assert total.item() == 0.0
    assert gradient.shape == (0, 16)


def test_no_poison_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes with NaN in it: what lies beyond the vocabulary is written too."""

    def poisoned(*shape: Any, **settings: Any) -> Tensor:
        made = torch.zeros(*shape, **settings)
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(0x7F)
        return made

    hidden, weight, targets = inputs(20, 16, 77)
    expected = run(hidden, weight, targets, HeadScale()(weight))[1]
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(run(hidden, weight, targets, HeadScale()(weight))[1], expected)


def test_a_scale_is_looked_for_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, looked = torch.linalg.vector_norm, []

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        looked.append(1)
        return exact(*arguments, **settings)

    monkeypatch.setattr(torch.linalg, "vector_norm", counted)
    _, weight, _ = inputs(1, 16, 50)
    scale = HeadScale()
    assert scale(weight).item() == pytest.approx(weight.abs().max().item() / 448)
    assert torch.equal(scale(weight), scale(weight))
    assert len(looked) == 1
    weight[3, 4] = 100.0
    assert scale(weight).item() == pytest.approx(100 / 448)
    assert scale(weight.clone()[:2]).item() == pytest.approx(weight[:2].abs().max().item() / 448)
    assert len(looked) == 3


def test_a_weight_of_zeros_has_a_scale() -> None:
    weight = torch.zeros(5, 8)
    made = Float8Head.of(weight, HeadScale()(weight))
    assert made.numbers.shape == (8, 16)
    assert not made.numbers.float().any()
