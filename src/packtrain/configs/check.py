"""What cannot be run: settings out of range, at odds with one another, or not built yet.

    problems(cfg)   all of it, a sentence each; [] if the settings are right
    found(cfg)      the same with the fields that each is about

Nothing here looks at a disk or a device; that is preflight's. A rule is a generator in RULES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from packtrain.configs.run import FIELDS, RunConfig
from packtrain.configs.support import VISION, not_yet
from packtrain.configs.values import shown


class Problem(NamedTuple):
    """A sentence, and the "section.name" of all that it is about."""

    about: tuple[str, ...]
    text: str


def _train(*names: str) -> tuple[str, ...]:
    return tuple(f"train_config.{name}" for name in names)


RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("a number above 0", lambda value: value > 0, _train("lr", "gamma", "gradient_clipping_threshold")),
    (
        "0 or a number above it",
        lambda value: value >= 0,
        _train("weight_decay", "grace_seconds", "save_minutes", "hang_timeout", "gpu_memory_limit"),
    ),
    ("0 or more, and less than 1", lambda value: 0 <= value < 1, ("lora_config.lora_dropout",)),
    (
        "2 or more",
        lambda value: value >= 2,
        (*_train("context_length"), "synthetic_dataset.length"),
    ),
    (
        "1 or more",
        lambda value: value >= 1,
        (
            *_train("batch_size_training", "val_batch_size", "gradient_accumulation_steps", "num_epochs"),
            *_train("num_freeze_layers", "rollback_steps", "verify_steps"),
            "lora_config.r",
            "lora_config.lora_alpha",
            "llama_adapter_config.adapter_len",
            "llama_adapter_config.adapter_layers",
            "prefix_config.num_virtual_tokens",
            "synthetic_dataset.rows",
        ),
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        (
            *_train(
                "max_train_step", "max_eval_step", "warmup_steps", "eval_steps", "save_steps", "flop_counter_start"
            ),
            *_train("keep_checkpoints", "num_workers_dataloader", "nproc_per_node", "max_restarts", "seed"),
            *_train("max_skipped_steps"),
            "fsdp_config.sharding_group_size",
            "fsdp_config.replica_group_size",
            "synthetic_dataset.vocab_size",
            "synthetic_dataset.seed",
        ),
    ),
)
"""(what is expected, whether a value is that, of which fields)."""


def problems(cfg: RunConfig) -> list[str]:
    """Everything that is wrong with the settings, a sentence each."""
    return list(dict.fromkeys(problem.text for problem in found(cfg)))


def found(cfg: RunConfig) -> Iterator[Problem]:
    """The same, with the fields that each is about."""
    for rule in RULES:
        yield from rule(cfg)


def _wrong(cfg: RunConfig, dotted: str, text: str, *others: str) -> Problem:
    return Problem((dotted, *others), f"{cfg.place(dotted)}: {text}")


def _ranges(cfg: RunConfig) -> Iterator[Problem]:
    for expected, holds, names in RANGES:
        for dotted in names:
            if not holds(cfg.get(dotted)):
                yield _wrong(cfg, dotted, f"expected {expected}, found {cfg.get(dotted)}")


def _model(cfg: RunConfig) -> Iterator[Problem]:
    model, random = "train_config.model_name", "train_config.random_init"
    train = cfg.train_config
    if train.model_name is None and train.random_init is None:
        yield _wrong(
            cfg, model, "expected a model's folder or hub id, found none (--random_init CONFIG draws weights)", random
        )
    if train.model_name is not None and train.random_init is not None:
        yield _wrong(
            cfg, random, f"draws the weights that {cfg.place(model)} would read; expected one of the two", model
        )
    elif train.random_init is not None and train.tokenizer_name is None and train.dataset != "synthetic_dataset":
        yield _wrong(
            cfg,
            "train_config.tokenizer_name",
            f"expected a tokenizer's folder or hub id, found none: {cfg.place(random)} has none, and --dataset "
            f"{train.dataset} is text (--dataset synthetic_dataset needs no tokenizer)",
            random,
            "train_config.dataset",
        )


def _adapter(cfg: RunConfig) -> Iterator[Problem]:
    train = cfg.train_config
    use_peft = "train_config.use_peft"
    needs_peft = {
        "train_config.from_peft_checkpoint": bool(train.from_peft_checkpoint),
        "train_config.quantization": train.quantization is not None,
    }
    for dotted, asked in needs_peft.items():
        if asked and not train.use_peft:
            yield _wrong(cfg, dotted, f"trains an adapter (found {shown(cfg.get(dotted))}); add --use_peft", use_peft)
    if train.use_peft and train.peft_method is None:
        text = "expected lora, llama_adapter or prefix, found None: --use_peft needs something to train"
        yield _wrong(cfg, "train_config.peft_method", text, use_peft)
    if not cfg.lora_config.target_modules:
        yield _wrong(cfg, "lora_config.target_modules", "expected names of linear layers, found none")
    if cfg.lora_config.inference_mode:
        yield _wrong(cfg, "lora_config.inference_mode", "expected False, found True, which would train nothing")


def _target_pattern(cfg: RunConfig) -> Iterator[Problem]:
    pattern = cfg.lora_config.target_modules
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            text = f"expected names or a regular expression, found {shown(pattern)} ({error})"
            yield _wrong(cfg, "lora_config.target_modules", text)


def _precision(cfg: RunConfig) -> Iterator[Problem]:
    for name in ("mixed_precision", "use_fp16"):
        ours, theirs = f"train_config.{name}", f"fsdp_config.{name}"
        if cfg.get(ours) != cfg.get(theirs):
            text = f"is {cfg.get(theirs)}, while {cfg.place(ours)} is {cfg.get(ours)}; they are one setting: say one"
            yield _wrong(cfg, theirs, text, ours)
    if cfg.fsdp_config.pure_bf16 and cfg.train_config.use_fp16:
        fp16 = "train_config.use_fp16"
        text = f"asks for fp16 and {cfg.place('fsdp_config.pure_bf16')} for bf16; leave out one of the two"
        yield _wrong(cfg, fp16, text, "fsdp_config.pure_bf16")
    if cfg.train_config.use_fp16 and not cfg.train_config.mixed_precision:
        fp16, mixed = "train_config.use_fp16", "train_config.mixed_precision"
        text = f"asks for fp16 and {cfg.place(mixed)} False for fp32; leave out one of the two"
        yield _wrong(cfg, fp16, text, mixed)


def _sharding(cfg: RunConfig) -> Iterator[Problem]:
    fsdp, strategy = cfg.fsdp_config, "fsdp_config.sharding_strategy"
    if fsdp.sharding_strategy == "HYBRID_SHARD":
        return
    if fsdp.hsdp:
        text = f"means HYBRID_SHARD, while {cfg.place(strategy)} is {fsdp.sharding_strategy}; leave out one of the two"
        yield _wrong(cfg, "fsdp_config.hsdp", text, strategy)
        return
    for name in ("sharding_group_size", "replica_group_size"):
        dotted = f"fsdp_config.{name}"
        if cfg.get(dotted) > 0:
            text = (
                f"sizes the groups of HYBRID_SHARD, while {cfg.place(strategy)} is {fsdp.sharding_strategy}; add --hsdp"
            )
            yield _wrong(cfg, dotted, text, strategy, "fsdp_config.hsdp")


def _recompute(cfg: RunConfig) -> Iterator[Problem]:
    ours, theirs = "train_config.activation_checkpointing", "fsdp_config.fsdp_activation_checkpointing"
    if cfg.get(theirs) != (cfg.get(ours) != "none"):
        text = f"is {cfg.get(theirs)}, while {cfg.place(ours)} is {cfg.get(ours)}; leave out one of the two"
        yield _wrong(cfg, theirs, text, ours)


def _data(cfg: RunConfig) -> Iterator[Problem]:
    file = cfg.custom_dataset.file
    path, colon, function = file.rpartition(":")
    if not (file.endswith(".py") or (colon and path.endswith(".py") and function.isidentifier())):
        yield _wrong(cfg, "custom_dataset.file", f"expected FILE.py or FILE.py:FUNCTION, found {shown(file)}")
    if not cfg.train_config.dist_checkpoint_folder:
        yield _wrong(cfg, "train_config.dist_checkpoint_folder", "expected a folder's name, found none")
    for dotted, spec in FIELDS.items():
        if spec.name in {"train_split", "test_split"} and not cfg.get(dotted):
            yield _wrong(cfg, dotted, "expected a file or a split's name, found none")


def _measuring(cfg: RunConfig) -> Iterator[Problem]:
    counter, profiler = "train_config.flop_counter", "train_config.use_profiler"
    train, limit = cfg.train_config, "train_config.max_train_step"
    if train.flop_counter and train.use_profiler:
        yield _wrong(cfg, profiler, f"cannot go with {cfg.place(counter)}; leave out one of the two", counter)
    if train.flop_counter and 0 < train.max_train_step <= train.flop_counter_start:
        start = "train_config.flop_counter_start"
        text = f"counts the step after {train.flop_counter_start} others; expected more of {cfg.place(limit)}"
        yield _wrong(cfg, start, f"{text}, found {train.max_train_step}", counter, limit)
    if train.use_profiler and 0 < train.max_train_step < 7:
        text = f"waits 1 step, warms up for 2 and records 3; expected 7 or more of {cfg.place(limit)}"
        yield _wrong(cfg, profiler, f"{text}, found {train.max_train_step}", limit)


def _vision(cfg: RunConfig) -> Iterator[Problem]:
    for dotted in VISION:
        if cfg.get(dotted):
            yield _wrong(cfg, dotted, "is for vision models, and packtrain trains text models only; leave it out")


def _later(cfg: RunConfig) -> Iterator[Problem]:
    for about, text in not_yet(cfg):
        yield Problem(about, text)


RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _ranges,
    _model,
    _adapter,
    _target_pattern,
    _precision,
    _sharding,
    _recompute,
    _data,
    _measuring,
    _vision,
    _later,
)
