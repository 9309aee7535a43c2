"""Products of a float8 base with adapters of any size: right, or loudly wrong, and as before for small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packtrain.kernels import float8, lowrank, packs, rows
from packtrain.kernels.adapter_gradients import Gradients, up_and_gradient
from packtrain.kernels.lowrank import GROWN_MOST, Float8, Plan, Scratch, Span
from packtrain.kernels.rows import Form, Rows

CPU = torch.device("cpu")
FORM = Form(torch.float32, float8=True)
N, K, RANK, SCALE, TOKENS = 96, 64, 4, 2.0, 33
PLAN = Plan(N, K, (Span(0, 48, 0), Span(64, 96, RANK)), RANK, SCALE)
SPREAD = 0.02
"""Of the base's weights."""


@dataclass(frozen=True)
class Errors:
    """Relative, against float64 from the numbers that the rows held at first; and by how much their scales grew."""

    output: float
    input_gradient: float
    gradients: list[float]
    grown: float


def products(of_a: float, of_b: float, seed: int = 0, big: int = 0, gathered: bool = False) -> Errors:
    """One layer forward and backward with A and B of such spreads; `big` tokens are a hundred times the others.

    A `gathered` weight comes without room for the adapters.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    numbers, one = float8.quantise_matrix(normal(N, K, spread=SPREAD))
    whole = lowrank.storage(PLAN, FORM, CPU)
    whole[:, :K].view(torch.uint8).copy_(numbers.view(torch.uint8))
    pairs = [(normal(RANK, K, spread=of_a), normal(s.stop - s.start, RANK, spread=of_b)) for s in PLAN.spans]
    tops = [(a.abs().max(), b.abs().max()) for a, b in pairs]
    weight = whole[:, :K].clone() if gathered else whole[:, :K]
    operand = Float8(PLAN, FORM, weight, one.expand(N), pairs, tops, Scratch(PLAN, FORM, CPU), None)
    sizes = torch.ones(TOKENS, 1)
    sizes[:big] = 100.0
    x, dy = rows.copy(normal(TOKENS, K) * sizes, FORM, PLAN.columns), rows.copy(normal(TOKENS, N), FORM, PLAN.columns)
    x64, dy64, scale = exact(x), exact(dy), x.scale.clone()

    h = operand.down(x)
    y, sums = operand.forward(x), Gradients([PLAN], CPU)
    dh = up_and_gradient(operand, dy, h, sums, 0)
    dx = operand.backward(dy)
    sums.add_a(0, PLAN, x, dh)

    base = numbers.double() * one.double()
    y64, dx64, gradients = x64 @ base.t(), dy64 @ base, []
    for span, (a, b) in zip(PLAN.spans, pairs, strict=True):
        down, up = x64 @ a.double().t(), SCALE * dy64[:, span.start : span.stop] @ b.double()
        y64[:, span.start : span.stop] += SCALE * down @ b.double().t()
        dx64 += up @ a.double()
        gradients += [up.t() @ x64, SCALE * dy64[:, span.start : span.stop].t() @ down]
    found = [error(ours, exact) for ours, exact in zip(sums.sums([PLAN]), gradients, strict=True)]
    return Errors(error(y, y64), error(dx, dx64), found, (x.scale / scale).max().item())


def test_a_weight_without_room_gives_the_same() -> None:
    assert products(0.05, 0.01, gathered=True) == products(0.05, 0.01)
    assert products(0.05, 0.01).output < 0.01


def exact(x: Rows) -> Tensor:
    assert x.scale is not None
    return x.values.double() * x.scale.double()[:, None]


def error(found: Tensor, expected: Tensor) -> float:
    """The worst row's, by norms; of rows of zeros the norm."""
    off, size = (found.double() - expected).norm(dim=1), expected.norm(dim=1)
    return float((off / torch.where(size > 0, size, 1.0)).max())


@settings(max_examples=60, deadline=None)
@given(of_a=st.floats(-6, 4), of_b=st.floats(-6, 4), seed=st.integers(0, 2**31), big=st.integers(0, 3))
def test_adapters_of_any_size_are_exact_or_their_gradient_is_nan(of_a: float, of_b: float, seed: int, big: int) -> None:
    """Spreads from 1e-6 to 1e4 beside weights of 0.02: a float8 row of 448 would have been overrun from about 1 on."""
    found = products(10**of_a, 10**of_b, seed, big)
    assert found.output < 0.02
    assert found.input_gradient < 0.02
    if found.grown <= GROWN_MOST:
        assert max(found.gradients) < 0.1
    else:
        assert math.isnan(max(found.gradients, key=math.isnan))


@pytest.mark.parametrize("of_b", [0.0, 1e-3, 0.05])
def test_nothing_grows_for_usual_adapters(of_b: float) -> None:
    found = products(1 / (3 * K) ** 0.5, of_b)
    assert found.grown == 1.0
    assert max(found.output, found.input_gradient, *found.gradients) < 5e-3


@pytest.mark.parametrize(("of_a", "of_b"), [(1.0, 3.0), (0.1, 100.0), (1e4, 1e-6)])
def test_each_guard_is_needed(of_a: float, of_b: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(of_a, of_b).output < 5e-3
    monkeypatch.setattr(lowrank, "_within", lambda x, numbers: (numbers, torch.ones(len(numbers))))
    monkeypatch.setattr(packs, "reach", lambda terms: 0.0)
    assert products(of_a, of_b).output > 0.1


def test_what_is_not_finite_stays_so() -> None:
    found = products(math.nan, 0.1)
    assert math.isnan(found.output)
    assert math.isnan(found.input_gradient)
