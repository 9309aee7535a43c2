"""Which adapter a run trains: what the flags say, or a saved one to go on with, which wins.

chosen      flags and --from_peft_checkpoint -> (settings, the saved adapter's folder)
problems    everything wrong with them on a model, by flag or file
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from packtrain import log, peft
from packtrain.checkpoint.adapter import adapter_problems, read_adapter_config
from packtrain.checkpoint.hf import ADAPTER_CONFIG
from packtrain.checkpoint.hub import resolve
from packtrain.configs.run import FIELDS, RunConfig
from packtrain.errors import raise_if
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM


def chosen(cfg: RunConfig, config: LlamaConfig | None) -> tuple[peft.Settings | None, Path | None]:
    """(settings, folder to go on from), None without one; `config` is the model's, None if it cannot be read.

    Raises UserError if the saved adapter cannot be read or followed, or if a setting is at odds with it.
    """
    train = cfg.train_config
    if not train.use_peft:
        return None, None
    if not train.from_peft_checkpoint:
        settings = _asked(cfg, str(train.peft_method), config)
        _remark(cfg, settings)
        return settings, None
    folder = resolve(train.from_peft_checkpoint, "--from_peft_checkpoint")
    saved = peft.settings_from(read_adapter_config(folder), str(folder / ADAPTER_CONFIG))
    raise_if(_at_odds(cfg, saved, config, folder))
    return saved, folder


def problems(cfg: RunConfig, skeleton: LlamaForCausalLM, settings: peft.Settings, folder: Path | None) -> list[str]:
    """A sentence for everything that is wrong with an adapter on `skeleton`, a meta model, which then has it."""
    method = peft.method_of(settings)
    wrong = method.problems(skeleton, settings)
    if folder is None:
        return [_by_flag(cfg, f"{peft.name_of(settings)}_config", problem) for problem in wrong]
    if wrong:
        return [f"{folder / ADAPTER_CONFIG}: {problem}" for problem in wrong]
    method.install(skeleton, settings)
    return adapter_problems(skeleton, folder)


def _asked(cfg: RunConfig, method: str, config: LlamaConfig | None) -> peft.Settings:
    """What the method's section says, fitted to the model."""
    settings = _section(cfg, method)
    fitted: peft.Settings = settings if config is None else peft.METHODS[method].fit(settings, config)
    return fitted


def _remark(cfg: RunConfig, settings: peft.Settings) -> None:
    """llama-recipes' default is for 32 layers, and ends with an error on a model of fewer."""
    dotted = "llama_adapter_config.adapter_layers"
    if isinstance(settings, peft.LlamaAdapterSettings) and settings.adapter_layers < cfg.get(dotted):
        log.once(
            f"{cfg.place(dotted)}: {cfg.get(dotted)} layers are more than the model has; "
            f"all its {settings.adapter_layers} get a prompt"
        )


def _section(cfg: RunConfig, method: str) -> peft.Settings:
    if method == "llama_adapter":
        adapter = cfg.llama_adapter_config
        return peft.LlamaAdapterSettings(adapter_len=adapter.adapter_len, adapter_layers=adapter.adapter_layers)
    if method == "prefix":
        return peft.PrefixSettings(num_virtual_tokens=cfg.prefix_config.num_virtual_tokens)
    lora = cfg.lora_config
    return peft.LoraSettings(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        modules_to_save=lora.modules_to_save,
        bias=lora.bias,
    )


def _at_odds(cfg: RunConfig, saved: peft.Settings, config: LlamaConfig | None, folder: Path) -> Iterator[str]:
    """A sentence for each setting that somebody made and the saved adapter does not have."""
    method = peft.name_of(saved)
    asked = cfg.train_config.peft_method
    if asked != method and _meant(cfg, "train_config.peft_method"):
        yield _odds(cfg, "train_config.peft_method", asked, method, folder)
        return
    typed = _asked(cfg, method, config)
    for name in (f.name for f in fields(saved)):
        dotted = f"{method}_config.{name}"
        pair = getattr(typed, name), getattr(saved, name)
        if dotted in FIELDS and _meant(cfg, dotted) and _unordered(pair[0]) != _unordered(pair[1]):
            yield _odds(cfg, dotted, *pair, folder)


def _odds(cfg: RunConfig, dotted: str, typed: Any, saved: Any, folder: Path) -> str:
    return (
        f"{cfg.place(dotted)}: is {_said(typed)}, and the adapter in {folder} was trained with {_said(saved)}; "
        "leave it out to go on with that adapter"
    )


def _meant(cfg: RunConfig, dotted: str) -> bool:
    """Set, and in a file to something else than the default: a run's config.yaml lists everything."""
    return cfg.typed(dotted) and (cfg.origin[dotted] != "file" or cfg.get(dotted) != FIELDS[dotted].default)


def _said(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def _unordered(value: Any) -> Any:
    return frozenset(value) if isinstance(value, tuple) else value


def _by_flag(cfg: RunConfig, section: str, problem: str) -> str:
    """`problem`, which begins with a setting's name, with what said it instead."""
    name, colon, rest = problem.partition(":")
    known = [dotted for dotted in (f"{section}.{name}", f"train_config.{name}") if dotted in FIELDS]
    return f"{cfg.place(known[0])}{colon}{rest}" if known else f"--{section}.{problem}"
