"""Adapters of a float8 model packed by one kernel, and by one a product: on a CUDA device, or interpreted."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import SHAPE, adapters, batch, filled, run

from packtrain.kernels import lowrank, packs, rows
from packtrain.kernels.lowrank import Float8, Plan, Scratch, Span, skinny
from packtrain.kernels.packs import Columns8, Packs, Tops
from packtrain.kernels.rows import Form
from packtrain.model import fast, shared
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.peft import lora

RUNS = rows.HAS_TRITON and (rows.INTERPRETED or torch.cuda.is_available())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS, reason="needs a CUDA device with Triton")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FORM = Form(DTYPE, float8=True)
MEMORY = [
    f"{what} of product {i}"
    for i in range(4)
    for what in (
        "W",
        "W^T",
        *(f"{part} {way}" for way in ("forward", "backward") for part in ("rows", "scale", "factor")),
    )
]
PLANS = [
    Plan(320, 192, (Span(0, 192, 0), Span(192, 256, 16), Span(256, 320, 32)), 16, 2.0),
    Plan(192, 144, (Span(64, 128, 0),), 5, 0.5),
    Plan(64, 64, (), 0, 1.0),
    Plan(144, 304, (Span(0, 144, 0),), 24, 1.0),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


def seen(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.view(torch.uint8) for tensor in tensors]


def product(plan: Plan, factors: list[tuple[Tensor, Tensor]], tops: Any) -> tuple[list[Columns8], list[Tensor]]:
    """(what there is to pack, the memory it goes to) of one product, not packed yet."""
    weight = lowrank.storage(plan, FORM, DEVICE)[: plan.n, : plan.k]
    weight.view(torch.uint8).zero_()
    scale, small = torch.rand(1, device=DEVICE) + 0.1, [skinny(plan, FORM, DEVICE, way) for way in (0, 1)]
    scratch = Scratch(plan, FORM, DEVICE)
    operand = Float8(plan, FORM, weight, scale, factors, tops, scratch, scratch.turned(), packed=small)
    operand.pack()
    wholes = operand.whole, scratch.turned()
    held = [t for one in small for t in (one.rows, one.scale, one.factor)]
    return [operand.columns(way, whole) for way, whole in enumerate(wholes)], [*wholes, *held]


def test_together_is_one_by_one() -> None:
    """To the bit: other shapes, ranks and parts side by side; also after the adapters have changed."""
    factors = [
        [
            (torch.randn(p.rank, p.k, device=DEVICE), torch.randn(s.stop - s.start, p.rank, device=DEVICE))
            for s in p.spans
        ]
        for p in PLANS
    ]
    tops = Tops([one for some in factors for pair in some for one in pair])
    found = iter(tops.values.unbind())
    of_each = [[(next(found), next(found)) for _ in some] for some in factors]
    made = [product(plan, some, top) for plan, some, top in zip(PLANS, factors, of_each, strict=True)]
    columns, memory = [one for ways, _ in made for one in ways], [held for _, some in made for held in some]
    together, before = Packs(columns), [tensor.clone() for tensor in memory]
    for spread in (1.0, 0.01, 30.0):
        for some in factors:
            for pair in some:
                for one in pair:
                    one.normal_(0, spread)
        tops.find()
        expected_tops = [one.abs().max() for some in factors for pair in some for one in pair]
        assert torch.equal(tops.values, torch.stack(expected_tops))
        together.pack()
        found_there = [tensor.clone() for tensor in memory]
        for tensor, empty in zip(seen(memory), seen(before), strict=True):
            tensor.copy_(empty)
        for one in columns:
            one.pack()
        both = zip(MEMORY, seen(found_there), seen(memory), strict=True)
        differ = [f"{name}: {differences(one, other)}" for name, one, other in both if not torch.equal(one, other)]
        assert not differ, f"spread {spread}: {'; '.join(differ)}"
        assert sum(int(tensor.count_nonzero()) for tensor in seen(memory)) > 1000


def differences(one: Tensor, other: Tensor) -> str:
    """How many bytes, and the first few of them."""
    at = (one != other).nonzero()
    few = [(tuple(place), int(one[tuple(place)]), int(other[tuple(place)])) for place in at[:4].tolist()]
    return f"{len(at)} of {one.numel()} bytes, (place, together, alone) {few}"


def made(recompute: fast.Recompute) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=DTYPE, device=torch.device("meta"))
    lora.install(model, adapters(r=4))
    fast.install(model, FORM, recompute)
    fast.allocate(model, DEVICE)
    return filled(model, DEVICE)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_model_packs_once_a_forward(recompute: fast.Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the losses and gradients of a model whose products pack for themselves, step after step."""
    ours, calls = made(recompute), [0]
    with monkeypatch.context() as patch:
        patch.setattr(shared, "_packable", lambda adapters: False)
        theirs = made(recompute)
        expected = steps(theirs)
    real = packs.triton_kernels.pack8_all

    def counted(*arguments: Any) -> None:
        calls[0] += 1
        real(*arguments)

    monkeypatch.setattr(packs.triton_kernels, "pack8_all", counted)
    if recompute == "none":
        monkeypatch.setattr(packs.triton_kernels, "pack8", lambda *_: pytest.fail("packed by itself"))
    for (loss, gradients), (their_loss, their_gradients) in zip(steps(ours), expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=0 if DEVICE.type == "cpu" else 1e-3)
        for name, gradient in gradients.items():
            if DEVICE.type == "cpu":
                assert torch.equal(gradient, their_gradients[name]), name
            else:  # attention's backward adds up in any order
                one, other = gradient.flatten().float(), their_gradients[name].flatten().float()
                assert torch.cosine_similarity(one, other, 0) > 0.98, name
    assert calls == [3]


def steps(model: LlamaForCausalLM) -> list[tuple[float, dict[str, Tensor]]]:
    """Three of them; before the third the adapters move to other memory."""
    found = []
    for step in range(3):
        if step == 2:
            for parameter in learning(model):
                parameter.data = parameter.data.clone()
        loss, gradients = run(model, batch().to(DEVICE))
        found.append((loss.item(), {name: gradient.clone() for name, gradient in gradients.items()}))
        with torch.no_grad():
            for parameter in learning(model):
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad.sign() * parameter.abs().mean())
                parameter.grad = None
    return found


def learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
