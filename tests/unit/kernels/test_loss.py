"""The chunked head against float64, and what it holds in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from packtrain.kernels import loss as kernel
from packtrain.kernels.loss import linear_cross_entropy


def inputs(n: int, d: int, v: int, r: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + d + v)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    return {
        "hidden": normal(n, d),
        "weight": normal(v, d, spread=d**-0.5),
        "bias": normal(v),
        "columns": normal(n, r),
        "b": normal(v, r),
    }


def targets(n: int, v: int) -> Tensor:
    return torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(n))


def reference(given: dict[str, Tensor], wanted: Tensor, parts: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in float64, all logits at once."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    logits = exact["hidden"] @ exact["weight"].T
    if "bias" in parts:
        logits = logits + exact["bias"]
    if "low_rank" in parts:
        logits = logits + exact["columns"] @ exact["b"].T
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    (2.5 * loss).backward()
    return loss, {name: tensor.grad for name, tensor in exact.items() if tensor.grad is not None}


def run(given: dict[str, Tensor], wanted: Tensor, parts: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = linear_cross_entropy(
        given["hidden"],
        given["weight"],
        wanted,
        bias=given["bias"] if "bias" in parts else None,
        low_rank=(given["columns"], given["b"]) if "low_rank" in parts else None,
    )
    (2.5 * loss).backward()
    return loss, {name: tensor.grad for name, tensor in given.items() if tensor.grad is not None}


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 20),
    v=st.integers(2, 40),
    rows=st.integers(1, 9),
    parts=st.sets(st.sampled_from(["bias", "low_rank"])),
)
def test_equals_float64(n: int, d: int, v: int, rows: int, parts: set[str]) -> None:
    given, wanted = inputs(n, d, v), targets(n, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_LOGITS", rows * v)
        loss, gradients = run(given, wanted, parts)
    exact, exact_gradients = reference(given, wanted, parts)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in exact_gradients.items():
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=1e-5)


def test_low_rank_is_appended_columns() -> None:
    given, wanted = inputs(20, 8, 30), targets(20, 30)
    joined = linear_cross_entropy(
        torch.cat([given["hidden"], given["columns"]], 1), torch.cat([given["weight"], given["b"]], 1), wanted
    )
    loss, _ = run(given, wanted, {"low_rank"})
    assert loss.item() == pytest.approx(joined.item(), rel=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "b"])
def test_gradients_of_what_needs_them(frozen: str) -> None:
    given, wanted = inputs(12, 8, 30), targets(12, 30)
    _, exact = reference(given, wanted, {"low_rank"})
    given[frozen].requires_grad_(False)
    _, gradients = run(given, wanted, {"low_rank"})
    assert gradients.keys() == exact.keys() - {frozen}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-4, atol=1e-5)


def test_bf16_sums_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    given, wanted = inputs(512, 16, 64, dtype=torch.bfloat16), targets(512, 64)
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 2 * 64)
    loss, gradients = run(given, wanted, {"low_rank"})
    exact, exact_gradients = reference(given, wanted, {"low_rank"})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for name, gradient in exact_gradients.items():
        assert gradients[name].dtype == torch.bfloat16
        error = (gradients[name].double() - gradient).norm() / gradient.norm()
        assert error < 6e-3, name  # summed in bf16, 256 chunks give 1.6e-2 for the weight


def test_without_tokens_the_loss_is_a_connected_zero() -> None:
    given = inputs(0, 8, 30)
    loss, gradients = run(given, torch.empty(0, dtype=torch.int64), {"bias", "low_rank"})
    assert loss.item() == 0.0
    assert gradients.keys() == given.keys()
    for name, gradient in gradients.items():
        assert gradient.shape == given[name].shape
        assert not gradient.any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    n, d, v = 64, 4, 100
    given, wanted = inputs(n, d, v, dtype=dtype), targets(n, v)
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", 8 * v)
    with Largest() as watched:
        run(given, wanted, {"bias", "low_rank"})
    assert watched.elements == 8 * v
    with Largest() as watched:
        F.cross_entropy(given["hidden"] @ given["weight"].T, wanted, reduction="sum")
    assert watched.elements == n * v


def test_evaluation_makes_no_gradient() -> None:
    given, wanted = inputs(20, 8, 30), targets(20, 30)
    calls = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        loss = linear_cross_entropy(given["hidden"], given["weight"], wanted)
    assert not loss.requires_grad
    assert calls.count(torch.ops.aten.mm.default) == 1
    assert torch.ops.aten.exp_.default not in calls


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
        loss = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), torch.zeros(20, dtype=torch.int64))
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
