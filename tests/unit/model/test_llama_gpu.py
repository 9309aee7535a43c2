"""The same model on a CUDA device: numbers of the CPU's, and a step that never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from packtrain.kernels.random import dropout
from packtrain.model.linear import linear_parts
from packtrain.model.llama import blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "llama3, tied": {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "pad_token_id": 3},
    "dynamic, biases": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_the_cpu(tools: Any, kind: str, whole_rows: bool) -> None:
    batch = tools.batch_of([[tools.some_ids(90)], [tools.some_ids(40, 1)]], whole_rows=whole_rows)
    found = []
    for device in ("cpu", "cuda"):
        model = tools.ours(KINDS[kind]).to(device)
        loss = model(batch.to(torch.device(device)))
        loss.backward()
        found.append((loss.item(), tools.gradients(model)))
    (loss, gradients), (loss_there, gradients_there) = found
    assert loss_there == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert tools.distance(gradients_there[name].cpu(), gradient) < 1e-4, name


def test_masks_of_the_cpu(tools: Any) -> None:
    keys = tools.batch_of([[tools.some_ids(300)]]).keys.view(-1)
    x = torch.randn(300, 77)
    assert torch.equal(dropout(x.cuda(), keys.cuda(), "q_proj", 0.3).cpu(), dropout(x, keys, "q_proj", 0.3))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_step_with_fp32_adapters_never_waits(tools: Any, no_waiting: None, kind: str, recompute: bool) -> None:
    batch = tools.batch_of([[tools.some_ids(90), tools.some_ids(38, 2)], [tools.some_ids(128, 1)]], masked=5)
    exact = tools.ours(KINDS[kind])(batch).item()
    model = tools.ours(KINDS[kind], dtype=torch.bfloat16).cuda()
    assert model(batch.to(torch.device("cuda"))).item() == pytest.approx(exact, rel=2e-2)
    model.requires_grad_(False)
    for name, layer, part in list(linear_parts(model)):
        layer.adapters[part.name] = tools.fake_lora(name, layer.in_features, part.stop - part.start, 0.1).cuda()
    for block in blocks(model):
        block.recompute = recompute
    torch.cuda.synchronize()
    moved = batch.to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    model(moved).backward()
    torch.cuda.set_sync_debug_mode("default")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
