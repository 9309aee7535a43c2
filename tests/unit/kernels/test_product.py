"""Products by oneDNN against torch's in float64, and who gets torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from packtrain.kernels import product
from packtrain.kernels.product import linear, times


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 70),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    learns=st.booleans(),
    biased=st.booleans(),
    strided=st.booleans(),
)
def test_values_and_gradients(tokens: int, sizes: tuple[int, int], learns: bool, biased: bool, strided: bool) -> None:
    n, k = sizes
    x, weight, bias = drawn(tokens, k + 3 * strided)[:, :k], drawn(n, k, seed=1), drawn(n, seed=2)
    inputs = [x.requires_grad_(), weight.requires_grad_(learns), *([bias.requires_grad_(learns)] if biased else [])]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    found, expected = linear(*inputs), F.linear(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradient = drawn(n, tokens, seed=3).t()  # as a backward may get it: its columns are rows in memory
    wanted = [t for t in inputs if t.requires_grad]
    ours = torch.autograd.grad(found, wanted, gradient)
    theirs = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], gradient.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_is_one_number_expanded() -> None:
    x, weight = drawn(5, 7).requires_grad_(), drawn(3, 7, seed=1)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 7))


def test_a_transposed_weight_and_memory_of_ones_own() -> None:
    x, weight = drawn(9, 6), drawn(6, 11, seed=1)
    out = torch.full((20, 11), torch.nan)
    torch.testing.assert_close(times(x, weight.t(), out=out[4:13]), x @ weight)
    torch.testing.assert_close(out[4:13], x @ weight)
    assert out[:4].isnan().all()
    assert out[13:].isnan().all()


@pytest.mark.skipif(product._ONEDNN is None, reason="torch was built without oneDNN")
def test_who_gets_what(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = product._ONEDNN

    def counted(*args: object) -> Tensor:
        calls.append(1)
        made: Tensor = own(*args)
        return made

    monkeypatch.setattr(product, "_ONEDNN", counted)
    x, weight = drawn(4, 8), drawn(6, 8, seed=1)
    linear(x, weight)
    assert len(calls) == 1
    linear(x.bfloat16(), weight.bfloat16())
    linear(x[:0], weight)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 4 * 8 * 6
    assert len(calls) == 1
