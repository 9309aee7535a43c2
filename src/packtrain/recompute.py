"""How much of a forward the backward computes again: as asked, or as the memory there is makes needed.

    choose       the first of none, selective and full that fits, the same on every rank, and a line for the log
    Held         what stays in a device's memory through a step, beside activations

What is needed is Held, what the forward keeps (model/activations.py), a layer's worth more for gradients on their way,
and one more where layers are computed again. It has to fit into nine tenths of what is free before the weights are
made; on a GPU a GiB is left for kernels' workspaces and NCCL. On a CPU it is the host's free memory, shared by the
machine's ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from packtrain.configs.run import RunConfig
from packtrain.distributed.collectives import least
from packtrain.distributed.parallelize import group_sizes
from packtrain.distributed.place import Place
from packtrain.kernels.rows import Form
from packtrain.model.activations import kept_bytes, layer_bytes
from packtrain.model.fast import Recompute
from packtrain.model.fast_layer import linears
from packtrain.model.quantised import whole_bytes
from packtrain.precision import optimizer_rule

GIB = 2**30
SHARE = 0.9
WORKSPACE = GIB
CHOICES: tuple[Recompute, ...] = ("none", "selective", "full")

MOMENTS = {"AdamW": 8, "anyprecision": 4, "adamw8bit": 2}
"""Bytes of an optimizer's state for a trained number."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on this rank's device, from shapes."""

    weights: int
    """Shards, and what is gathered at a time: two layers, and what is in no layer."""
    training: int
    """Gradients, fp32 accumulators, masters and moments of what trains."""

    @classmethod
    def of(cls, cfg: RunConfig, model: nn.Module, place: Place, form: Form | None) -> Held:
        """Of a model on meta, adapters installed, before it is sharded."""
        fsdp, shards = cfg.fsdp_config, _shards(cfg, place)
        layers = [_weights(layer, form) for layer in cast(Any, model).model.layers]
        others = sum(p.nbytes for p in model.parameters()) - sum(
            p.nbytes for p in cast(Any, model).model.layers.parameters()
        )
        rule = optimizer_rule(cfg)
        training = 0
        for parameter in (p for p in model.parameters() if p.requires_grad):
            low = parameter.dtype != torch.float32
            extra = (6 if rule == "anyprecision" else 4 + parameter.itemsize) if low else 0  # remainder, or master
            training += parameter.numel() * (4 + extra + MOMENTS[rule])
        if shards == 1:
            return cls(sum(layers) + others, training)
        gathered = 2 * max(layers, default=0) + others
        if fsdp.fsdp_cpu_offload:
            return cls(gathered, 0)
        kept = sum(layers) if fsdp.sharding_strategy == "SHARD_GRAD_OP" else gathered
        return cls(-(-(sum(layers) + others) // shards) + kept, -(-training // shards))


def choose(
    cfg: RunConfig, model: nn.Module, place: Place, *, tokens: int, form: Form | None, apart: bool = False
) -> tuple[Recompute, str | None]:
    """(what is computed again, a line for the log if it was left to us). Collective: every rank calls it.

    `tokens` are those of a micro-batch, `form` that of fused layers, `apart` as in `kept_bytes`.
    """
    asked = cfg.train_config.activation_checkpointing
    if asked != "auto":
        return asked, None
    held = Held.of(cfg, model, place, form)
    reserve = WORKSPACE if place.device.type == "cuda" else 0
    room = least(SHARE * free_bytes(place) - reserve - held.weights - held.training, place)
    shards = _shards(cfg, place)
    needs = {choice: _needed(model, tokens, choice, form, apart, shards == 1) for choice in CHOICES}
    chosen: Recompute = next((choice for choice in CHOICES if needs[choice] <= room), CHOICES[-1])
    line = f"activation checkpointing: {chosen}: a micro-batch of {tokens:,} tokens takes about {_gib(needs[chosen])}"
    line += "" if chosen == "none" else f" ({_gib(needs['none'])} if all were kept)"
    line += f" of {_gib(max(0, room))} free beside weights and optimizer"
    if needs[chosen] > room:
        line += "; it may not fit: a smaller --batch_size_training or --context_length needs less"
    return chosen, line


def free_bytes(place: Place) -> float:
    """What this rank may still take of its device, or its part of the host."""
    if place.device.type == "cuda":
        return float(torch.cuda.mem_get_info(place.device)[0])
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / place.local_world_size
    return float("inf")


def _shards(cfg: RunConfig, place: Place) -> int:
    """Ranks that share one copy of the model."""
    fsdp = cfg.fsdp_config
    sizes = (place.world_size, place.local_world_size, fsdp.sharding_strategy)
    return group_sizes(*sizes, fsdp.sharding_group_size, fsdp.replica_group_size)[1]


def _needed(
    model: nn.Module, tokens: int, recompute: Recompute, form: Form | None, apart: bool, unsharded: bool = True
) -> int:
    llama = cast(Any, model)
    layers = list(llama.model.layers)
    one = max((layer_bytes(layer, llama.config, llama.model.dtype, "none", form) for layer in layers), default=0)
    found = kept_bytes(model, tokens, recompute, form, apart=apart) + tokens * one * (1 if recompute == "none" else 2)
    found += max((whole_bytes(layer) for layer in layers), default=0)
    if form is not None and form.float8:
        # weights turned over: kept too, or made for each use (model/fast_layer.py), as rows with their columns then are
        turned = [sum(linear.weight.numel() for linear in linears(layer)) for layer in layers]
        kept = unsharded and recompute == "none"
        found += sum(turned) if kept else (1 if unsharded else 2) * max(turned, default=0)
    return found


def _weights(layer: Any, form: Form | None) -> int:
    """Bytes of a layer's parameters, its products' in float8 if they are to be."""
    whole = sum(parameter.nbytes for parameter in layer.parameters())
    if form is None or not form.float8:
        return int(whole)
    return int(whole - sum(linear.weight.nbytes - linear.weight.numel() for linear in linears(layer)))


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
