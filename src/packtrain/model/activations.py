"""What a forward keeps for its backward, in bytes, told from shapes before anything is made.

    kept_bytes    of a whole model over so many tokens: layers kept or recomputed, and the two ends
    layer_bytes   of one layer for a token

With e bytes an element, D the width, Q and K the widths of queries and of keys, H heads, I the MLP's width, a token of
a plain layer costs

    offload       0                                    its input is on the host, but for AWAY layers' at a time
    full          e D                                  its input
    selective     e (D + 2 Q + 2 K) + 4 H              beside it q, k, v, attention's output, its log-sum-exp
    none          e (2 D + 2 Q + 2 K + 3 I) + 4 H + 8  both norms' inputs and scales, gate and up, silu(gate)
                  + e D       for each norm that learns
                  + e n       for each layer (not o_proj, whose input is attention's output) that reads its input of n
                              columns in the backward: its weight learns, or an adapter without dropout does
                  + e (n + r) for each LoRA with dropout, e r for one without
                  + e I       for gate and for up if adapted, less 2 e I if both are: the base's product is gone then

and e Q more in the last two where attention goes document by document: its output is put together then.

The fused form keeps what model/kept.py lists. The ends are rope's tables, the last norm, and the gradient
of the head's input, which the loss makes in its forward, as it does the head's own. Tokens without a label are counted
there too. Not in it: eager attention's scores, and the fp32 copy of each norm's input that torch makes of bf16 on CPUs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from packtrain.kernels.rows import Form
from packtrain.model.fast_layer import Recompute
from packtrain.model.linear import Linear
from packtrain.model.shared import linears

AWAY = 3
"""Inputs of offloaded layers that are on the device at a time: one in use, one that comes, one that goes."""


def kept_bytes(
    model: nn.Module, tokens: int, recompute: Recompute, form: Form | None = None, *, apart: bool = False
) -> int:
    """Bytes that a training forward over `tokens` of a LlamaForCausalLM (adapters installed, meta or not) keeps.

    `form` is that of fused layers, None for plain ones; `apart` says that attention goes document by document.
    """
    llama = cast(Any, model)
    config, dtype = llama.config, llama.model.dtype
    size, width = dtype.itemsize, config.hidden_size
    layers = sum(layer_bytes(layer, config, dtype, recompute, form) for layer in llama.model.layers)
    if recompute == "offload":
        layers = min(AWAY, len(llama.model.layers)) * size * width
    if apart and recompute in {"none", "selective"} and form is None:
        layers += len(llama.model.layers) * size * config.num_attention_heads * config.head_dim
    norm = 2 if llama.model.norm.weight.requires_grad else 1
    ends = size * (config.head_dim + (norm + 1) * width)
    head = llama.lm_head.weight
    gradient = head.numel() * size if head.requires_grad else 0
    copies = 0
    if recompute == "none":  # fp32 parameters are cast where they are used
        cast_ones = (p for p in model.parameters() if p.requires_grad and p.dtype != dtype)
        copies = size * sum(parameter.numel() for parameter in cast_ones)
    return int(tokens * (layers + ends) + gradient + copies)


def layer_bytes(layer: Any, config: Any, dtype: torch.dtype, recompute: Recompute, form: Form | None) -> int:
    """Bytes a token of one decoder layer."""
    size = dtype.itemsize
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    queries, keys = heads * int(config.head_dim), int(config.num_key_value_heads * config.head_dim)
    if recompute in {"full", "offload"}:
        return size * width if recompute == "full" else 0
    if form is not None:
        return _fused(layer, (width, queries, keys, heads), size, recompute, form)
    attention = size * (2 * queries + 2 * keys) + 4 * heads
    if layer.self_attn.prompt is not None:
        attention += size * 2 * queries  # attention to the prompt, and its part behind the gate
    if recompute == "selective":
        return size * width + attention
    qkv, output, gate_up, down = linears(layer)
    learning = sum(bool(norm.weight.requires_grad) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    elements = (2 + learning) * width
    elements += sum(_inputs(linear, kept=linear is output) for linear in (qkv, output, gate_up, down))
    adapted = sum(hasattr(adapter, "weight") or hasattr(adapter, "lora_A") for adapter in gate_up.adapters.values())
    elements += down.in_features * (1 + adapted + (0 if adapted == len(gate_up.parts) else 2))
    return size * elements + attention + 8


def _inputs(linear: Linear, kept: bool) -> int:
    """Elements a token that a linear layer keeps of its input, which is `kept` anyway or not."""
    loras: list[Any] = [adapter for adapter in linear.adapters.values() if hasattr(adapter, "lora_A")]
    dropped = [lora for lora in loras if lora.dropout > 0]
    whole = any(hasattr(adapter, "weight") for adapter in linear.adapters.values())
    reads = linear.weight.requires_grad or whole or len(dropped) < len(loras)
    own = linear.in_features if reads and not kept else 0
    return own + linear.in_features * len(dropped) + sum(int(lora.lora_A.shape[0]) for lora in loras)


def _fused(layer: Any, shape: tuple[int, int, int, int], size: int, recompute: Recompute, form: Form) -> int:
    width, queries, keys, heads = shape
    stream = 2 * size * width  # both norms' inputs
    products = linears(layer)
    ranks = [
        sum(int(cast(Any, adapter).lora_A.shape[0]) for adapter in linear.adapters.values()) for linear in products
    ]
    if recompute == "selective":
        first = form.width(width, -(-ranks[0] // 8) * 8) + 8 + size * ranks[0] if form.float8 else 0
        return stream + size * queries + 4 * heads + first
    number = 1 if form.float8 else size
    rows = sum(
        number * form.width(linear.in_features, -(-rank // 8) * 8) for linear, rank in zip(products, ranks, strict=True)
    )
    out = size * queries if form.float8 else 0  # else it is in the rows of o_proj
    return stream + rows + size * (queries + 2 * keys + 2 * products[3].in_features + sum(ranks)) + out + 4 * heads + 8
