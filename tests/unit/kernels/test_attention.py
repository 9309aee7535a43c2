"""Attention inside documents against a masked float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packtrain.batch import Batch
from packtrain.kernels import attention_cpu
from packtrain.kernels.attention import attention


def batch_of(lengths: tuple[int, ...], rows: int = 1, whole_rows: bool = False) -> Batch:
    """Documents that tile `rows` rows; attention reads nothing but shapes and lengths."""
    flat = torch.zeros(rows, sum(lengths) // rows, dtype=torch.int64)
    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    none = torch.empty(0, dtype=torch.int64)
    return Batch(flat, flat, edges, lengths, max(lengths), whole_rows, none, none, flat, flat.numel(), ())


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with one mask over all T x T scores, float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    document = torch.repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(document))
    allowed = (document[:, None] == document) & (place[:, None] >= place)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def qkv(tokens: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    """As the model makes them: views of one product."""
    flat = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=torch.Generator().manual_seed(tokens))
    parts = flat.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    return [part.view(tokens, -1, width) for part in parts]


def compare(lengths: tuple[int, ...], heads: int, kv_heads: int, width: int, batch: Batch) -> None:
    inputs = qkv(sum(lengths), heads, kv_heads, width)
    found = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    output, expected = attention(*found, batch), reference(*exact, lengths)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention(*inputs, batch), output.detach(), rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5).map(tuple),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([2, 8, 20]),
)
def test_documents(lengths: tuple[int, ...], kv_heads: int, group: int, width: int) -> None:
    compare(lengths, kv_heads * group, kv_heads, width, batch_of(lengths))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_whole_rows(heads: tuple[int, int]) -> None:
    compare((12, 12, 12), *heads, 8, batch_of((12, 12, 12), rows=3, whole_rows=True))


@pytest.mark.parametrize("lengths", [(1, 2, 3, 4, 5, 16), (9, 4), (1,)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_gradients_by_blocks(lengths: tuple[int, ...], heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "LEAST", 1)
    monkeypatch.setattr(attention_cpu, "BLOCK", 4)
    monkeypatch.setattr(attention_cpu, "MOST_THREADS", torch.get_num_threads())
    compare(lengths, *heads, 8, batch_of(lengths))
    compare(lengths[:1] * 3, *heads, 8, batch_of(lengths[:1] * 3, rows=3, whole_rows=True))


def test_who_goes_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "MOST_THREADS", torch.get_num_threads())
    long, short = (torch.zeros(1, length, 2, 8).requires_grad_() for length in (300, 30))
    assert attention_cpu.suits(long, long, long)
    assert not attention_cpu.suits(short, short, short)
    assert not attention_cpu.suits(*[long.detach()] * 3)
    assert not attention_cpu.suits(*[long.bfloat16()] * 3)
    with torch.no_grad():
        assert not attention_cpu.suits(long, long, long)
    monkeypatch.setattr(attention_cpu, "MOST_THREADS", torch.get_num_threads() - 1)
    assert not attention_cpu.suits(long, long, long)


def test_a_document_gives_the_same_bits_beside_any_other() -> None:
    inputs: list[Any] = qkv(30, 6, 2, 8)
    others = [torch.cat([torch.randn(7, *x.shape[1:]), x[7:19], torch.randn(11, *x.shape[1:])]) for x in inputs]
    batch = batch_of((7, 12, 11))
    assert torch.equal(attention(*inputs, batch)[7:19], attention(*others, batch)[7:19])
    assert not torch.equal(attention(*inputs, batch)[:7], attention(*others, batch)[:7])


def test_bf16() -> None:
    inputs = [x.bfloat16() for x in qkv(30, 6, 2, 8)]
    output = attention(*inputs, batch_of((10, 20)))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), reference(*inputs, (10, 20)), rtol=2e-2, atol=2e-2)
