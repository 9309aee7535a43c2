"""Tiny Llamas made by transformers, and ours beside them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as TheirLlama

from packtrain.batch import Batch
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM

META = torch.device("meta")
SIZES: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}

MakeTheirs = Callable[..., TheirLlama]
MakeOurs = Callable[..., LlamaForCausalLM]


def batch_of(ids: Tensor) -> Batch:
    """One document a row, nothing trained."""
    rows, length = ids.shape
    return Batch(
        ids=ids,
        positions=torch.arange(length).expand(rows, length).contiguous(),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        lengths=(length,) * rows,
        max_seqlen=length,
        whole_rows=True,
        index=torch.zeros(0, dtype=torch.int64),
        targets=torch.zeros(0, dtype=torch.int64),
        keys=torch.zeros(rows, length, dtype=torch.int64),
        tokens=rows * length,
        rows=tuple(range(rows)),
    )


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests cut processes, not the power; one of them looks at the syncs themselves."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="session")
def make_theirs() -> MakeTheirs:
    """transformers' model with random weights; keywords are its config's."""

    def make(seed: int = 0, **config: Any) -> TheirLlama:
        torch.manual_seed(seed)
        model = TheirLlama(TheirConfig(**(SIZES | config))).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def make_ours() -> MakeOurs:
    """Our model of the same shape, on meta; keywords are the config's."""

    def make(dtype: torch.dtype = torch.float32, device: torch.device = META, **config: Any) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig.from_dict({"model_type": "llama"} | SIZES | config), dtype=dtype, device=device
        ).eval()

    return make


@pytest.fixture(scope="session")
def same_logits() -> Callable[[torch.nn.Module, LlamaForCausalLM], None]:
    """Asserts that a transformers (or peft) model and ours give the same logits, in fp32."""

    @torch.no_grad()
    def check(theirs: torch.nn.Module, ours: LlamaForCausalLM) -> None:
        ids = torch.randint(0, 72, (2, 11), generator=torch.Generator().manual_seed(1))
        expected = theirs(ids).logits
        found = ours(batch_of(ids), logits=True)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())

    return check


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory, make_theirs: MakeTheirs) -> dict[bool, Path]:
    """tie_word_embeddings -> a saved model."""
    folders = {tied: tmp_path_factory.mktemp("tied" if tied else "untied") for tied in (False, True)}
    for tied, folder in folders.items():
        make_theirs(tie_word_embeddings=tied, attention_bias=True).save_pretrained(folder)
    return folders
