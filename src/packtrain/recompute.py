"""How much of a forward the backward computes again: as asked, or as the memory there is makes needed.

    choose       the first of none, selective, full, offload that fits, the same on every rank, and a line for the log
    streamed     which layers of a frozen base live on the host, if --fsdp_cpu_offload lets them, and a line for the log
    Held         what stays in a device's memory through a step, beside activations
    limit        keeps a process to --gpu_memory_limit

What is needed is Held, what the forward keeps (model/activations.py), a layer's worth more for gradients on their way,
and one more where layers are computed again; of long rows what model/long_rows.py says. It has to
fit into nine tenths of what is free before the weights are made, and into --gpu_memory_limit; on a GPU a GiB is left
for kernels' workspaces and NCCL. On a CPU it is the host's free memory, shared by the machine's ranks. Offload needs
that on GPUs too, for the inputs of all layers (model/offload.py).

Where layers can be streamed, recomputation is chosen as if all of them were; as many as then fit stay on the device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from packtrain import log
from packtrain.configs.run import RunConfig
from packtrain.distributed import host_memory
from packtrain.distributed.collectives import least
from packtrain.distributed.parallelize import group_sizes
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.kernels.rows import Form
from packtrain.model import streaming
from packtrain.model.activations import kept_bytes, layer_bytes
from packtrain.model.fast import Recompute
from packtrain.model.long_rows import LONG, working_bytes
from packtrain.model.quantised import whole_bytes
from packtrain.model.shared import linears
from packtrain.precision import optimizer_rule

GIB = 2**30
SHARE = 0.9
HOST_SHARE = 0.95
ALLOCATOR_SET = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Where a user says what torch's allocator is to do."""
WORKSPACE = GIB
CHOICES: tuple[Recompute, ...] = ("none", "selective", "full", "offload")

MOMENTS = {"AdamW": 8, "anyprecision": 4, "adamw8bit": 2}
"""Bytes of an optimizer's moments for a trained number; 2 with --moments 8bit."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on this rank's device, from shapes."""

    weights: int
    """Shards, and what is gathered at a time: two layers, and what is in no layer; of streamed layers their places."""
    training: int
    """Gradients, their fp32 sums, masters or remainders, and moments of what trains."""

    @classmethod
    def of(cls, cfg: RunConfig, model: nn.Module, place: Place, form: Form | None) -> Held:
        """Of a model on meta, adapters installed, before it is sharded."""
        fsdp, shards = cfg.fsdp_config, _shards(cfg, place)
        layers = [_weights(layer, form) for layer in cast(Any, model).model.layers]
        others = sum(p.nbytes for p in model.parameters()) - sum(
            p.nbytes for p in cast(Any, model).model.layers.parameters()
        )
        summed = cfg.train_config.gradient_accumulation_steps > 1 or (place.world_size > 1 and shards == 1)
        learning = (parameter for parameter in model.parameters() if parameter.requires_grad)
        training = sum(parameter.numel() * _learned_bytes(cfg, parameter.dtype, summed) for parameter in learning)
        if shards == 1:
            return cls(sum(layers) + others - _away(cfg, model, place, form), training)
        gathered = 2 * max(layers, default=0) + others
        if fsdp.fsdp_cpu_offload:
            return cls(gathered, 0)
        kept = sum(layers) if fsdp.sharding_strategy == "SHARD_GRAD_OP" else gathered
        return cls(-(-(sum(layers) + others) // shards) + kept, -(-training // shards))


def _learned_bytes(cfg: RunConfig, dtype: torch.dtype, summed: bool) -> int:
    """Of gradients and optimizer for one number; `summed`: its gradient is a sum, of micro-batches or of ranks."""
    rule = optimizer_rule(cfg)
    moments = 2 if rule == "anyprecision" and cfg.fsdp_config.moments == "8bit" else MOMENTS[rule]
    if dtype == torch.float32:
        return 4 + moments
    if rule != "anyprecision":
        return dtype.itemsize + 4 + 4 + moments  # a gradient on its way into a sum, and a master
    return dtype.itemsize + 4 * summed + 2 * cfg.fsdp_config.use_kahan + moments


def choose(
    cfg: RunConfig, model: nn.Module, place: Place, *, tokens: int, form: Form | None, apart: bool = False
) -> tuple[Recompute, str | None]:
    """(what is computed again, a line for the log if it was left to us). Collective: every rank calls it.

    `tokens` are those of a micro-batch, `form` that of fused layers, `apart` as in `kept_bytes`.
    """
    asked = cfg.train_config.activation_checkpointing
    if asked not in {"auto", "offload"}:
        return cast(Recompute, asked), None
    cuda, inputs = place.device.type == "cuda", layer_inputs(model, tokens)
    host = least(HOST_SHARE * host_bytes(place), place)
    if asked == "offload":
        return _offloaded(inputs, host, tokens, cuda)
    coming, shards = _coming(cfg, model, place), _shards(cfg, place)
    room = _room(cfg, model, place, form) + coming
    needs = {choice: _needed(model, tokens, choice, form, apart, shards == 1, coming) for choice in CHOICES}
    choices = CHOICES if cuda and inputs <= host else CHOICES[:-1]
    chosen: Recompute = next((choice for choice in choices if needs[choice] <= room), choices[-1])
    line = f"activation checkpointing: {chosen}: a micro-batch of {tokens:,} tokens takes about {_gib(needs[chosen])}"
    line += "" if chosen == "none" else f" ({_gib(needs['none'])} if all were kept)"
    line += f" of {_gib(max(0, room))} free beside weights and optimizer"
    line += f", and {_gib(inputs)} of the host's memory" if chosen == "offload" else ""
    if needs[chosen] > room:
        line += "; it may not fit: a smaller --batch_size_training or --context_length needs less"
    return chosen, line


def streamed(
    cfg: RunConfig,
    model: nn.Module,
    place: Place,
    *,
    tokens: int,
    form: Form | None,
    recompute: Recompute,
    apart: bool = False,
) -> tuple[list[int], str | None]:
    """(numbers of the layers that are to live on the host, a line for the log if that was asked for). Collective.

    Raises UserError where the host has no room for them.
    """
    if not _streams(cfg, place):
        return [], None
    layers, able = list(cast(Any, model).model.layers), _streamable(cfg, model, place, form)
    if form is None or not able:
        why = "in plain layers" if form is None else "for weights that train or are quantised"
        return [], f"base: all of it stays on the GPU: --fsdp_cpu_offload does nothing {why} unless they are sharded"
    one = max(streaming.layer_bytes(layers[number], form) for number in able)
    coming = _coming(cfg, model, place)
    spare = _room(cfg, model, place, form) + coming - _needed(model, tokens, recompute, form, apart, True, coming)
    more = max(0, int(spare // one))
    if more + streaming.SLOTS >= len(able):
        return [], f"base: all {len(layers)} layers stay on the GPU, where there is room for them"
    chosen = streaming.spread(able, len(able) - more)
    _room_on_host(model, place, tokens, recompute, len(chosen) * streaming.pinned_bytes(one))
    line = (
        f"base: {len(layers) - len(chosen)} of {len(layers)} layers stay on the GPU, {len(chosen)} "
        f"({_gib(one * len(chosen))}) are copied from host memory ahead of use"
    )
    return chosen, line + ("; the rest may not fit" if spare < 0 else "")


def _room_on_host(model: nn.Module, place: Place, tokens: int, recompute: Recompute, base: int) -> None:
    inputs = layer_inputs(model, tokens) if recompute == "offload" else 0
    host = least(HOST_SHARE * host_bytes(place), place)
    if base + inputs > host:
        raise UserError(
            f"--fsdp_cpu_offload: what does not fit of the base takes {_gib(base)} of the host's memory for each worker"
            + (f", and layers' inputs {_gib(inputs)}" if inputs else "")
            + f"; it has {_gib(host)} left: take a larger --gpu_memory_limit, if you set one, or --quantization"
        )


def limit(cfg: RunConfig, place: Place) -> None:
    """Let this process take no more of its GPU than --gpu_memory_limit says."""
    most = cfg.train_config.gpu_memory_limit * GIB
    if most and place.device.type == "cuda":
        total = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), place.device)
        if not ALLOCATOR_SET & os.environ.keys():
            # else what lies unused between tensors, which counts too, may be some GiB
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    elif most:
        log.say(f"{cfg.place('train_config.gpu_memory_limit')}: has no effect on a CPU")


def _room(cfg: RunConfig, model: nn.Module, place: Place, form: Form | None) -> float:
    """Bytes that activations may take on every rank."""
    budget = SHARE * free_bytes(place)
    if place.device.type == "cuda":
        budget = min(budget, cfg.train_config.gpu_memory_limit * GIB or budget) - WORKSPACE
    held = Held.of(cfg, model, place, form)
    return least(budget - held.weights - held.training, place)


def _coming(cfg: RunConfig, model: nn.Module, place: Place) -> int:
    """Bytes of the layers' gradients, if they come in the backward as what the forward kept goes, layer by layer.

    So there is room for both where there is for the larger. Sums of micro-batches are there before; an adapter's are
    small.
    """
    fsdp, shards = cfg.fsdp_config, _shards(cfg, place)
    if cfg.train_config.use_peft or cfg.train_config.gradient_accumulation_steps > 1:
        return 0
    if shards > 1 and fsdp.fsdp_cpu_offload:
        return 0
    narrow = optimizer_rule(cfg) == "anyprecision"
    learning = (p for p in cast(Any, model).model.layers.parameters() if p.requires_grad)
    return int(sum(p.numel() * (p.itemsize if narrow else 4) for p in learning) // shards)


def _streams(cfg: RunConfig, place: Place) -> bool:
    """Whether layers that do not fit are to live on the host and work on the device."""
    return cfg.fsdp_config.fsdp_cpu_offload and place.device.type == "cuda" and _shards(cfg, place) == 1


def _streamable(cfg: RunConfig, model: nn.Module, place: Place, form: Form | None) -> list[int]:
    return streaming.streamable(model) if form is not None and _streams(cfg, place) else []


def _away(cfg: RunConfig, model: nn.Module, place: Place, form: Form | None) -> int:
    """Bytes of weights that need not be on the device if all layers are streamed that can be."""
    able = [cast(Any, model).model.layers[number] for number in _streamable(cfg, model, place, form)]
    one = max((streaming.layer_bytes(layer, cast(Form, form)) for layer in able), default=0)
    return sum(_products(layer, form) for layer in able) - one * min(len(able), streaming.SLOTS)


def free_bytes(place: Place) -> float:
    """What this rank may still take of its device, or its part of the host."""
    if place.device.type == "cuda":
        return float(torch.cuda.mem_get_info(place.device)[0])
    return host_bytes(place)


def host_bytes(place: Place) -> float:
    """This rank's part of what the host, or the container that it runs in, has left."""
    return host_memory.free() / place.local_world_size


def layer_inputs(model: nn.Module, tokens: int) -> int:
    """Bytes of the inputs of all layers."""
    llama = cast(Any, model)
    return len(llama.model.layers) * tokens * int(llama.config.hidden_size) * int(llama.model.dtype.itemsize)


def _offloaded(inputs: int, host: float, tokens: int, cuda: bool) -> tuple[Recompute, str]:
    """Raises UserError where the host has no room for what was asked."""
    if not cuda:
        return "full", "activation checkpointing: full: on a CPU there is no other memory to offload layers' inputs to"
    if inputs > host:
        raise UserError(
            f"--activation_checkpointing offload: the layers' inputs of a micro-batch of {tokens:,} tokens are "
            f"{_gib(inputs)} for each worker, and the host has {_gib(host)} left for them; a shorter --context_length "
            "or a smaller --batch_size_training needs less"
        )
    return "offload", f"activation checkpointing: offload: {_gib(inputs)} of layers' inputs wait in the host's memory"


def _shards(cfg: RunConfig, place: Place) -> int:
    """Ranks that share one copy of the model."""
    fsdp = cfg.fsdp_config
    sizes = (place.world_size, place.local_world_size, fsdp.sharding_strategy)
    return group_sizes(*sizes, fsdp.sharding_group_size, fsdp.replica_group_size)[1]


def _needed(
    model: nn.Module,
    tokens: int,
    recompute: Recompute,
    form: Form | None,
    apart: bool,
    unsharded: bool = True,
    coming: int = 0,
) -> int:
    llama = cast(Any, model)
    layers = list(llama.model.layers)
    one = max((layer_bytes(layer, llama.config, llama.model.dtype, "none", form) for layer in layers), default=0)
    found = max(kept_bytes(model, tokens, recompute, form, apart=apart), coming)
    if form is not None and tokens > LONG and recompute != "none":
        found += working_bytes(llama.config, llama.model.dtype.itemsize, tokens, one)
    else:
        found += tokens * one * (1 if recompute == "none" else 2)
    found += max((whole_bytes(layer) for layer in layers), default=0)
    if form is not None and form.float8:
        # weights turned over: kept too, or made for each use (model/fast_layer.py), as rows with their columns then are
        turned = [sum(linear.weight.numel() for linear in linears(layer)) for layer in layers]
        kept = unsharded and recompute == "none"
        found += sum(turned) if kept else (1 if unsharded else 2) * max(turned, default=0)
        head = llama.lm_head.weight
        found += 0 if head.requires_grad else head.numel()  # turned over while the loss is made (kernels/head.py)
    return found


def _weights(layer: Any, form: Form | None) -> int:
    """Bytes of a layer's parameters, its products' in float8 if they are to be."""
    others = sum(parameter.nbytes for parameter in layer.parameters()) - _products(layer, None)
    return int(others + _products(layer, form))


def _products(layer: Any, form: Form | None) -> int:
    eight = form is not None and form.float8
    return sum(linear.weight.numel() if eight else linear.weight.nbytes for linear in linears(layer))


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
