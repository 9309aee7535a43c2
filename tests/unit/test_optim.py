"""The optimizer against torch's own AdamW, its refusals, its fp32 copies, and the schedules against transformers'."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from packtrain.distributed.place import Place
from packtrain.optim import SCHEDULERS, Optimizer, clip_factor, grad_norm, not_finite, schedule

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
FINE, REFUSED = torch.tensor(0.0), torch.tensor(1.0)
ALONE = cast(Place, SimpleNamespace(world_size=1))


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def backward(net: nn.Module, step: int) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    net(x).square().sum().backward()


def snapshot(optimizer: Optimizer) -> dict[str, Tensor]:
    return {f"{name} {key}": value.clone() for name, state in optimizer.state().items() for key, value in state.items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_ten_steps_equal_torchs_adamw_in_float64() -> None:
    ours, theirs = model(), model(torch.float64)
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    optimizer = Optimizer(dict(ours.named_parameters()), **ADAMW)
    adamw = torch.optim.AdamW(theirs.parameters(), **ADAMW)
    for step in range(10):
        optimizer.set_lr(1e-2 / (1 + step))
        adamw.param_groups[0]["lr"] = 1e-2 / (1 + step)
        backward(ours, step)
        backward(theirs, step)
        norm = grad_norm(optimizer.gradients(), ours, ALONE)
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step(FINE, factor=clip_factor(norm, 0.5))
        adamw.step()
        optimizer.zero_grad()
        adamw.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=2e-6)
    for name, parameter in theirs.named_parameters():
        state = optimizer.state()[name]
        assert state["step"] == 10
        torch.testing.assert_close(
            state["exp_avg_sq"].double(), adamw.state[parameter]["exp_avg_sq"], rtol=1e-4, atol=0
        )
        assert "master" not in state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_refused_step_changes_nothing_and_the_next_ones_are_refused_too(dtype: torch.dtype) -> None:
    net = model(dtype)
    optimizer = Optimizer(dict(net.named_parameters()), **ADAMW)
    backward(net, 0)
    optimizer.step(FINE)
    optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    before = snapshot(optimizer)

    backward(net, 1)
    optimizer.gradients()[1][0] = math.nan
    optimizer.step(not_finite(grad_norm(optimizer.gradients(), net, ALONE)))
    optimizer.zero_grad()
    backward(net, 2)
    optimizer.step(FINE)  # the verdict stands
    optimizer.zero_grad()
    assert same(before, snapshot(optimizer))
    assert all(torch.equal(weights[name], p) for name, p in net.named_parameters())

    optimizer.clear()
    backward(net, 3)
    optimizer.step(FINE)
    assert not same(before, snapshot(optimizer))
    assert all(state["step"] == 2 for state in optimizer.state().values())
    assert all(p.isfinite().all() for p in net.parameters())


def test_without_the_verdict_a_nan_would_spread() -> None:
    net = model()
    optimizer = Optimizer(dict(net.named_parameters()), **ADAMW)
    backward(net, 0)
    optimizer.gradients()[1][0] = math.nan
    optimizer.step(FINE)
    assert any(not p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_updates_that_low_precision_would_lose(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = Optimizer({"w": weight}, lr=1e-5)
    exact = torch.ones(4, requires_grad=True)
    adamw = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        weight.sum().backward()
        exact.sum().backward()
        optimizer.step(FINE)
        adamw.step()
        optimizer.zero_grad()
        adamw.zero_grad()
    torch.testing.assert_close(optimizer.state()["w"]["master"], exact.detach())
    assert torch.equal(weight.detach(), exact.detach().to(dtype))
    assert weight.dtype == dtype
    assert (weight < 1).all()  # a step of 1e-5 from 1 is lost in this dtype


def test_64_bf16_micro_batches_lose_nothing() -> None:
    def accumulate(ours: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = Optimizer({"w": weight}, lr=0.0) if ours else None
        for i in range(64):
            (weight * factors[i]).sum().backward()
        return optimizer.gradients()[0] if optimizer else cast(Tensor, weight.grad).float()

    factors = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = factors.double().sum(0)
    assert ((accumulate(True) - exact) / exact).abs().max() < 1e-6
    assert ((accumulate(False) - exact) / exact).abs().max() > 5e-3


def test_gradients_can_be_changed_in_place_and_are_there_when_backward_made_none() -> None:
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2), "low": nn.Linear(3, 2).bfloat16()})
    optimizer = Optimizer(dict(net.named_parameters()), lr=0.1)
    net["used"](torch.ones(1, 3)).sum().backward()
    gradients = optimizer.gradients()
    assert [g.dtype for g in gradients] == [torch.float32] * 6
    assert [bool(g.any()) for g in gradients] == [True, True, False, False, False, False]
    for gradient in gradients:
        gradient.zero_()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.step(FINE)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_state_can_be_restored() -> None:
    nets = model(torch.bfloat16), model(torch.bfloat16)
    first, second = (Optimizer(dict(net.named_parameters()), **ADAMW) for net in nets)
    for step in range(2):
        backward(nets[0], step)
        first.step(FINE)
        first.zero_grad()
    nets[1].load_state_dict(nets[0].state_dict())
    for name, state in first.state().items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
        for key, value in state.items():
            second.state()[name][key].copy_(value)
    for net, optimizer in zip(nets, (first, second), strict=True):
        backward(net, 2)
        optimizer.step(FINE)
    assert same(snapshot(first), snapshot(second))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outlives_its_model(dtype: torch.dtype) -> None:
    """A hook that held its parameter would keep both for ever: the garbage collector cannot see through it."""
    net = model(dtype)
    optimizer = Optimizer(dict(net.named_parameters()), lr=0.1)
    backward(net, 0)
    optimizer.step(FINE)
    left = weakref.ref(next(net.parameters()))
    del net, optimizer
    gc.collect()
    assert left() is None


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer({}, lr=1.0)


def test_norm_and_clipping_against_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((1500, 2000), (11,), (0, 5), ())]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    norm = grad_norm(gradients, nn.Module(), ALONE)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert abs(norm.double() / exact - 1) < 1e-6
    torch.testing.assert_close(exact * clip_factor(norm, 0.3), exact.new_tensor(0.3), rtol=2e-6, atol=0)
    assert clip_factor(norm, 1e9) == 1


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16() -> None:
    gradients = [torch.randn(300, 70, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    for held in (gradients, [gradients[0], gradients[1].float()]):
        norm = grad_norm(held, nn.Module(), ALONE)
        assert norm.dtype == torch.float32
        assert abs(norm.double() / exact - 1) < 1e-6


def test_not_finite() -> None:
    verdicts = [not_finite(torch.tensor(value)) for value in (1.0, 0.0, math.inf, math.nan)]
    assert [v.item() for v in verdicts] == [0.0, 0.0, 1.0, 1.0]
    assert all(v.dtype == torch.float32 and v.shape == () for v in verdicts)


def factors(scheduler: str, **settings: Any) -> Callable[[int], float]:
    return schedule(scheduler, **{"total_steps": 20, "warmup_steps": 5, "steps_per_epoch": 4, "gamma": 0.5} | settings)


@pytest.mark.parametrize(
    ("scheduler", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_decays_equal_transformers(scheduler: str, theirs: Callable[..., Any], warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    lr = theirs(optimizer, num_warmup_steps=warmup, num_training_steps=20).lr_lambdas[0]
    factor = factors(scheduler, warmup_steps=warmup)
    # theirs counts finished steps and starts a warm-up at 0, so its first step would change nothing
    assert [factor(step) for step in range(warmup + 1, 21)] == pytest.approx(
        [lr(step - 1) for step in range(warmup + 1, 21)]
    )
    assert factor(20) > 0


def test_gamma_equals_steplr() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    step_lr = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.85)
    factor = factors("gamma", gamma=0.85, warmup_steps=0)
    for step in range(1, 21):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        if step % 4 == 0:
            optimizer.step()
            step_lr.step()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warm_up_rises_from_one_over_w(scheduler: str) -> None:
    factor = factors(scheduler, gamma=1.0)
    assert [factor(step) for step in range(1, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(0 < factor(step) <= 1 for step in range(1, 21))
    everything = factors(scheduler, gamma=1.0, warmup_steps=20)
    assert everything(20) == 1.0


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="gamma, constant, linear, cosine"):
        factors("sine")
