"""fp16's loss scale against torch.amp.GradScaler, and what the optimizer does with an overflow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from packtrain.optim import LossScale, Optimizer, not_finite, scaling

FINE = torch.tensor(0.0)


def test_the_scale_is_gradscalers_after_every_step() -> None:
    ours = LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([weight], lr=0.0)
    overflows = {0, 1, 5, 2010, 2011, 4020}
    scales = set()
    for step in range(4100):
        theirs.scale(weight.sum() * (math.inf if step in overflows else 1.0)).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(torch.tensor(float(step in overflows)))
        assert ours.scale.item() == theirs.get_scale(), step
        scales.add(theirs.get_scale())
    assert len(scales) >= 4


def half(scale: float) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).half()
    optimizer = Optimizer(dict(layer.named_parameters()), lr=1e-2, fp16=True)
    assert optimizer._loss_scale is not None
    optimizer._loss_scale.scale.fill_(scale)
    return layer, optimizer


def attempt(layer: nn.Linear, optimizer: Optimizer, factor: float = 1.0) -> Tensor:
    """One step; its scale."""
    scale = optimizer.scale(torch.ones(()))
    optimizer.scale((layer(torch.ones(2, 4, dtype=torch.float16)) * factor).float().sum()).backward()
    norm = torch.stack([gradient.norm() for gradient in optimizer.gradients()]).norm()
    optimizer.step(not_finite(norm))
    optimizer.zero_grad()
    return scale


def test_an_overflow_costs_one_update_and_half_the_scale() -> None:
    layer, optimizer = half(2.0**17)  # times 2, the number of rows: 2**18 is beyond fp16
    before = layer.weight.detach().clone()
    scales = []
    while torch.equal(before, layer.weight):
        scales.append(attempt(layer, optimizer).item())
    assert scales == [2.0**17, 2.0**16, 2.0**15, 2.0**14]
    assert all(state["step"] == 1 for state in optimizer.state().values())
    assert layer.weight.isfinite().all()


def test_at_the_lowest_scale_the_verdict_stands() -> None:
    layer, optimizer = half(2.0)
    before = layer.weight.detach().clone()
    assert attempt(layer, optimizer, math.nan) == 2.0
    assert attempt(layer, optimizer, math.nan) == scaling.LOWEST_SCALE
    assert attempt(layer, optimizer) == scaling.LOWEST_SCALE
    assert torch.equal(before, layer.weight)
    optimizer.clear()
    attempt(layer, optimizer)
    assert not torch.equal(before, layer.weight)


def test_unscaled_gradients_are_those_without_a_scale_to_the_bit() -> None:
    found = []
    for fp16 in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = Optimizer(dict(layer.named_parameters()), lr=1e-2, fp16=fp16)
        for _ in range(3):
            optimizer.scale(layer(torch.randn(2, 4)).square().sum()).backward()
        found.append([gradient.clone() for gradient in optimizer.gradients()])
        assert all(torch.equal(a, b) for a, b in zip(found[-1], optimizer.gradients(), strict=True))  # asked again
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gradient_below_fp16s_smallest_number_counts() -> None:
    def gradient(fp16: bool) -> float:
        weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
        optimizer = Optimizer({"w": weight}, lr=1e-2, fp16=fp16)
        optimizer.scale(weight.float().sum() * 1e-9).backward()
        return optimizer.gradients()[0].item()

    assert gradient(True) == pytest.approx(1e-9, rel=1e-3)
    assert gradient(False) == 0.0
