"""Prefix tuning (arXiv:2101.00190): learned keys and values that stand before every document, in every layer.

As peft computes it (PrefixTuning without projection): the keys are not turned by rope, and documents begin at the
position after the virtual tokens. In its file all layers are one tensor, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from packtrain.batch import Batch
from packtrain.errors import raise_if
from packtrain.kernels.attention import attention
from packtrain.model.config import LlamaConfig
from packtrain.model.linear import Linear
from packtrain.model.llama import LlamaAttention, LlamaForCausalLM
from packtrain.peft.reader import Reader, whole
from packtrain.peft.tensors import LocalRows, Saved, all_rows, generator, keep, modules
from packtrain.peft.trainable import freeze


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSettings:
    """PrefixTuningConfig of peft: the same names, the same meaning. Defaults are llama-recipes'."""

    num_virtual_tokens: int = 30
    """Learned keys and values a layer and head."""
    num_layers: int | None = None
    """The model's layers, and below its key heads and the width of all of them; None: not known yet (`fit`)."""
    num_attention_heads: int | None = None
    token_dim: int | None = None


class Prefix(nn.Module):
    """Fills an attention's slot. `past_key_values` fp32 [P, 2 * Hkv * d]: a virtual token's keys, then its values."""

    def __init__(self, name: str, tokens: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.past_key_values = nn.Parameter(torch.zeros(tokens, 2 * width, dtype=torch.float32, device=device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, qkv_proj: Linear) -> Tensor:
        """q [T, Hq, d], k and v [T, Hkv, d] -> [T, Hq, d]; the projections are the slot's and not used."""
        keys, values = self.past_key_values.to(q.dtype).view(-1, 2, *k.shape[1:]).unbind(1)
        return attention(q, k, v, batch, prefix=(keys, values))


def problems(model: nn.Module, settings: PrefixSettings) -> list[str]:
    """A sentence for everything that is wrong with `settings` on this model (meta or not)."""
    found = []
    if settings.num_virtual_tokens < 1:
        found.append(f"num_virtual_tokens: {settings.num_virtual_tokens}; expected 1 or more")
    right = fit(settings, cast(LlamaForCausalLM, model).config)
    for name in ("num_layers", "num_attention_heads", "token_dim"):
        value, expected = getattr(settings, name), getattr(right, name)
        if value not in (None, expected):
            found.append(f"{name}: {value}; in the model it is {expected}: the prefix belongs to another base model")
    return found


def fit(settings: PrefixSettings, config: LlamaConfig) -> PrefixSettings:
    """Settings with the model's shape in them, as peft writes it down: heads are those of keys and values."""
    heads = config.num_key_value_heads
    return replace(
        settings,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * config.head_dim,
    )


def install(model: nn.Module, settings: PrefixSettings) -> None:
    """Freeze the base and give every layer its prefix: fp32 parameters where the weights are. Before sharding.

    Raises UserError with all of `problems`.
    """
    raise_if(problems(model, settings))
    freeze(model)
    llama = cast(LlamaForCausalLM, model)
    llama.model.first_position = settings.num_virtual_tokens
    width = llama.config.num_key_value_heads * llama.config.head_dim
    for name, layer in modules(model, LlamaAttention):
        layer.prompt = Prefix(name, settings.num_virtual_tokens, width, layer.qkv_proj.weight.device)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, local_rows: LocalRows = all_rows) -> None:
    """peft's starting values: normal(0, 1), each layer's drawn from (seed, Hugging Face name)."""
    for _, prefix in modules(model, Prefix):
        drawn = torch.empty(prefix.past_key_values.shape, dtype=torch.float32, device="cpu")
        drawn.normal_(generator=generator(seed, f"{prefix.name}.past_key_values"))
        keep(drawn, prefix.past_key_values, local_rows)


def adapter_tensors(model: nn.Module) -> dict[str, Saved]:
    """The one tensor of PEFT's adapter_model.safetensors, [P, layers * 2 * Hkv * d] -> our parameters side by side."""
    found = {f"{path}.past_key_values": prefix for path, prefix in modules(model, Prefix)}
    if not found:
        return {}
    first, *others = found
    return {"prompt_embeddings": Saved(first, 0, len(found[first].past_key_values), tuple(others))}


def config_dict(settings: PrefixSettings, base_model_name: str) -> dict[str, Any]:
    """What adapter_config.json says: PEFT's keys, `base_model_name` as the user typed it."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": settings.num_virtual_tokens,
        "num_layers": settings.num_layers,
        "num_attention_heads": settings.num_attention_heads,
        "token_dim": settings.token_dim,
        "encoder_hidden_size": settings.token_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


def _whole_or_none(value: Any) -> int | None:
    return None if value is None else whole(value)


_READER = Reader(
    method="prefix tuning",
    read_by={
        "num_virtual_tokens": whole,
        "num_layers": _whole_or_none,
        "num_attention_heads": _whole_or_none,
        "token_dim": _whole_or_none,
    },
    needs=("num_virtual_tokens",),
    accepts={
        "peft_type": ("PREFIX_TUNING",),
        "task_type": ("CAUSAL_LM", None),
        "num_transformer_submodules": (1, None),
        "prefix_projection": (False,),
        "init_weights": (None, "zero"),
    },
    silent=frozenset({"encoder_hidden_size"}),
)


def settings_from(config: Mapping[str, Any], where: str = "adapter_config.json") -> PrefixSettings:
    """Settings of a saved adapter. Raises UserError with everything in it that cannot be followed."""
    return PrefixSettings(**_READER.read(config, where))
