"""Dropout as a function of (seed, step, row, position, name, column): statistics, and what it does not depend on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from packtrain.kernels.random import _bits, _mix64, dropout, number, token_keys


def keys_of(rows: int, length: int, seed: int = 0, step: int = 0) -> Tensor:
    row = torch.arange(rows).repeat_interleave(length)
    return token_keys(seed, step, row, torch.arange(length).repeat(rows))


def kept(keys: Tensor, columns: int, name: str = "q_proj", p: float = 0.5) -> Tensor:
    return dropout(torch.ones(len(keys), columns), keys, name, p) != 0


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of equal elements; a half where two fair masks are independent."""
    return (a == b).double().mean().item()


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.9])
def test_share_and_scale(p: float) -> None:
    x = torch.randn(1000, 501)
    y = dropout(x, keys_of(10, 100), "q_proj", p)
    mask = y != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs((~mask).double().mean().item() - p) < 4 * deviation + 2**-16
    torch.testing.assert_close(y[mask], x[mask] / (1 - p))
    for axis, count in ((0, 1000), (1, 501)):
        shares = (~mask).double().mean(axis)
        assert shares.std().item() == pytest.approx((p * (1 - p) / count) ** 0.5, rel=0.25)
        assert (shares - p).abs().max().item() < 6 * (p * (1 - p) / count) ** 0.5 + 1 / count


def test_bits_are_uniform_and_unrelated() -> None:
    mask = kept(keys_of(20, 100), 512)
    bound = 5 * 0.5 / (mask.numel() ** 0.5)
    for along in (1, 2, 3, 7, 64):
        assert abs(agreement(mask[:, along:], mask[:, :-along]) - 0.5) < bound * 1.2, f"columns {along} apart"
        assert abs(agreement(mask[along:], mask[:-along]) - 0.5) < bound * 1.2, f"tokens {along} apart"
    pairs = (mask.float() - 0.5) @ (mask.float() - 0.5).T / (0.25 * 512)
    pairs.fill_diagonal_(0)
    assert pairs.abs().max().item() < 6.5 * 512**-0.5  # two million pairs of tokens, none alike


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_every_input_matters(p: float) -> None:
    base = kept(keys_of(4, 50), 300, p=p)
    chance = p * p + (1 - p) * (1 - p)
    others = {
        "seed": kept(keys_of(4, 50, seed=1), 300, p=p),
        "step": kept(keys_of(4, 50, step=1), 300, p=p),
        "name": kept(keys_of(4, 50), 300, "k_proj", p),
        "seed and step swapped": kept(keys_of(4, 50, seed=1, step=0), 300, p=p),
    }
    for what, other in others.items():
        assert abs(agreement(base, other) - chance) < 0.02, what
    assert torch.equal(base, kept(keys_of(4, 50), 300, p=p))
    assert not torch.equal(keys_of(4, 50, seed=1, step=2), keys_of(4, 50, seed=2, step=1))


def test_a_token_is_dropped_alike_in_any_company() -> None:
    keys, x = keys_of(4, 50), torch.randn(200, 33)
    whole = dropout(x, keys, "q_proj", 0.3)
    order = torch.randperm(200)
    assert torch.equal(dropout(x[order], keys[order], "q_proj", 0.3), whole[order])
    assert torch.equal(dropout(x[60:61], keys[60:61], "q_proj", 0.3), whole[60:61])
    assert torch.equal(kept(keys, 33), kept(keys, 80)[:, :33])
    assert dropout(x[:0], keys[:0], "q_proj", 0.3).shape == (0, 33)


def test_gradient_has_the_same_mask() -> None:
    x = torch.randn(50, 21, requires_grad=True)
    keys = keys_of(1, 50)
    y = dropout(x, keys, "q_proj", 0.4)
    weights = torch.randn(50, 21)
    (y * weights).sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) * weights / 0.6)


def test_nothing_but_the_keys_is_kept_for_the_backward() -> None:
    saved = []
    keys, x = keys_of(1, 50), torch.randn(50, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, keys, "q_proj", 0.4)
    assert [t.shape for t in saved] == [keys.shape]


def test_bf16_has_the_mask_of_fp32() -> None:
    keys, x = keys_of(1, 50), torch.randn(50, 64)
    y = dropout(x.bfloat16(), keys, "q_proj", 0.4)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y != 0, dropout(x, keys, "q_proj", 0.4) != 0)


def test_p_zero_is_nothing_and_p_one_is_refused() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, keys_of(1, 3), "q_proj", 0.0) is x
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="outside"):
            dropout(x, keys_of(1, 3), "q_proj", p)


def test_keys_are_distinct_bits() -> None:
    keys = keys_of(300, 300)
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == len(keys)
    bits = (keys[:, None] >> torch.arange(64)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max().item() < 0.01
    assert token_keys(0, 0, torch.tensor([1, 2]), torch.tensor([2, 1])).unique().numel() == 2


def test_another_process_draws_the_same() -> None:
    code = (
        "import torch; from packtrain.kernels.random import *;"
        "k = token_keys(3, 4, torch.tensor([5, 6]), torch.tensor([7, 8]));"
        "print(k.tolist(), dropout(torch.ones(2, 9), k, 'a.b', 0.5).tolist())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    keys = token_keys(3, 4, torch.tensor([5, 6]), torch.tensor([7, 8]))
    assert outputs == {f"{keys.tolist()} {dropout(torch.ones(2, 9), keys, 'a.b', 0.5).tolist()}\n"}


def test_mixing_is_murmur3_and_splitmix64() -> None:
    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    numbers = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    assert [x % 2**64 for x in _mix64(numbers).tolist()] == [splitmix(x % 2**64) for x in numbers.tolist()]
    found = _bits(numbers, "name", 7)
    for token, key in enumerate(numbers.tolist()):
        word = splitmix((key ^ number("name")) % 2**64)
        for column in range(7):
            h = (word % 2**32) ^ (column // 2 * 0x9E3779B1 % 2**32)
            h = ((h ^ (h >> 16)) * 0x85EBCA6B + (word >> 32)) % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            h ^= h >> 16
            assert found[token, column].item() % 2**16 == (h >> (16 * (column % 2))) % 2**16
