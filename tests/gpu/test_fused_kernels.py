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
from torch._subclasses.fake_tensor import FakeTensorMode

from packtrain.kernels import adapter_gradients, dropped, float8, loss, lowrank, rows
from packtrain.kernels.adapter_gradients import SPLITS, Gradients
from packtrain.kernels.dropped import Drop
from packtrain.kernels.head import Float8Head, HeadScale
from packtrain.kernels.loss import linear_cross_entropy
from packtrain.kernels.lowrank import Float8, Plan, Scratch, Span, Wide
from packtrain.kernels.random import dropout, number
from packtrain.kernels.rows import Form, Raw, Rows
from packtrain.train.flops import Count

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
        for module in (rows, lowrank, adapter_gradients, dropped, loss):
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
@pytest.mark.parametrize("scaled", [False, True], ids=["", "rows with scales"])
def test_rows(form: Form, size: tuple[int, ...], scaled: bool, plain: Any) -> None:
    count, width, features, heads, key_heads, head = size
    x, delta, dy = normal(count, width, spread=3), normal(count, width), normal(count, width)
    weight = torch.rand(width, device=DEVICE).to(DTYPE) + 0.5
    gate_up, gradient = normal(count, 2 * features, spread=2), normal(count, features)
    qkv = normal(count, (heads + 2 * key_heads) * head)
    cos, sin = torch.rand(2, count, head // 2, device=DEVICE).to(DTYPE)
    index = torch.randperm(count, device=DEVICE)[: count // 2]
    scales = [torch.rand(count, device=DEVICE) + 0.5 if scaled else None for _ in range(4)]

    def raw(values: Tensor, place: int) -> Raw:
        return Raw(values, scales[place])

    def everything() -> list[Tensor | Rows | None]:
        made: list[Tensor | Rows | None] = []
        for second, some in ((None, None), (delta, None), (delta, index), (None, index)):
            change = None if second is None else raw(second, 0)
            made += rows.add_norm(x, change, weight, 1e-5, form, 48, some)
        z, rstd, _ = rows.add_norm(x, raw(delta, 0), weight, 1e-5, form, 48)
        for residual in (None, delta):
            for learns in (False, True):
                weight.requires_grad_(learns)
                made += rows.norm_backward(raw(dy, 1), z, weight, rstd, residual, form, 16)
                half = dy[: len(index)].contiguous()
                made += rows.norm_backward_at(half, z[index], weight, rstd[index], index, count)
        made += [rows.copy(x, form, 16), rows.silu_mul(raw(gate_up, 2), form, 16)]
        made.append(rows.silu_mul_backward(raw(gate_up, 2), raw(gradient, 3), form, 32))
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
        elif found is None or twin is None:
            assert found is twin
        elif isinstance(found, Tensor) and isinstance(twin, Tensor):
            near(found, twin, 4e-3)


SPANS = {
    "q, k, v": (16, ((0, 256), (256, 384), (384, 512))),
    "q and v": (5, ((0, 256), (384, 512))),
    "none": (0, ()),
}


SPREADS = {"fresh": (1 / 16, 0.01), "large B": (1 / 16, 1.0), "larger": (0.5, 20.0), "huge A": (1e4, 0.0)}
"""Of A and B, beside weights of 0.02."""


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("spreads", SPREADS.values(), ids=SPREADS)
def test_products_and_gradients(form: Form, spans: Any, spreads: tuple[float, float]) -> None:
    """Against float64, from the numbers that the rows hold; some adapters are beyond what a float8 row has room for."""
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
    of_a, of_b = spreads
    pairs = [
        (normal(rank, k, spread=of_a, dtype=torch.float32), normal(b - a, rank, spread=of_b, dtype=torch.float32))
        for a, b in parts
    ]
    tops = [(a.abs().max(), b.abs().max()) for a, b in pairs]
    operand: Wide | Float8
    if form.float8:
        operand = Float8(plan, form, weight, weight_scale, pairs, tops, Scratch(plan, form, DEVICE), None)
    else:
        operand = Wide(plan, form, weight, pairs)
    x, dy = rows.copy(normal(count, k), form, plan.columns), rows.copy(normal(count, n), form, plan.columns)
    x64, dy64 = exact(x), exact(dy)
    before = Rows(dy.data.clone(), None if dy.scale is None else dy.scale.clone(), dy.columns)

    h, y, raw_y = operand.down(x), operand.forward(x), operand.raw_forward(x)
    dh, dx, raw_dx = operand.up(dy), operand.backward(dy), operand.raw_backward(dy)
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
    near(raw_y.exact(), expected_y, halves)
    near(raw_dx.exact(), expected_dx, halves)
    assert (raw_y.scale is not None) == (raw_dx.scale is not None) == form.float8
    found = [summed(plan, x, h, before, dh) for _ in range(2)]
    for once, again, expected in zip(*found, gradients, strict=True):
        near(once, expected, halves)
        assert torch.equal(once, again)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize(("count", "parts", "spread"), [(129, (512, 1024, 1536), 0.01), (70, (9216,), 20.0)])
def test_up_and_gradient(form: Form, count: int, parts: tuple[int, ...], spread: float) -> None:
    """In 16 bits in one pass, since the parts allow it; against float64, with fresh and with large adapters."""
    rank, n, k, scale = 16, parts[-1], 256, 2.0
    starts = (0, *parts[:-1])
    plan = Plan(
        n, k, tuple(Span(a, b, i * rank) for i, (a, b) in enumerate(zip(starts, parts, strict=True))), rank, scale
    )
    pairs = [
        (normal(rank, k, spread=1 / 16, dtype=torch.float32), normal(b - a, rank, spread=spread, dtype=torch.float32))
        for a, b in zip(starts, parts, strict=True)
    ]
    weight = lowrank.storage(plan, form, DEVICE)[:n, :k]
    weight.view(torch.uint8)[:] = 0
    tops, ones = [(a.abs().max(), b.abs().max()) for a, b in pairs], torch.ones(n, device=DEVICE)
    operand: Wide | Float8
    if form.float8:
        operand = Float8(plan, form, weight, ones, pairs, tops, Scratch(plan, form, DEVICE), None)
    else:
        operand = Wide(plan, form, weight, pairs)
    dy, h = rows.copy(normal(count, n), form, plan.columns), normal(count, plan.columns)
    dy64, h64 = exact(dy), h.double()
    found: list[list[Tensor]] = []
    for _ in range(2):
        fresh = Rows(dy.data.clone(), None if dy.scale is None else dy.scale.clone(), dy.columns)
        sums = Gradients([plan], DEVICE)
        sums.partial.fill_(float("nan"))
        dh = adapter_gradients.up_and_gradient(operand, fresh, h, sums, 0)
        found.append([dh, operand.backward(fresh), *sums.sums([plan])[1::2]])
    assert all(torch.equal(once, again) for once, again in zip(*found, strict=True))
    dh, dx, *gradients = found[0]
    halves, expected_dx = 0.02 if INTERPRETED and form.float8 else 8e-3, torch.zeros_like(dx, dtype=torch.float64)
    for span, (a, b), gradient in zip(plan.spans, pairs, gradients, strict=True):
        mine, part = slice(span.column, span.column + rank), dy64[:, span.start : span.stop]
        near(dh[:, mine], scale * part @ b.double(), halves)
        near(gradient, scale * part.t() @ h64[:, mine], 8e-3)
        expected_dx += scale * part @ b.double() @ a.double()
    near(dx, expected_dx, halves)


def summed(plan: Plan, x: Rows, h: Tensor, dy: Rows, dh: Tensor) -> list[Tensor]:
    sums = Gradients([plan], DEVICE)
    sums.partial.fill_(float("nan"))
    sums.add_a(0, plan, x, dh)
    sums.add_b(0, plan, dy, h)
    return sums.sums([plan])


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize(("rank", "parts"), [(16, 3), (5, 1)])
def test_adapters_with_a_dropout(form: Form, rank: int, parts: int, plain: Any) -> None:
    """The masks are kernels/random.py's own: nothing but rounding parts the two."""
    count, k = 71, 336
    drop = Drop(torch.randint(-(2**62), 2**62, (count,), device=DEVICE), ("q_proj", "layer.k", "v")[:parts], 0.3)
    a = [normal(rank, k, dtype=torch.float32) / 16 for _ in range(parts)]
    columns = -(-rank * parts // 8) * 8
    x, dh, dx = rows.copy(normal(count, k), form, columns), normal(count, columns + 8), normal(count, k)

    def everything() -> list[Tensor]:
        h = torch.full((count, columns), float("nan"), dtype=DTYPE, device=DEVICE)
        dropped.down(x, a, drop, h)
        up = dx.clone()
        dropped.add_up(up, dh, a, drop)
        partial = torch.full((SPLITS, parts * rank * k + 9), float("nan"), device=DEVICE)
        dropped.gradient(x, dh, rank, drop, partial[:, : parts * rank * k])
        return [h, up, partial[:, : parts * rank * k].sum(0), *(h[:, i * rank : (i + 1) * rank] for i in range(parts))]

    ours = everything()
    with plain():
        twins = everything()
    for found, twin in zip(ours, twins, strict=True):
        near(found, twin, 1e-2)
    assert (dropout(x.values.float(), drop.keys, "q_proj", 0.3) == 0).float().mean() > 0.25


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_torch_sees_what_the_kernels_multiply(form: Form, plain: Any) -> None:
    """By their operations: the FLOPs are the plain twins', and fake tensors are left alone."""
    count, rank, n, k = 70, 8, 1536, 256
    plan = Plan(n, k, tuple(Span(i * 512, i * 512 + 512, i * rank) for i in range(3)), rank, 2.0)
    columns = plan.columns

    def step(device: torch.device) -> None:
        drop = Drop(torch.zeros(count, dtype=torch.int64, device=device), ("q", "k", "v"), 0.3)
        zeros = [torch.zeros(size, dtype=DTYPE, device=device) for size in ((count, k), (count, n), (count, columns))]
        x, dy = (rows.copy(values, form, columns) for values in zeros[:2])
        pairs = [(torch.zeros(rank, k, device=device), torch.zeros(512, rank, device=device)) for _ in range(3)]
        tops, sums = [(a.abs().max(), b.abs().max()) for a, b in pairs], Gradients([plan], device)
        weight, scale = lowrank.storage(plan, form, device)[:n, :k], torch.ones(n, device=device)
        scratch = Scratch(plan, form, device)
        for dropping in (None, drop):
            operand: Wide | Float8 = (
                Float8(plan, form, weight, scale, pairs, tops, scratch, None, dropping)
                if form.float8
                else Wide(plan, form, weight, pairs, dropping)
            )
            operand.down(x)
            dh = adapter_gradients.up_and_gradient(operand, dy, zeros[2], sums, 0)
            operand.backward(dy)
            sums.add_a(0, plan, x, dh, dropping)

    counts = [Count(), Count(), Count()]
    with counts[0]:
        step(DEVICE)
    with plain(), counts[1]:
        step(DEVICE)
    with FakeTensorMode(), counts[2]:
        step(DEVICE)
    # One kernel of the 16-bit form leaves out the zeros beside each adapter, which a twin multiplies.
    zeros = 0 if form.float8 else 2 * 2 * count * n * (columns - rank)
    assert counts[0].flops == counts[1].flops - zeros == counts[2].flops > 0


def test_operations_say_what_they_write() -> None:
    x, h, b, a = normal(70, 512), normal(70, 8), normal(512, 8), normal(8, 512, dtype=torch.float32)
    keys, out = torch.arange(70, device=DEVICE), torch.zeros(SPLITS, 8 * 512, device=DEVICE)
    ours, name = torch.ops.packtrain, number("q_proj")
    for operation, arguments in (
        (ours.low_rank_gradient, (x, None, h, 8, out, [1, 8], 2.0)),
        (ours.low_rank_up_gradient, (x, h, b, 8, [], torch.empty_like(h), out, 2.0)),
        (ours.dropped_down, (x, a, keys, name, 0.3, torch.empty_like(h))),
        (ours.dropped_add_up, (x.clone(), h, a, 8, keys, [name], 0.3)),
        (ours.dropped_gradient, (x, None, h, keys, name, 0.3, out)),
    ):
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("count", "vocabulary"), [(77, 1000), (300, 5003)])
def test_cross_entropy(count: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, the last one short; with the head's gradient, which is summed over them."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * vocabulary)
    hidden = normal(count, 64).requires_grad_()
    weight = normal(vocabulary, 64, spread=0.1).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), device=DEVICE)
    twins = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(twins[0] @ twins[1].t(), targets, reduction="sum")
    exact_gradients = torch.autograd.grad(expected, twins)
    for learning in ([hidden], [hidden, weight]):
        total = linear_cross_entropy(hidden, weight if len(learning) == 2 else weight.detach(), targets)
        near(total, expected, 1e-3)
        for found, gradient in zip(torch.autograd.grad(total, learning), exact_gradients, strict=False):
            near(found, gradient, 1.5e-2)
    with torch.no_grad():
        near(linear_cross_entropy(hidden, weight, targets), expected, 1e-3)


@pytest.mark.parametrize(("count", "vocabulary"), [(77, 1000), (300, 5003)])
def test_the_gradient_through_a_head_in_float8(count: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks; the weight's numbers are the twin's, and what is beyond the vocabulary is zero."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * vocabulary)
    monkeypatch.setattr(loss, "FEW", 1)
    hidden, weight = normal(count, 64).requires_grad_(), normal(vocabulary, 64, spread=0.1)
    targets = torch.randint(0, vocabulary, (count,), device=DEVICE)
    scale = HeadScale()(weight)
    made, twin = Float8Head.of(weight, scale), Float8Head.of(weight.cpu(), scale.cpu())
    if not INTERPRETED:  # it truncates
        assert torch.equal(made.numbers.cpu().view(torch.uint8), twin.numbers.view(torch.uint8))
    assert not made.numbers[:, vocabulary:].float().any()
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="sum")
    total = linear_cross_entropy(hidden, weight, targets, scale=scale)
    assert torch.equal(total, linear_cross_entropy(hidden.detach(), weight, targets))
    near(torch.autograd.grad(total, hidden)[0], torch.autograd.grad(expected, exact)[0], 0.12 if INTERPRETED else 6e-2)
