"""A whole step of the fast layers on a CUDA device: its gradients, and that nothing in it waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import adapters, batch, filled, run

from packtrain.kernels.rows import Form
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.peft import lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}
LENGTHS = (70, 200, 3, 130, 300)


def made(form: Form | None, recompute: fast.Recompute, device: torch.device) -> LlamaForCausalLM:
    dtype = torch.float32 if form is None else form.dtype
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=dtype, device=torch.device("meta"))
    lora.install(model, adapters(r=16))
    if form is not None:
        fast.install(model, form, recompute)
        fast.allocate(model, device)
    return filled(model, device)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("eight", "least"), [(False, 0.99), (True, 0.8)], ids=["bf16", "float8"])
def test_gradients_are_near_fp32(eight: bool, least: float, recompute: fast.Recompute) -> None:
    """float8 rounds every input and gradient to 4 bits; the kernels' own tests are the sharp ones."""
    exact = run(made(None, "none", torch.device("cpu")), batch(LENGTHS))
    ours = run(made(Form(torch.bfloat16, eight), recompute, CUDA), batch(LENGTHS).to(CUDA))
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=3e-3)
    for name, gradient in exact[1].items():
        cosine = torch.cosine_similarity(ours[1][name].flatten().cpu(), gradient.flatten(), 0)
        assert cosine > least, (name, cosine)


@pytest.mark.parametrize("eight", [False, True], ids=["bf16", "float8"])
def test_a_step_does_not_wait_for_the_device(eight: bool) -> None:
    model, data = made(Form(torch.bfloat16, eight), "none", CUDA), batch(LENGTHS).to(CUDA)
    run(model, data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(data).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
