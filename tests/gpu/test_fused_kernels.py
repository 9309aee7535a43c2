"""The Triton kernels of the fast layers against their plain twins, on a CUDA device or in Triton's interpreter.

Fresh random numbers each time, odd sizes, and memory that held NaN before. The interpreter (TRITON_INTERPRET=1 on a
CPU) has no bf16 products and truncates to e4m3: there float8 is compared within twice its spacing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from packtrain.kernels import float8, loss, lowrank, rows
from packtrain.kernels.loss import linear_cross_entropy
from packtrain.kernels.lowrank import Float8, Gradients, Plan, Scratch, Span, Wide
from packtrain.kernels.rows import Form, Rows

INTERPRETED = rows.HAS_TRITON and rows.INTERPRETED
RUNS = INTERPRETED or (rows.HAS_TRITON and torch.cuda.is_available())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS, reason="needs a CUDA device with Triton")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FORMS = [Form(DTYPE, float8=False), Form(DTYPE, float8=True)]
NAMES = ["16 bits", "float8"]
SIZES = [(129, 256, 336, 4, 2, 64), (70, 1024, 1376, 8, 2, 128)]
"""Tokens, width, features, heads of queries and of keys, head size."""


@pytest.fixture(autouse=True)
def poisoned() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    if DEVICE.type == "cuda":
        torch.full((2**26,), float("nan"), device=DEVICE)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """Within `with plain():` nothing takes the kernels."""

    def context() -> AbstractContextManager[Any]:
        return _Plain(monkeypatch)

    return context


class _Plain:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._scope = patch.context()

    def __enter__(self) -> None:
        patch = self._scope.__enter__()
        for module in (rows, lowrank, loss):
            patch.setattr(module, "by_triton", lambda _: False)

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(None, None, None)


def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * spread).to(dtype)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the norm of the difference; what was not written is NaN and never near."""
    found, expected = found.double(), expected.double()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-20)
    assert error <= tolerance, error.item()


def exact(x: Rows) -> Tensor:
    return x.values.double() if x.scale is None else x.values.double() * x.scale.double()[:, None]


def within(form: Form) -> float:
    """A rounding to `form.dtype`, or to e4m3 where two that are one bit apart before it may part."""
    return (0.08 if INTERPRETED else 0.02) if form.float8 else 4e-3


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows(form: Form, size: tuple[int, ...], plain: Any) -> None:
    count, width, features, heads, key_heads, head = size
    x, delta, dy = normal(count, width, spread=3), normal(count, width), normal(count, width)
    weight = torch.rand(width, device=DEVICE).to(DTYPE) + 0.5
    gate_up, gradient = normal(count, 2 * features, spread=2), normal(count, features)
    qkv = normal(count, (heads + 2 * key_heads) * head)
    cos, sin = torch.rand(2, count, head // 2, device=DEVICE).to(DTYPE)
    index = torch.randperm(count, device=DEVICE)[: count // 2]

    def everything() -> list[Tensor | Rows]:
        made: list[Tensor | Rows] = []
        for second, some in ((None, None), (delta, None), (delta, index), (None, index)):
            made += rows.add_norm(x, second, weight, 1e-5, form, 48, some)
        z, rstd, _ = rows.add_norm(x, delta, weight, 1e-5, form, 48)
        for residual in (None, delta):
            made += rows.norm_backward(dy, z, weight, rstd, residual, form, 16)
        half = dy[: len(index)].contiguous()
        made.append(rows.norm_backward_at(half, z[index], weight, rstd[index], index, count))
        made += [rows.copy(x, form, 16), rows.silu_mul(gate_up, form, 16)]
        made.append(rows.silu_mul_backward(gate_up, gradient, form, 32))
        turned = qkv.clone()
        rows.rope_(turned, cos, sin, heads + key_heads)
        made += [turned, rows.rope_backward(qkv, cos, sin, heads + key_heads, form, 48)]
        return made

    ours = everything()
    with plain():
        twins = everything()
    for found, twin in zip(ours, twins, strict=True):
        if isinstance(found, Rows) and isinstance(twin, Rows):
            near(exact(found), exact(twin), within(form))
            if form.float8:
                assert not found.data[:, found.columns :].view(torch.uint8).any()
        elif isinstance(found, Tensor) and isinstance(twin, Tensor):
            near(found, twin, 4e-3)


SPANS = {
    "q, k, v": (16, ((0, 256), (256, 384), (384, 512))),
    "q and v": (5, ((0, 256), (384, 512))),
    "none": (0, ()),
}


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_products_and_gradients(form: Form, spans: Any) -> None:
    """Against float64, from the numbers that the rows hold."""
    rank, parts = spans
    count, n, k, scale = 129, 512, 256, 2.0
    plan = Plan(n, k, tuple(Span(a, b, i * rank) for i, (a, b) in enumerate(parts)), rank, scale)
    whole = lowrank.storage(plan, form, DEVICE)
    values = normal(n, k, spread=0.02, dtype=torch.float32)
    weight_scale = torch.ones(max(n, k), device=DEVICE)
    if form.float8:
        numbers, found = float8.quantise_matrix(values)
        weight_scale *= found
        whole[:, :k].view(torch.uint8).copy_(numbers.view(torch.uint8))
    else:
        whole[:n, :k] = values
    weight = whole[:n, :k]
    base = weight.double() * weight_scale[0].double()
    pairs = [(normal(rank, k, dtype=torch.float32) / 16, normal(b - a, rank, dtype=torch.float32)) for a, b in parts]
    tops = [(a.abs().max(), b.abs().max()) for a, b in pairs]
    operand: Wide | Float8
    if form.float8:
        operand = Float8(plan, form, weight, weight_scale, pairs, tops, Scratch(plan, form, DEVICE), None)
    else:
        operand = Wide(plan, form, weight, pairs)
    x, dy = rows.copy(normal(count, k), form, plan.columns), rows.copy(normal(count, n), form, plan.columns)
    x64, dy64 = exact(x), exact(dy)

    h, y = operand.down(x), operand.forward(x)
    dh, dx = operand.up(dy), operand.backward(dy)
    expected_y, expected_dx = x64 @ base.t(), dy64 @ base
    halves = 0.02 if INTERPRETED and form.float8 else 8e-3
    gradients: list[Tensor] = []
    for span, (a, b) in zip(plan.spans, pairs, strict=True):
        mine = slice(span.column, span.column + rank)
        down, up = x64 @ a.double().t(), scale * dy64[:, span.start : span.stop] @ b.double()
        near(h[:, mine], down, halves)
        near(dh[:, mine], up, halves)
        expected_y[:, span.start : span.stop] += scale * down @ b.double().t()
        expected_dx += up @ a.double()
        gradients += [up.t() @ x64, scale * dy64[:, span.start : span.stop].t() @ down]
    near(y, expected_y, halves)
    near(dx, expected_dx, halves)
    found = [summed(plan, x, h, dy, dh) for _ in range(2)]
    for once, again, expected in zip(*found, gradients, strict=True):
        near(once, expected, halves)
        assert torch.equal(once, again)


def summed(plan: Plan, x: Rows, h: Tensor, dy: Rows, dh: Tensor) -> list[Tensor]:
    sums = Gradients([plan], DEVICE)
    sums.partial.fill_(float("nan"))
    sums.add_a(0, plan, x, dh)
    sums.add_b(0, plan, dy, h)
    return sums.sums([plan])


@pytest.mark.parametrize(("count", "vocabulary"), [(77, 1000), (300, 5003)])
def test_cross_entropy(count: int, vocabulary: int) -> None:
    hidden = normal(count, 64).requires_grad_()
    weight = normal(vocabulary, 64, spread=0.1)
    targets = torch.randint(0, vocabulary, (count,), device=DEVICE)
    total = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(total, hidden)
    twin = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(twin @ weight.double().t(), targets, reduction="sum")
    near(total, expected, 1e-3)
    near(gradient, torch.autograd.grad(expected, twin)[0], 1.5e-2)
    with torch.no_grad():
        near(linear_cross_entropy(hidden, weight, targets), expected, 1e-3)
