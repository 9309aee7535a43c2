"""AdamW in bf16: what it learns beside fp32 masters, its moments beside float64, its remainders to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from packtrain.batch import Batch
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw
from packtrain.optim import Optimizer, anyprecision

FINE, REFUSED = torch.tensor(0.0), torch.tensor(1.0)
CONFIG = LlamaConfig.from_dict(
    tiny.SIZES | {"vocab_size": 128, "initializer_range": 0.02, "architectures": ["LlamaForCausalLM"]}
)


def batch(rows: int = 8, length: int = 16) -> Batch:
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(0))
    index = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    return Batch(
        ids=ids,
        positions=torch.arange(length).repeat(rows, 1),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        lengths=(length,) * rows,
        max_seqlen=length,
        whole_rows=True,
        index=index,
        targets=ids.view(-1)[index + 1],
        keys=torch.zeros_like(ids),
        tokens=rows * length,
        rows=tuple(range(rows)),
    )


def learned(rule: str, use_kahan: bool = True, steps: int = 60) -> float:
    """How far the loss of a bf16 Llama falls at lr 1e-5, computed in fp32 from the weights that it has."""
    model = LlamaForCausalLM(CONFIG, dtype=torch.bfloat16, device=torch.device("cpu"))
    draw(model, 0)
    exact, rows = LlamaForCausalLM(CONFIG, dtype=torch.float32, device=torch.device("cpu")), batch()

    def loss() -> float:
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            return float(exact(rows)) / rows.count

    optimizer = Optimizer(dict(model.named_parameters()), lr=1e-5, rule=rule, use_kahan=use_kahan)
    before = loss()
    for _ in range(steps):
        (model(rows) / rows.count).backward()
        optimizer.step(FINE)
        optimizer.zero_grad()
    return before - loss()


def test_it_learns_what_fp32_masters_learn_and_without_remainders_it_does_not() -> None:
    masters = learned("AdamW")
    assert masters > 0.05
    assert learned("anyprecision") >= 0.99 * masters
    assert learned("anyprecision", use_kahan=False) < 0.5 * masters


def moments(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) after these gradients, over the same in float64, each the mean over elements."""
    weight = nn.Parameter(torch.zeros_like(gradients[0], dtype=torch.bfloat16))
    optimizer = Optimizer({"w": weight}, lr=0.0, rule="anyprecision")
    mean, square = torch.zeros_like(gradients[0]).double(), torch.zeros_like(gradients[0]).double()
    for gradient in gradients:
        weight.backward(gradient.bfloat16())
        optimizer.step(FINE)
        optimizer.zero_grad()
        exact = gradient.bfloat16().double()
        mean, square = 0.9 * mean + 0.1 * exact, 0.999 * square + 0.001 * exact**2
    state = optimizer.state()["w"]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    return (state["exp_avg"].double() / mean).mean(), (state["exp_avg_sq"].double() / square).mean()


def test_moments_follow_the_gradient_where_rounding_to_nearest_would_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    constant = [torch.rand(2048, generator=draws) + 0.5] * 200
    falling = [(torch.rand(2048, generator=draws) + 0.5) * (10 if step < 100 else 1) for step in range(600)]
    assert moments(constant)[0] == pytest.approx(1, abs=2e-3)
    assert moments(falling)[1] == pytest.approx(1, abs=2e-2)
    monkeypatch.setattr(anyprecision, "_round_", lambda value, chance: None)
    assert moments(constant)[0] < 0.98
    assert moments(falling)[1] > 1.2


def test_the_hash_makes_every_bit_a_fair_coin_whatever_the_values() -> None:
    values = torch.linspace(1, 1.1, 13).bfloat16().float()  # neighbours, low bits all zero
    hashed = torch.stack([anyprecision._hash(values, torch.tensor(float(step))) for step in range(4000)])
    bits = torch.stack([(hashed >> bit) & 1 for bit in range(32)]).double()
    assert (bits.mean((1, 2)) - 0.5).abs().max() < 0.01
    assert (anyprecision._hash(torch.zeros(1), torch.tensor(1.0)) != 0).all()


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()


def train(model: nn.Module, steps: range, **settings: Any) -> Optimizer:
    optimizer = Optimizer(dict(model.named_parameters()), rule="anyprecision", **({"lr": 1e-3} | settings))
    run(model, optimizer, steps)
    return optimizer


def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step(FINE)
        optimizer.zero_grad()


def test_weight_and_remainder_hold_every_fp32_value() -> None:
    weight = torch.zeros(100_000, dtype=torch.bfloat16)
    store = anyprecision._Store([(0, weight)], use_kahan=True)
    exact = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 100_000)
    exact[:4] = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8])  # the last two half way between bf16 numbers
    (bucket,) = store.buckets
    store.write(bucket, exact)
    assert torch.equal(store.read(bucket), exact)
    assert ((weight.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_exact_moments_it_is_adamw(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's, decay and bias correction too: over fp32 weights, and over bf16 ones beside fp32 masters."""
    monkeypatch.setattr(anyprecision, "MOMENTS", torch.float32)
    monkeypatch.setattr(anyprecision, "_round_", lambda value, chance: None)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = net(dtype), net(dtype)
    train(ours, range(10), **settings)
    run(theirs, Optimizer(dict(theirs.named_parameters()), **settings), range(10))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-8)


def test_a_refused_step_changes_nothing() -> None:
    model = net(torch.bfloat16)
    optimizer = train(model, range(3))
    weights = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in state.items()} for state in optimizer.state().values()]
    backward(model, 3)
    optimizer.gradients()[1][0] = math.nan
    optimizer.step(REFUSED)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for before, after in zip(states, optimizer.state().values(), strict=True):
        assert before.keys() == after.keys() == {"step", "exp_avg", "exp_avg_sq", "remainder"}
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_buckets_and_ranks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are cut wherever a bucket is full, and a shard holds some of the rows."""
    whole = net(torch.bfloat16)
    train(whole, range(5))
    monkeypatch.setattr(anyprecision, "BUCKET", 8)
    cut = net(torch.bfloat16)
    train(cut, range(5))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_state_can_be_restored() -> None:
    models = net(torch.bfloat16), net(torch.bfloat16)
    first, second = train(models[0], range(4)), train(models[1], range(0))
    models[1].load_state_dict(models[0].state_dict())
    for name, state in first.state().items():
        for key, value in state.items():
            second.state()[name][key].copy_(value)
    for model, optimizer in zip(models, (first, second), strict=True):
        run(model, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_adapters_in_fp32_beside_a_bf16_base_have_no_remainder() -> None:
    model = nn.ModuleDict({"base": nn.Linear(3, 2).bfloat16(), "adapter": nn.Linear(3, 2)})
    optimizer = Optimizer(dict(model.named_parameters()), lr=0.1, rule="anyprecision")
    kept = {name: set(state) for name, state in optimizer.state().items()}
    assert kept["base.weight"] == {"step", "exp_avg", "exp_avg_sq", "remainder"}
    assert kept["adapter.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    model["adapter"](torch.ones(1, 3)).sum().backward()
    before = model["adapter"].weight.detach().clone()
    optimizer.step(FINE)
    torch.testing.assert_close(model["adapter"].weight, before - 0.1)
