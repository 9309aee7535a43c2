"""Every rule on a CUDA device: it learns what the CPU learns, and a step never waits for the device."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from packtrain.distributed import parallelize
from packtrain.distributed.place import Place
from packtrain.optim import Optimizer, anyprecision, clip_, grad_norm, not_finite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ALONE = cast(Place, SimpleNamespace(world_size=1))
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, fp16": {"fp16": True},
    "anyprecision": {"rule": "anyprecision"},
    "anyprecision, plain": {"rule": "anyprecision", "use_kahan": False},
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
    clip_(optimizer.gradients(), norm, 1.0)
    optimizer.step(not_finite(norm))
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("name", RULES)
def test_it_learns_as_on_the_cpu_without_waiting(name: str) -> None:
    if name == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    reference = RULES["AdamW"] if name == "adamw8bit" else RULES[name]
    there, here = learn("cuda", RULES[name]), learn("cpu", reference)
    assert here[-1] < 0.7 * here[0]
    assert there == pytest.approx(here, rel=0.02)


@pytest.mark.parametrize("use_kahan", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_plain_form(dtype: torch.dtype, use_kahan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten updates, one of them refused, of matrices that no block divides; moments to bf16's last place."""
    found = []
    for plain in (True, False):
        monkeypatch.setattr(anyprecision, "by_triton", lambda x, plain=plain: not plain)
        draws = torch.Generator("cuda").manual_seed(0)
        weights = [torch.randn(n, 77, generator=draws, device="cuda").to(dtype) for n in (1, 1000)]
        rule = anyprecision.AnyPrecisionAdamW(
            weights, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, use_kahan=use_kahan
        )
        for step in range(10):
            gradients = [torch.randn(w.shape, generator=draws, device="cuda") for w in weights]
            if step == 4:
                gradients[0][0] = math.nan
            rule.step(gradients, torch.tensor(float(step == 4), device="cuda"))
        found.append((weights, rule.state()))
    for expected, weight, theirs, ours in zip(*(pair[0] for pair in found), *(pair[1] for pair in found), strict=True):
        last_place = 1e-6 if dtype == torch.float32 or use_kahan else 2.0**-7
        torch.testing.assert_close(exact(weight, ours), exact(expected, theirs), rtol=last_place, atol=1e-4)
        assert ours["step"] == theirs["step"] == 9
        for name in ("exp_avg", "exp_avg_sq"):
            bound = 2.0**-6 * theirs[name].abs().max().item()
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=bound)
            assert (ours[name] == theirs[name]).float().mean() > 0.5  # another chance where an fp32 sum differs


def exact(weight: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The fp32 sum that weight and remainder are."""
    if "remainder" not in state:
        return weight.float()
    return (weight.view(torch.int16).int() << 16).add(state["remainder"]).view(torch.float32)


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
