"""torchao's AdamW beside torch's: over masters and plain values, refused steps, and what is said without torchao."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from packtrain.errors import UserError
from packtrain.optim import Optimizer, problems, rules

FINE, REFUSED = torch.tensor(0.0), torch.tensor(1.0)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its update, which takes a minute on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def learn(net: nn.Module, rule: str, steps: int) -> tuple[float, Optimizer]:
    """The loss after some steps, with a falling learning rate."""
    optimizer = Optimizer(dict(net.named_parameters()), lr=1e-3, weight_decay=0.1, rule=rule)
    dtype = next(net.parameters()).dtype
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(steps + 1):
        optimizer.set_lr(1e-3 / (1 + step))
        loss = (net(x) - x).float().square().mean()
        if step < steps:
            loss.backward()
            optimizer.step(FINE)
            optimizer.zero_grad()
    return loss.item(), optimizer


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_as_adamw_does_with_moments_of_one_byte(dtype: torch.dtype) -> None:
    before, _ = learn(model(dtype), "AdamW", 0)
    exact, _ = learn(model(dtype), "AdamW", 20)
    loss, optimizer = learn(model(dtype), "adamw8bit", 20)
    assert before - loss == pytest.approx(before - exact, rel=0.02)
    state = optimizer.state()["0.weight"]
    assert state["step"] == 20
    assert state["exp_avg_codes"].dtype == state["exp_avg_sq_codes"].dtype == torch.uint8
    assert state["exp_avg_codes"].shape == (128, 64)
    assert state["exp_avg_scales"].shape == (128, 1)
    assert ("master" in state) == (dtype == torch.bfloat16)
    assert optimizer.state()["0.bias"]["exp_avg"].dtype == torch.float32


@needs_torchao
def test_rows_have_the_same_codes_wherever_they_are() -> None:
    gradient = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    whole, top, bottom, nothing = (
        nn.Parameter(torch.ones(len(rows), 96)) for rows in (gradient, gradient[:1], gradient[1:], gradient[:0])
    )
    optimizer = Optimizer({"whole": whole, "top": top, "bottom": bottom, "nothing": nothing}, lr=1e-3, rule="adamw8bit")
    for _ in range(3):
        for parameter, rows in ((whole, gradient), (top, gradient[:1]), (bottom, gradient[1:])):
            parameter.grad = rows.clone()
        optimizer.step(FINE)
        optimizer.zero_grad()
    states = optimizer.state()
    for key in ("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"):
        assert torch.equal(states["whole"][key], torch.cat([states["top"][key], states["bottom"][key]])), key
    assert torch.equal(whole, torch.cat([top, bottom]))


@needs_torchao
def test_state_can_be_restored() -> None:
    nets = model(torch.float32), model(torch.float32)
    first, second = learn(nets[0], "adamw8bit", 3)[1], learn(nets[1], "adamw8bit", 0)[1]
    nets[1].load_state_dict(nets[0].state_dict())
    for name, state in first.state().items():
        for key, value in state.items():
            second.state()[name][key].copy_(value)
    for net, optimizer in zip(nets, (first, second), strict=True):
        net(torch.ones(1, 64)).sum().backward()
        optimizer.set_lr(1e-3)
        optimizer.step(FINE)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@needs_torchao
def test_a_refused_step_changes_nothing() -> None:
    net = model(torch.float32)
    _, optimizer = learn(net, "adamw8bit", 2)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(1, 64)).sum().backward()
    optimizer.step(REFUSED)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert optimizer.state()["0.weight"]["step"] == 2
    optimizer.clear()
    optimizer.step(FINE)
    assert not torch.equal(before[0], net[0].weight)


def test_without_torchao_the_command_that_helps_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "has_torchao", lambda: False)
    monkeypatch.setattr("packtrain.optim.optimizer.has_torchao", lambda: False)
    (problem,) = problems("adamw8bit")
    assert "pip install torchao" in problem
    assert problems("AdamW") == problems("anyprecision") == []
    with pytest.raises(UserError, match="pip install torchao"):
        Optimizer({"w": nn.Parameter(torch.ones(1))}, lr=1.0, rule="adamw8bit")
