"""The story of one run, top to bottom; the only file that knows all the rooms.

    Inputs          what preflight read and checked: model config, weights, tokenizer, tokens, adapter settings
    loaders         tokens -> batches by seed and epoch
    build           model on meta -> adapters -> recompute, shard -> weights streamed into each rank's shard
    optimizer_of    what trains, its masters and its schedule
    run             all of it, the loop, and what the run leaves behind

`build` and `optimizer_of` can be called without a run (tests, benches and predictions do).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from packtrain import log
from packtrain.checkpoint import adapter as adapter_files
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import copy_side_files, load_model, mirror, save_model
from packtrain.checkpoint.store import Claim, ResultFile, claim, read_json
from packtrain.configs.run import RunConfig
from packtrain.data.loader import Loader
from packtrain.data.tokens import Tokens
from packtrain.distributed.parallelize import local_rows, materialise, parallelize
from packtrain.distributed.place import Place
from packtrain.errors import Stopped
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM, blocks, draw
from packtrain.optim import Optimizer, schedule
from packtrain.peft import lora
from packtrain.peft.trainable import count_line, trainable
from packtrain.train.interrupt import Interrupt
from packtrain.train.loop import Loop, Plan, Sinks
from packtrain.train.metrics import MetricsFile


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
    lora: lora.LoraSettings | None
    adapter: Path | None
    """--from_peft_checkpoint's folder."""
    pad_id: int
    fingerprint: dict[str, Any]


def output_root(cfg: RunConfig) -> Path:
    """Where results go: --output_dir, else the dist flags' folder, else ./packtrain-out."""
    train = cfg.train_config
    if train.output_dir is not None:
        return Path(train.output_dir)
    if train.dist_checkpoint_root_folder is not None:
        name = str(train.model_name or "random").lstrip("/").replace("/", "--")
        return Path(train.dist_checkpoint_root_folder) / f"{train.dist_checkpoint_folder}-{name}"
    return Path("packtrain-out")


def weight_dtype(cfg: RunConfig, device: torch.device) -> torch.dtype:
    """The forward's weights: bf16 on GPUs, fp32 on CPUs unless pure_bf16 was typed, fp32 without mixed precision."""
    asked_bf16 = cfg.fsdp_config.pure_bf16
    if device.type == "cpu":
        if asked_bf16:
            log.once(
                "warning: bf16 was asked for on a CPU; without bf16 instructions it is about 50 times slower than fp32"
            )
        return torch.bfloat16 if asked_bf16 else torch.float32
    if not cfg.fsdp_config.mixed_precision and not asked_bf16:
        return torch.float32
    return torch.bfloat16


def loaders(cfg: RunConfig, inputs: Inputs, place: Place) -> tuple[Loader, Loader | None]:
    """Training and validation batches of this rank."""
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


def build(cfg: RunConfig, inputs: Inputs, place: Place) -> LlamaForCausalLM:
    """The model of this rank, weights in place: no rank ever holds more than its shard and a slice."""
    model = LlamaForCausalLM(inputs.model_config, dtype=weight_dtype(cfg, place.device), device=torch.device("meta"))
    if inputs.lora is not None:
        lora.install(model, inputs.lora)
    fsdp = cfg.fsdp_config
    parallelize(
        model,
        blocks(model),
        place,
        fsdp.sharding_strategy,
        shard_group=fsdp.sharding_group_size,
        replica_group=fsdp.replica_group_size,
        recompute=cfg.train_config.activation_checkpointing == "full",
    )
    materialise(model, place.device)
    if inputs.weights is not None:
        for line in load_model(model, inputs.weights):
            log.say(line)
    else:
        draw(model, cfg.train_config.seed, local_rows)
    if inputs.lora is not None:
        lora.initialise(model, cfg.train_config.seed, local_rows)
        if inputs.adapter is not None:
            adapter_files.load_adapter(model, inputs.adapter)
    return model


def optimizer_of(
    cfg: RunConfig, model: LlamaForCausalLM, steps_per_epoch: int, total_steps: int
) -> tuple[Optimizer, Callable[[int], float]]:
    """The optimizer over what trains, and the learning rate as a function of the step (from 1)."""
    train = cfg.train_config
    optimizer = Optimizer(trainable(model), lr=train.lr, weight_decay=train.weight_decay)
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


def run(cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt) -> dict[str, Any]:
    """Train, save, and say how it went: returns what result.json holds (the same on every rank).

    Raises Stopped when a signal ended the run after saving, UserError when the folder is not this run's to use.
    """
    root = output_root(cfg)
    state = place.agree(
        "claim", lambda: claim(root, inputs.fingerprint, overwrite=cfg.train_config.overwrite_output_dir).value
    )
    if state == Claim.FINISHED.value:
        log.say(f"{root} holds this very run, finished; nothing to do (--overwrite_output_dir trains again)")
        return read_json(root / "run" / "result.json") or {}
    record = Record(cfg, root, inputs, leads=place.rank == 0)
    try:
        results = _train(cfg, place, inputs, interrupt, record)
    except (Stopped, SystemExit) as end:
        record.finish("stopped", str(end) if isinstance(end, Stopped) else "stopped by a signal before the first step")
        raise
    except BaseException as error:
        record.finish("failed", place.first_cause() or f"{type(error).__name__}: {error}")
        raise
    return record.finish("done", None, **results)


def _train(cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt, record: Record) -> dict[str, Any]:
    train = cfg.train_config
    training, validation = loaders(cfg, inputs, place)
    steps = total_steps(cfg, training.steps_per_epoch)
    log.say(_batch_line(cfg, place, training, steps))
    model = build(cfg, inputs, place)
    log.say(count_line(model))
    optimizer, lr = optimizer_of(cfg, model, training.steps_per_epoch, steps)
    metrics = MetricsFile(record.run / "metrics.jsonl" if place.rank == 0 else None)
    saver = Saver(cfg, model, inputs, record.root, place)
    plan = Plan(
        total_steps=steps,
        eval_steps=train.eval_steps,
        eval_first=train.eval_first,
        max_eval_batches=train.max_eval_step,
        clip=train.gradient_clipping_threshold if train.gradient_clipping else None,
        prefetch=1 if train.num_workers_dataloader else 0,
        lr=lr,
    )
    sinks = Sinks(metrics=metrics, save=saver.save if train.save_model else None, note=record.note)
    loop = Loop(model, optimizer, training, validation, place=place, plan=plan, sinks=sinks, interrupt=interrupt)
    interrupt.begin()
    try:
        loop.run()
    finally:
        metrics.close()
    return loop.averages.results() | {
        "best_eval_loss": loop.best_loss if loop.best_step else None,
        "best_step": loop.best_step or None,
        "last": str(record.root) if train.save_model else None,
        "best": str(record.root / "best") if train.save_model and loop.best_step else None,
        "tokens_total": loop.tokens_total,
        "tokens_per_second": loop.inputs_total / loop.step_seconds,
    }


def _batch_line(cfg: RunConfig, place: Place, training: Loader, steps: int) -> str:
    train = cfg.train_config
    items = "rows" if training.items == training.rows else f"of {training.items} packs"
    batch, accumulation = train.batch_size_training, train.gradient_accumulation_steps
    together = batch * accumulation * place.world_size
    return (
        f"{training.rows} rows, {training.labels_total:,} trained tokens an epoch; a step takes {together} {items} "
        f"({batch} x {accumulation} accumulated x {place.world_size} ranks); "
        f"{training.steps_per_epoch} steps an epoch, {steps} in all"
    )


class Record:
    """run/config.yaml and run/result.json; on ranks other than 0 it only remembers."""

    def __init__(self, cfg: RunConfig, root: Path, inputs: Inputs, leads: bool) -> None:
        self.root, self.run = root, root / "run"
        self._began = time.monotonic()
        self._file: ResultFile | None = None
        self._facts: dict[str, Any] = {}
        if leads:
            self.run.mkdir(parents=True, exist_ok=True)
            cfg.write(self.run / "config.yaml")
            self._file = ResultFile(self.run / "result.json", fingerprint=inputs.fingerprint)

    def note(self, **facts: Any) -> None:
        """Remember facts for the next time the file is written."""
        self._facts |= facts
        if self._file is not None:
            self._file.note(**facts)

    def finish(self, status: str, reason: str | None, **results: Any) -> dict[str, Any]:
        """The last word, written by rank 0."""
        results["seconds"] = time.monotonic() - self._began
        if self._file is not None:
            return self._file.finish(status, reason, **results)
        return self._facts | {"status": status, "reason": reason} | results


class Saver:
    """Writes the last state to the root, and mirrors it to best/ when it is the best; every rank calls it."""

    def __init__(self, cfg: RunConfig, model: LlamaForCausalLM, inputs: Inputs, root: Path, place: Place) -> None:
        self._cfg, self._model, self._inputs, self._root, self._place = cfg, model, inputs, root, place

    def save(self, best: bool) -> float:
        """Seconds it took."""
        began = time.monotonic()
        inputs = self._inputs
        leads = self._place.rank == 0
        if inputs.lora is not None:
            config = lora.config_dict(inputs.lora, str(self._cfg.train_config.model_name))
            adapter_files.save_adapter(self._model, self._root, config, leads=leads)
        else:
            save_model(self._model, self._root, inputs.config_json, leads=leads)
        if leads:
            if inputs.tokenizer is not None:
                inputs.tokenizer.save_pretrained(self._root)
            if inputs.weights is not None and inputs.lora is None:
                copy_side_files(inputs.weights.path, self._root)
            if best:
                mirror(self._root, self._root / "best")
        return time.monotonic() - began


if (
    __name__ == "__main__"
):  # llama-recipes' users type python -m llama_cookbook.finetuning: here too, upward just this once
    from packtrain.cli import train

    sys.exit(train(sys.argv[1:]))
