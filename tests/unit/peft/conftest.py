"""A tiny Llama of ours, with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """Makes the model; keywords are the config's, and dtype and device."""

    def make(dtype: torch.dtype = torch.float32, device: str = "cpu", **config: Any) -> LlamaForCausalLM:
        sizes = {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        model = LlamaForCausalLM(LlamaConfig.from_dict(sizes | config), dtype=dtype, device=torch.device(device))
        if device != "meta":
            draw(model, seed=0)
        return model

    return make
