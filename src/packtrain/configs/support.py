"""What this version does with each setting: obeys it, needs it no more, or does not know it yet.

LATER          what is not built yet; a row goes when its work lands
RESTATES       what always happens: accepted, does nothing, and why
not_yet(cfg)   sentences that refuse what is in LATER
remarks(cfg)   sentences on what somebody set and what has no effect
status(dotted) obeyed, restates or later, for tests/golden/flags.txt and --help
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from packtrain.configs.run import FIELDS, SWITCHES, RunConfig, activation
from packtrain.configs.values import shown


class Later(NamedTuple):
    """Something that is not built yet, and the settings that ask for it."""

    what: str

    fields: tuple[str, ...]
    """The first is the one that turns it on; any value but the default asks for it."""


LATER = (Later("forcing bit-exact kernels", ("train_config.deterministic",)),)

_ONE_TASK = "packtrain trains text generation, and says so in what it saves"
RESTATES = {
    "train_config.low_cpu_fsdp": "weights are always streamed into each worker's shard; no worker holds a whole model",
    "train_config.one_gpu": "the number of workers decides how many GPUs are used",
    "train_config.use_fast_kernels": "the fastest attention for the hardware is chosen anyway (--attention forces one)",
    "lora_config.inference_mode": "a run trains",
    "lora_config.task_type": _ONE_TASK,
    "llama_adapter_config.task_type": _ONE_TASK,
    "prefix_config.task_type": _ONE_TASK,
}

VISION = ("train_config.freeze_LLM_only",)
"""Of llama-recipes' vision models: refused, since there are none here."""

NEEDS: tuple[tuple[tuple[str, ...], Callable[[RunConfig], bool], str], ...] = (
    (
        ("train_config.gradient_clipping_threshold",),
        lambda cfg: cfg.train_config.gradient_clipping,
        "without --gradient_clipping",
    ),
    (("train_config.gamma",), lambda cfg: cfg.train_config.lr_scheduler == "gamma", "without --lr_scheduler gamma"),
    (
        tuple(f"train_config.{name}" for name in ("eval_steps", "eval_first", "max_eval_step", "val_batch_size")),
        lambda cfg: cfg.train_config.run_validation,
        "without --run_validation",
    ),
    (
        ("train_config.dist_checkpoint_folder",),
        lambda cfg: cfg.train_config.dist_checkpoint_root_folder is not None,
        "without --dist_checkpoint_root_folder",
    ),
    (("train_config.flop_counter_start",), lambda cfg: cfg.train_config.flop_counter, "without --flop_counter"),
    (("train_config.profiler_dir",), lambda cfg: cfg.train_config.use_profiler, "without --use_profiler"),
    (
        ("fsdp_config.optimizer",),
        lambda cfg: cfg.fsdp_config.optimizer != "anyprecision" or cfg.fsdp_config.pure_bf16,
        "without --pure_bf16",
    ),
    (
        ("fsdp_config.use_kahan", "fsdp_config.moments"),
        lambda cfg: cfg.fsdp_config.optimizer == "anyprecision" and cfg.fsdp_config.pure_bf16,
        "without --pure_bf16 --optimizer anyprecision",
    ),
    (
        ("train_config.freeze_layers",),
        lambda cfg: not cfg.train_config.use_peft,
        "with --use_peft: under an adapter every layer stays as it is",
    ),
    (
        ("train_config.rollback_steps",),
        lambda cfg: "rollback" in (cfg.train_config.on_nonfinite, cfg.train_config.on_spike),
        "without --on_nonfinite rollback or --on_spike rollback",
    ),
    (("train_config.num_freeze_layers",), lambda cfg: cfg.train_config.freeze_layers, "without --freeze_layers"),
    (
        ("quantization_config.quant_type", "quantization_config.use_double_quant"),
        lambda cfg: cfg.train_config.quantization != "8bit",
        "with --quantization 8bit: its numbers are int8, with a scale for each row",
    ),
)
"""Settings that count under a condition only: (fields, the condition, what to say where it does not hold)."""


def not_yet(cfg: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """(fields, sentence) of everything that is asked for and not built yet."""
    for row in LATER:
        asked = [name for name in row.fields if cfg.get(name) != FIELDS[name].default]
        if asked:
            places = ", ".join(dict.fromkeys(cfg.place(name) for name in asked))
            value = shown(cfg.get(asked[0]))
            yield (
                tuple(asked),
                f"{places}: {row.what} comes with a later version (found {value}); leave it out until then",
            )


def remarks(cfg: RunConfig) -> list[str]:
    """What somebody set and what changes nothing, with the reason, a sentence each."""
    said = []
    for dotted in filter(lambda name: _on_purpose(cfg, name), FIELDS):
        section = FIELDS[dotted].section
        if not cfg.active(section):
            said.append(f"{cfg.place(dotted)}: has no effect without {activation(section)}")
        elif dotted in RESTATES:
            said.append(f"{cfg.place(dotted)}: accepted, does nothing: {RESTATES[dotted]}")
        said += [
            f"{cfg.place(dotted)}: has no effect {condition}"
            for names, holds, condition in NEEDS
            if dotted in names and not holds(cfg)
        ]
    train = cfg.train_config
    if 0 < train.max_train_step <= train.warmup_steps:
        warmup, limit = cfg.place("train_config.warmup_steps"), cfg.place("train_config.max_train_step")
        said.append(f"{warmup}: {train.warmup_steps} steps, so lr is still rising when {limit} ends the run")
    return said


def status(dotted: str) -> str:
    """What this version does with a setting, in a word."""
    if dotted in RESTATES or dotted in VISION:
        return "restates" if dotted in RESTATES else "refused"
    switches = [f"train_config.{name}" for name in SWITCHES.get(FIELDS[dotted].section, {})]
    waits = {name for row in LATER for name in row.fields}
    return "later" if waits & {dotted, *switches} else "obeyed"


def _on_purpose(cfg: RunConfig, dotted: str) -> bool:
    """Set by a flag, or in a file to something else than the default: a file may just list everything."""
    origin = cfg.origin.get(dotted, "default")
    return origin == "flag" or (origin == "file" and cfg.get(dotted) != FIELDS[dotted].default)
