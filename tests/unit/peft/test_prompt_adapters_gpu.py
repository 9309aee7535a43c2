"""LLaMA-Adapter and prefix tuning on a CUDA device: the CPU's numbers, and a step that never waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from packtrain import peft
from packtrain.model.llama import blocks
from packtrain.peft.trainable import trainable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SETTINGS = {
    "llama_adapter": peft.LlamaAdapterSettings(adapter_len=5, adapter_layers=2),
    "prefix": peft.PrefixSettings(num_virtual_tokens=5),
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
LENGTHS = (70, 33, 9)
CUDA = torch.device("cuda")


def adapted(tiny: Any, tools: Any, method: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(dtype=dtype, initializer_range=0.2, **SIZES)
    peft.METHODS[method].install(model, SETTINGS[method])
    peft.METHODS[method].initialise(model, 7)
    tools.disturb(trainable(model).values())
    return model.train()


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 40, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", SETTINGS)
def test_loss_and_gradients_of_the_cpu(tiny: Any, tools: Any, method: str, packed: bool) -> None:
    found = []
    for device in (torch.device("cpu"), CUDA):
        model = adapted(tiny, tools, method).to(device)
        loss = model(tools.rows_of(documents(), packed).to(device))
        found.append((loss.item(), tools.gradients(model, loss)))
    (loss, gradients), (loss_there, gradients_there) = found
    assert loss_there == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        difference = (gradients_there[name].cpu() - gradient).abs().max()
        assert difference < 1e-4 * gradient.abs().max(), name


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", SETTINGS)
def test_a_bf16_step_never_waits(tiny: Any, tools: Any, no_waiting: None, method: str, recompute: bool) -> None:
    batch = tools.rows_of(documents(), packed=True)
    exact = adapted(tiny, tools, method)(batch).item()
    model = adapted(tiny, tools, method, torch.bfloat16).to(CUDA)
    moved = batch.to(CUDA)
    assert model(moved).item() == pytest.approx(exact, rel=2e-2)
    for block in blocks(model):
        block.recompute = recompute
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    model(moved).backward()
    torch.cuda.set_sync_debug_mode("default")
    for parameter in trainable(model).values():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
