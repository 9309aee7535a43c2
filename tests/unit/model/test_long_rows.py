"""Layers over long rows, piece by piece, against the same layers in whole; and heads in groups against all at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from test_fast import FLOAT8, FP32, QV, adapters, batch, farthest, made, run, whole

from packtrain.kernels import attend, rows
from packtrain.kernels.attention import prepared
from packtrain.model import fast, long_rows

TOKENS = batch().ids.numel()
PIECE = 16
MODELS: dict[str, Callable[[fast.Recompute], Any]] = {
    "all": lambda how: made(FP32, how),
    "all, dropout": lambda how: made(FP32, how, adapters(lora_dropout=0.3)),
    "q and v": lambda how: made(FP32, how, adapters(QV, r=5)),
    "float8": lambda how: made(FLOAT8, how),
    "float8, q and v, dropout": lambda how: made(FLOAT8, how, adapters(QV, r=5, lora_dropout=0.3)),
    "full": lambda how: whole(FP32, how),
    "full, two frozen layers": lambda how: whole(FP32, how, 2),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long begins at 21 tokens, pieces have 16 rows, and every head of keys attends by itself."""
    monkeypatch.setattr(long_rows, "LONG", 20)
    monkeypatch.setattr(long_rows, "PIECE", PIECE)
    monkeypatch.setattr(attend, "SUMS", 4 * 16 * TOKENS)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_equal_the_whole(name: str, recompute: fast.Recompute, short: None) -> None:
    exact = run(MODELS[name]("none"), batch())  # which keeps everything and so goes in whole
    ours = run(MODELS[name](recompute), batch())
    assert torch.equal(ours[0], exact[0])
    assert farthest(ours[1], exact[1]) < 1e-6


def test_the_comparison_can_fail(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = run(made(FP32), batch())
    right = long_rows.pieces
    monkeypatch.setattr(long_rows, "pieces", lambda tokens: [*right(tokens), right(tokens)[0]])
    ours = run(made(FP32, "full"), batch())
    assert torch.equal(ours[0], exact[0])  # a piece done twice gives the same rows
    assert farthest(ours[1], exact[1]) > 1e-2


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_wide_is_never_whole(grad: bool, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for name in ("silu_mul", "silu_mul_backward"):
        exact: Any = getattr(rows, name)
        monkeypatch.setattr(
            rows, name, lambda x, *others, exact=exact: (seen.append(len(x.values)), exact(x, *others))[1]
        )
    model, layers, parts = made(FP32, "full"), 3, -(-TOKENS // PIECE)
    if grad:
        run(model, batch())
    else:
        with torch.no_grad():
            model.eval()(batch())
    assert max(seen) == PIECE
    assert len(seen) == layers * parts * (3 if grad else 1)  # forward, again, backward


def test_evaluation_in_pieces(short: None) -> None:
    with torch.no_grad():
        assert torch.equal(made(FP32, "full").eval()(batch()), made(FP32)(batch()))
        logits = [made(FP32, how).eval()(batch(), logits=True) for how in ("full", "none")]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


def test_gradients_add_up_over_micro_batches(short: None) -> None:
    ours, exact = made(FLOAT8, "full"), made(FLOAT8)
    for data in (batch(), batch((9,), seed=3), batch((30, 9), seed=4)):  # long, short, long
        gradients = run(ours, data)[1], run(exact, data)[1]
    assert farthest(*gradients) < 1e-6


@pytest.mark.parametrize(
    ("heads", "tokens", "parts"),
    [((32, 8, 128), 400_000, 4), ((32, 8, 128), 131_072, 1), ((64, 8, 128), 400_000, 8), ((9, 3, 64), 10**7, 3)],
)
def test_groups_of_heads(heads: tuple[int, int, int], tokens: int, parts: int) -> None:
    assert attend.groups(*heads, tokens) == parts
    queries, keys, head = heads
    assert keys % parts == 0
    assert parts == keys or 4 * head * tokens * queries // parts <= 2**31


def test_groups_attend_as_all_heads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output, and the gradients, which are written over q, k and v."""
    data = prepared(batch(), "sdpa", 0, torch.float32, 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(TOKENS, heads, 16, generator=generator) for heads in (8, 4, 4, 8))
    exact = attend.attend(q, k, v, data)
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    attend.attend_backward(gradient, q, k, v, exact, data, into)
    for parts in (1, 2, 4):
        monkeypatch.setattr(attend, "SUMS", 4 * 16 * TOKENS * 8 // parts)
        assert attend.groups(8, 4, 16, TOKENS) == parts
        ours: tuple[Tensor, ...] = q.clone(), k.clone(), v.clone()
        left = attend.attend_long(*ours, data)
        torch.testing.assert_close(left.out, exact.out, rtol=1e-6, atol=1e-7)
        attend.attend_long_backward(gradient, *ours, left, data)
        for found, expected in zip(ours, into, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_long_row_takes() -> None:
    """400,000 tokens of an 8B model in float8: beside weights and what is kept, under 32 GiB."""
    config = llama_8b()
    took = long_rows.working_bytes(config, 2, 400_000, 121_000)
    assert 24 * 2**30 < took < 32 * 2**30
    assert took < 400_000 * 121_000  # one layer in whole


def llama_8b() -> Any:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return type("Config", (), sizes)
