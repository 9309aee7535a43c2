"""A whole step of the fast layers on a CUDA device: its gradients, and that nothing in it waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import QV, adapters, batch, filled, run

from packtrain.distributed.place import Place
from packtrain.kernels.rows import Form
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.optim import Optimizer
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

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
LORA = adapters(r=16)


def made(
    form: Form | None, recompute: fast.Recompute, device: torch.device, settings: LoraSettings | None = LORA
) -> LlamaForCausalLM:
    """With adapters, or learning whole."""
    dtype = torch.float32 if form is None else form.dtype
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=dtype, device=torch.device("meta"))
    if settings is not None:
        lora.install(model, settings)
    if form is not None:
        fast.install(model, form, recompute)
        fast.allocate(model, device)
    return filled(model, device)


def compare(form: Form, least: float, recompute: fast.Recompute = "none", settings: LoraSettings | None = LORA) -> None:
    exact = run(made(None, "none", torch.device("cpu"), settings), batch(LENGTHS))
    ours = run(made(form, recompute, CUDA, settings), batch(LENGTHS).to(CUDA))
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=3e-3)
    for name, gradient in exact[1].items():
        cosine = torch.cosine_similarity(ours[1][name].float().flatten().cpu(), gradient.flatten(), 0)
        assert cosine > least, (name, cosine)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("eight", "least"), [(False, 0.99), (True, 0.8)], ids=["bf16", "float8"])
def test_gradients_are_near_fp32(eight: bool, least: float, recompute: fast.Recompute) -> None:
    """float8 rounds every input and gradient to 4 bits; the kernels' own tests are the sharp ones."""
    compare(Form(torch.bfloat16, eight), least, recompute)


@pytest.mark.parametrize("settings", [adapters(r=16, lora_dropout=0.3), adapters(QV, r=8, lora_dropout=0.05)], ids=str)
@pytest.mark.parametrize(("eight", "least"), [(False, 0.99), (True, 0.8)], ids=["bf16", "float8"])
def test_a_dropout_is_the_plain_forms(eight: bool, least: float, settings: LoraSettings) -> None:
    compare(Form(torch.bfloat16, eight), least, settings=settings)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_full_fine_tuning(recompute: fast.Recompute) -> None:
    compare(Form(torch.bfloat16, float8=False), 0.99, recompute, settings=None)


@pytest.mark.parametrize(
    ("eight", "settings"),
    [(False, LORA), (True, LORA), (False, adapters(r=16, lora_dropout=0.1)), (False, None)],
    ids=["bf16", "float8", "dropout", "full"],
)
def test_a_step_does_not_wait_for_the_device(eight: bool, settings: LoraSettings | None) -> None:
    """All of it: batches to the device, forward, backward, update."""
    model, data = made(Form(torch.bfloat16, eight), "none", CUDA, settings), batch(LENGTHS)
    place = cast(Place, SimpleNamespace(world_size=1, rank=0, device=CUDA))
    optimizer = Optimizer(trainable(model), lr=1e-3)

    def step() -> None:
        batches = [data.to(CUDA)]
        train_step(model, batches, step_vector(batches, False, CUDA), optimizer, place, clip=1.0, memory=lambda: 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
