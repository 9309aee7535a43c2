"""LLaMA-Adapter (arXiv:2303.16199): in the last layers, tokens also attend to a learned prompt, behind a gate.

    attention + gate * softmax(q K^T / sqrt(d)) V,  K and V from the prompt, both before o_proj

As peft computes it (AdaptionPrompt): the prompt goes through the layer's own k_proj and v_proj, without norm or rope;
queries are the layer's, turned by rope; the softmax is over the prompt alone. The gate is zero at first, so the model
begins as its base. Nothing is kept between forwards: prompt and gate are read anew in each, or only the gate would
learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.batch import Batch
from packtrain.errors import raise_if
from packtrain.kernels.attention import attention, attention_to_all
from packtrain.model.config import LlamaConfig
from packtrain.model.linear import Linear
from packtrain.model.llama import LlamaAttention
from packtrain.peft.reader import Reader, whole
from packtrain.peft.tensors import PREFIX, LocalRows, Saved, all_rows, generator, keep, modules
from packtrain.peft.trainable import freeze


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaAdapterSettings:
    """AdaptionPromptConfig of peft: the same names, the same meaning. Defaults are llama-recipes'."""

    adapter_len: int = 10
    """Prompt tokens a layer."""
    adapter_layers: int = 30
    """Layers that have a prompt, counted from the last."""


class AdaptionPrompt(nn.Module):
    """Fills an attention's slot. `adaption_prompt` [1, adapter_len, D] and `adaption_gate` [1], fp32, as in peft."""

    def __init__(self, name: str, settings: LlamaAdapterSettings, width: int, device: torch.device) -> None:
        super().__init__()
        self.name = name
        shape = (1, settings.adapter_len, width)
        self.adaption_prompt = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.adaption_gate = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, qkv_proj: Linear) -> Tensor:
        """q [T, Hq, d], k and v [T, Hkv, d] -> [T, Hq, d] in q's dtype."""
        prompt = self.adaption_prompt[0].to(q.dtype)
        _, keys, values = qkv_proj.split(prompt, batch.keys.new_zeros(len(prompt)))
        prompted = attention_to_all(q, keys.view(-1, *k.shape[1:]), values.view(-1, *v.shape[1:]))
        return attention(q, k, v, batch) + self.adaption_gate.to(q.dtype) * prompted


def problems(model: nn.Module, settings: LlamaAdapterSettings) -> list[str]:
    """A sentence for everything that is wrong with `settings` on this model (meta or not)."""
    config: LlamaConfig = model.config  # type: ignore[assignment]
    found = [
        f"{name}: {value}; expected 1 or more"
        for name, value in (("adapter_len", settings.adapter_len), ("adapter_layers", settings.adapter_layers))
        if value < 1
    ]
    if settings.adapter_layers > config.num_hidden_layers:
        found.append(
            f"adapter_layers: {settings.adapter_layers}; expected no more than the model's {config.num_hidden_layers}"
        )
    if config.attention_bias:
        found.append(
            "peft_method: llama_adapter is not for a model with attention biases: peft would add that of o_proj "
            "twice, so that it would compute something else than was trained; use lora"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(
            f"peft_method: llama_adapter is not for a model whose head_dim ({config.head_dim}) is not hidden_size / "
            f"num_attention_heads ({config.hidden_size} / {config.num_attention_heads}): peft could not load what was "
            "trained; use lora"
        )
    return found


def fit(settings: LlamaAdapterSettings, config: LlamaConfig) -> LlamaAdapterSettings:
    """Settings with no more layers than the model has: llama-recipes' default is 30."""
    return replace(settings, adapter_layers=min(settings.adapter_layers, config.num_hidden_layers))


def install(model: nn.Module, settings: LlamaAdapterSettings) -> None:
    """Freeze the base and give the last layers their prompts: fp32 parameters where the weights are. Before sharding.

    Raises UserError with all of `problems`.
    """
    raise_if(problems(model, settings))
    freeze(model)
    for name, layer in list(modules(model, LlamaAttention))[-settings.adapter_layers :]:
        weight = layer.qkv_proj.weight
        layer.prompt = AdaptionPrompt(name, settings, weight.shape[1], weight.device)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, local_rows: LocalRows = all_rows) -> None:
    """peft's starting values: prompts normal(0, 1), drawn from (seed, Hugging Face name); gates zero."""
    for _, adapter in modules(model, AdaptionPrompt):
        drawn = torch.empty(adapter.adaption_prompt.shape, dtype=torch.float32, device="cpu")
        drawn.normal_(generator=generator(seed, f"{adapter.name}.adaption_prompt"))
        keep(drawn, adapter.adaption_prompt, local_rows)
        local_rows(adapter.adaption_gate)[0].zero_()


def adapter_tensors(model: nn.Module) -> dict[str, Saved]:
    """Every tensor of PEFT's adapter_model.safetensors -> our parameter."""
    return {
        f"{PREFIX}{adapter.name}.{tensor}": Saved(f"{path}.{tensor}", 0, 1)
        for path, adapter in modules(model, AdaptionPrompt)
        for tensor in ("adaption_gate", "adaption_prompt")
    }


def config_dict(settings: LlamaAdapterSettings, base_model_name: str) -> dict[str, Any]:
    """What adapter_config.json says: PEFT's keys, `base_model_name` as the user typed it."""
    return {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "adapter_len": settings.adapter_len,
        "adapter_layers": settings.adapter_layers,
        "target_modules": "self_attn",
    }


_READER = Reader(
    method="LLaMA-Adapter",
    read_by={"adapter_len": whole, "adapter_layers": whole},
    needs=("adapter_len", "adapter_layers"),
    accepts={
        "peft_type": ("ADAPTION_PROMPT",),
        "task_type": ("CAUSAL_LM", None),
        "target_modules": ("self_attn", None),
    },
)


def settings_from(config: Mapping[str, Any], where: str = "adapter_config.json") -> LlamaAdapterSettings:
    """Settings of a saved adapter. Raises UserError with everything in it that cannot be followed."""
    return LlamaAdapterSettings(**_READER.read(config, where))
