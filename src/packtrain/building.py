"""From settings and checked inputs to what a run trains: loaders, model, optimizer.

    Inputs          what preflight read and checked: model config, weights, tokenizer, tokens, adapter settings
    loaders         tokens -> batches by seed and epoch
    build           model on meta -> adapters -> recompute, shard -> weights streamed into each rank's shard
    optimizer_of    what trains, its masters and its schedule

All of it can be called without a run: tests, benches and predictions do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.fsdp import FSDPModule

from packtrain import log, peft
from packtrain import recompute as recomputing
from packtrain.checkpoint import adapter as adapter_files
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import load_model
from packtrain.configs.run import RunConfig
from packtrain.data.loader import Loader
from packtrain.data.tokens import Tokens
from packtrain.distributed.parallelize import largest, local_rows, materialise, parallelize
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.kernels import float8
from packtrain.kernels.attention_choice import choose
from packtrain.kernels.rows import Form
from packtrain.model import fast, offload, quantised, streaming
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM, blocks, draw
from packtrain.optim import Optimizer, schedule
from packtrain.peft.lora import saved_layout
from packtrain.peft.trainable import freeze, trainable
from packtrain.precision import optimizer_rule, quantisation, weight_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run reads, found right by preflight."""

    model_config: LlamaConfig
    config_json: dict[str, Any]
    weights: HfFolder | None
    """None: random weights (--random_init)."""
    tokenizer: Any | None
    train: Tokens
    validation: Tokens | None
    collator: Callable[..., Any] | None
    adapter: peft.Settings | None
    """None: full fine-tuning."""
    adapter_folder: Path | None
    """--from_peft_checkpoint's."""
    pad_id: int
    fingerprint: dict[str, Any]
    skipped: tuple[dict[str, Any], ...] = ()
    """Rows that --on_bad_rows skip left out: file, row, line, reason. Known to the rank that read them."""


def loaders(
    cfg: RunConfig, inputs: Inputs, place: Place, step_items: int | None = None
) -> tuple[Loader, Loader | None]:
    """Training and validation batches of this rank. `step_items`: of the run that is gone on with."""
    train = cfg.train_config
    shared: dict[str, Any] = {
        "strategy": strategy(cfg, inputs),
        "context_length": train.context_length,
        "rank": place.rank,
        "world_size": place.world_size,
        "seed": train.seed,
        "pad_id": inputs.pad_id,
        "collator": inputs.collator,
    }
    training = Loader(
        inputs.train,
        batch_size=train.batch_size_training,
        accumulation=train.gradient_accumulation_steps,
        shuffle=True,
        step_items=step_items,
        **shared,
    )
    if inputs.validation is None:
        return training, None
    return training, Loader(inputs.validation, batch_size=train.val_batch_size, accumulation=1, shuffle=False, **shared)


def strategy(cfg: RunConfig, inputs: Inputs) -> Literal["packing", "padding"]:
    """How rows become batches: as asked; a user's collator, which pads, changes the default."""
    if inputs.collator is not None and not cfg.typed("train_config.batching_strategy"):
        return "padding"
    return cfg.train_config.batching_strategy


def build(cfg: RunConfig, inputs: Inputs, place: Place, *, weights: bool = True) -> LlamaForCausalLM:
    """The model of this rank, weights in place: no rank ever holds more than its shard and a slice.

    Without `weights` it has memory for them and no values: a checkpoint brings them.
    """
    recomputing.limit(cfg, place)
    dtype = weight_dtype(cfg, place.device)
    model = LlamaForCausalLM(inputs.model_config, dtype=dtype, device=torch.device("meta"))
    attention = choose(cfg.train_config.attention, place.device, dtype, inputs.model_config.head_dim)
    log.say(str(attention))
    model.model.kernel = attention.kernel
    adapter = inputs.adapter
    if adapter is not None:
        peft.method_of(adapter).install(model, adapter)
    elif cfg.train_config.freeze_layers:
        for block in blocks(model)[: cfg.train_config.num_freeze_layers]:
            freeze(block)
    packed = quantisation(cfg, place.device)
    if packed is not None:
        quantised.quantise(model, *packed[:2])
    form = _fused_form(cfg, model, place)
    needs: dict[str, Any] = {
        "tokens": micro_batch_tokens(cfg, inputs),
        "form": form,
        "apart": _apart(cfg, inputs, attention.kernel, place),
    }
    recompute, line = recomputing.choose(cfg, model, place, **needs)
    hosted, base_line = recomputing.streamed(cfg, model, place, recompute=recompute, **needs)
    for said in filter(None, (line, base_line)):
        log.say(said)
    if form is not None:
        fast.install(model, form, recompute)
    for block in blocks(model):
        block.keeps_attention = recompute == "selective"
    if recompute == "offload":
        offload.install(blocks(model), place.device)
    fsdp = cfg.fsdp_config
    home = parallelize(
        model,
        blocks(model),
        place,
        fsdp.sharding_strategy,
        shard_group=fsdp.sharding_group_size,
        replica_group=fsdp.replica_group_size,
        recompute=recompute != "none",
        cpu_offload=fsdp.fsdp_cpu_offload,
    )
    if form is not None and packed is None and not isinstance(model, FSDPModule):
        if hosted:
            streaming.install(model, hosted, home)
        fast.allocate(model, home)
    materialise(model, home, place.device)
    if packed is not None:
        held, plain = (size / 2**30 for size in quantised.held(model, local_rows))
        log.say(f"{packed[2]}; {held:.3g} GiB on this rank, {plain:.3g} without quantisation")
    if not weights:
        return model
    if inputs.weights is not None:
        for line in load_model(model, inputs.weights):
            log.say(line)
    else:
        draw(model, cfg.train_config.seed, local_rows, saved_layout(model), largest)
    if adapter is not None:
        peft.method_of(adapter).initialise(model, cfg.train_config.seed, local_rows)
        if inputs.adapter_folder is not None:
            adapter_files.load_adapter(model, inputs.adapter_folder)
    return model


def micro_batch_tokens(cfg: RunConfig, inputs: Inputs) -> int:
    """The most tokens, padding too, that a rank's micro-batch can have."""
    lengths, train = inputs.train.lengths, cfg.train_config
    packs = strategy(cfg, inputs) == "packing"
    longest = int(lengths.sum() if packs else lengths.max())
    return min(train.batch_size_training, len(lengths)) * min(longest, train.context_length)


def _apart(cfg: RunConfig, inputs: Inputs, kernel: str, place: Place) -> bool:
    """Whether attention goes document by document."""
    by_sdpa = kernel == "sdpa" or (kernel == "auto" and place.device.type == "cpu")
    return by_sdpa and strategy(cfg, inputs) == "packing"


def _fused_form(cfg: RunConfig, model: LlamaForCausalLM, place: Place) -> Form | None:
    """The fast form of the layers where they can have it (model/fast.py); the log says which they have, and why."""
    device, quantization = place.device, cfg.train_config.quantization
    wants8 = quantization == "fp8"
    if wants8 and not float8.supported(device):
        log.say("--quantization fp8: this GPU has no float8 products (they came with Ada and Hopper); the base is bf16")
        wants8 = False
    form = Form(weight_dtype(cfg, device), wants8)
    if device.type == "cpu" and not wants8:
        return None
    obstacle = fast.obstacle(model, device, form)
    if obstacle is not None and wants8:
        raise UserError(f"--quantization fp8: not possible here: {obstacle}; leave it out")
    if obstacle is not None:
        log.say(f"layers: plain form ({obstacle})")
        return None
    said = "float8, and the gradient through a frozen head" if wants8 else str(form.dtype).removeprefix("torch.")
    log.say(f"layers: fused form, products in {said}")
    return form


def optimizer_of(
    cfg: RunConfig, model: LlamaForCausalLM, steps_per_epoch: int, total_steps: int
) -> tuple[Optimizer, Callable[[int], float]]:
    """The optimizer over what trains, and the learning rate as a function of the step (from 1)."""
    train = cfg.train_config
    optimizer = Optimizer(
        trainable(model),
        lr=train.lr,
        weight_decay=train.weight_decay,
        rule=optimizer_rule(cfg),
        use_kahan=cfg.fsdp_config.use_kahan,
        moments=cfg.fsdp_config.moments,
        fp16=train.use_fp16,
    )
    factor = schedule(
        train.lr_scheduler,
        total_steps=total_steps,
        warmup_steps=train.warmup_steps,
        steps_per_epoch=steps_per_epoch,
        gamma=train.gamma,
    )
    return optimizer, lambda step: train.lr * factor(step)


def total_steps(cfg: RunConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    epochs = cfg.train_config.num_epochs * steps_per_epoch
    limit = cfg.train_config.max_train_step
    return min(limit, epochs) if limit else epochs
