"""What a LoRA is: as a user says it, and as PEFT's adapter_config.json does.

LoraSettings    rank, scale, which layers, what else trains
config_dict     settings -> adapter_config.json
settings_from   adapter_config.json -> settings; refuses, each by name, what it asks and we do not do
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packtrain.peft.reader import Reader, whole

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """LoRA (arXiv:2106.09685) as in PEFT: the same names, the same meaning. Defaults are llama-recipes'."""

    r: int = 8
    lora_alpha: float = 32
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names (whole, or what follows a dot), or one string: "all-linear" or a regex of whole names."""
    lora_dropout: float = 0.05
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732) instead of alpha / r."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of module names to train whole and save with the adapter."""
    bias: str = "none"
    """Which biases train: none, all of the model's, or lora_only, those of adapted layers."""

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def range_problems(self) -> list[str]:
        """A sentence for each number that cannot be."""
        problems = []
        if self.r < 1:
            problems.append(f"r: {self.r}; expected a rank of at least 1")
        if not self.lora_alpha > 0 or math.isinf(self.lora_alpha):
            problems.append(f"lora_alpha: {self.lora_alpha}; expected a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout: {self.lora_dropout}; expected a probability in [0, 1)")
        if self.bias not in BIASES:
            problems.append(f"bias: {self.bias!r}; expected {', '.join(BIASES)}")
        if not self.target_modules:
            problems.append("target_modules: empty; expected layer names, 'all-linear' or a regex")
        return problems


def config_dict(settings: LoraSettings, base_model_name: str) -> dict[str, Any]:
    """What adapter_config.json says: PEFT's keys, `base_model_name` as the user typed it."""
    alpha, targets = settings.lora_alpha, settings.target_modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "r": settings.r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": settings.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }


def settings_from(config: Mapping[str, Any], where: str = "adapter_config.json") -> LoraSettings:
    """Settings of a saved adapter. Raises UserError with everything in it that cannot be followed."""
    # what the file leaves out has PEFT's defaults, which are not llama-recipes'
    return LoraSettings(**{"lora_dropout": 0.0, **_READER.read(config, where)})


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("a list of names")
    return tuple(value)


def _names_or_pattern(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    return _names(value)


def _names_or_none(value: Any) -> tuple[str, ...]:
    return () if value is None else _names(value)


def _bias(value: Any) -> str:
    if value not in BIASES:
        raise TypeError(" or ".join(repr(choice) for choice in BIASES))
    return str(value)


_READER = Reader(
    method="LoRA",
    read_by={
        "r": whole,
        "lora_alpha": _number,
        "target_modules": _names_or_pattern,
        "lora_dropout": _number,
        "use_rslora": _flag,
        "modules_to_save": _names_or_none,
        "bias": _bias,
    },
    needs=("r", "lora_alpha", "target_modules"),
    accepts={
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
        # the other ways to begin also rewrite the base weights, or train differently
        "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    },
    silent=frozenset({"megatron_core", "qalora_group_size"}),
)
