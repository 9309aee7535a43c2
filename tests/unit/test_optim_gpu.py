"""Every rule on a CUDA device: it learns what the CPU learns, and a step never waits for the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from packtrain.distributed import parallelize
from packtrain.distributed.place import Place
from packtrain.optim import Optimizer, clip_factor, grad_norm, not_finite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ALONE = cast(Place, SimpleNamespace(world_size=1))
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, fp16": {"fp16": True},
    "anyprecision": {"rule": "anyprecision"},
    "anyprecision, plain": {"rule": "anyprecision", "use_kahan": False},
    "anyprecision, 8 bits": {"rule": "anyprecision", "moments": "8bit"},
    "adamw8bit": {"rule": "adamw8bit"},
}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def learn(device: str, settings: dict[str, Any], steps: int = 30) -> list[float]:
    """Losses of a small net that learns to give back its input."""
    torch.manual_seed(0)
    dtype = torch.float16 if "fp16" in settings else torch.bfloat16
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype).to(device)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    optimizer = Optimizer(dict(net.named_parameters()), lr=3e-3, **settings)
    losses = []
    for step in range(steps):
        if step > 0 and device == "cuda" and settings.get("rule") != "adamw8bit":
            with no_waiting():
                losses.append(one_step(net, x, optimizer))
        else:
            losses.append(one_step(net, x, optimizer))
    return [loss.item() for loss in losses]


def one_step(net: nn.Module, x: torch.Tensor, optimizer: Optimizer) -> torch.Tensor:
    loss = (net(x) - x).float().square().mean()
    optimizer.scale(loss).backward()
    norm = grad_norm(optimizer.gradients(), net, ALONE)
    optimizer.step(not_finite(norm), factor=clip_factor(norm, 1.0))
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("name", RULES)
def test_it_learns_as_on_the_cpu_without_waiting(name: str) -> None:
    if name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    reference = RULES["AdamW" if name in {"adamw8bit", "anyprecision, 8 bits"} else name]
    there, here = learn("cuda", RULES[name]), learn("cpu", reference)
    assert here[-1] < 0.7 * here[0]
    assert there == pytest.approx(here, rel=0.02)


@pytest.mark.parametrize(("moments", "kept"), [("bf16", 2 + 4), ("8bit", 2 + 2 + 8 / 256)])
def test_a_step_takes_no_memory_beside_gradients_in_bf16(moments: Literal["bf16", "8bit"], kept: float) -> None:
    """Remainders and moments are all that is kept; norm, clipping and update make no copy of anything."""
    count = 4096 * 4096
    weight = nn.Parameter(torch.randn(4096, 4096, device="cuda").bfloat16())
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    (x @ weight).sum().backward()  # cuBLAS takes memory for itself, once in each thread that calls it
    weight.grad = None
    before = torch.cuda.memory_allocated()
    optimizer = Optimizer({"w": weight}, lr=1e-3, rule="anyprecision", moments=moments)
    states = torch.cuda.memory_allocated()
    assert states - before == pytest.approx(kept * count, rel=0.01)
    for step in range(2):
        (x @ weight).float().square().mean().backward()
        assert torch.cuda.memory_allocated() - states == pytest.approx(2 * count, rel=0.05)
        torch.cuda.reset_peak_memory_stats()
        norm = grad_norm(optimizer.gradients(), nn.Module(), ALONE)
        optimizer.step(not_finite(norm), factor=clip_factor(norm, 1.0))
        if step > 0:  # the first one loads kernels
            assert torch.cuda.max_memory_allocated() - states < 2.1 * count
        optimizer.zero_grad()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(offload: bool, micro_batches: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(norm, gradients) of bf16 layers in FSDP2 over one rank, from shards on the GPU or in host memory."""
    layers = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12))).to(torch.bfloat16).to("meta")
    mesh = parallelize._mesh("cuda", 1, 1)
    for module in (*layers, layers):
        parallelize._shard(module, mesh, True, offload)
    for module in parallelize._fsdp_modules(layers):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    parallelize.materialise(layers, torch.device("cpu" if offload else "cuda"))
    draws = torch.Generator("cuda").manual_seed(0)
    for parameter in layers.parameters():
        local, _ = parallelize.local_rows(parameter)
        local.copy_(torch.randn(local.shape, generator=draws, device="cuda") * 0.02)
    optimizer = Optimizer(dict(layers.named_parameters()), lr=0.0)
    for _ in range(micro_batches):
        layers(torch.randn(64, 2048, generator=draws, device="cuda").bfloat16()).float().square().sum().backward()
    gradients = optimizer.gradients()
    return grad_norm(gradients, layers, ALONE).cpu(), [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_in_host_memory_are_whole(micro_batches: int, group: None) -> None:
    """They come by copies that nobody waits for unless told to."""
    norm, expected = gradients_of(False, micro_batches)
    for _ in range(3):
        there, found = gradients_of(True, micro_batches)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert there.item() == pytest.approx(norm.item(), rel=1e-6)


def test_waiting_would_be_noticed() -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()
