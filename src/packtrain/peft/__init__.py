"""Adapters in PEFT's file format, each method a module with the same functions.

METHODS           --peft_method -> module
method_of         settings -> the module that they are for; name_of, its --peft_method
settings_from     adapter_config.json -> settings, of whichever method it is
adapter_tensors   PEFT's tensor names -> rows of our parameters, whichever adapter the model has
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from packtrain.errors import UserError
from packtrain.model.config import LlamaConfig
from packtrain.peft import llama_adapter, lora, prefix
from packtrain.peft.llama_adapter import LlamaAdapterSettings
from packtrain.peft.prefix import PrefixSettings
from packtrain.peft.settings import LoraSettings
from packtrain.peft.tensors import LocalRows, Saved

__all__ = [
    "METHODS",
    "LlamaAdapterSettings",
    "LoraSettings",
    "Method",
    "PrefixSettings",
    "Settings",
    "adapter_tensors",
    "method_of",
    "name_of",
    "settings_from",
]

Settings = LoraSettings | LlamaAdapterSettings | PrefixSettings


class Method(Protocol):
    """What every method's module can do; `settings` are its own."""

    def fit(self, settings: Any, config: LlamaConfig) -> Any:
        """What the user said -> what it means on a model of this shape."""

    def problems(self, model: nn.Module, settings: Any) -> list[str]:
        """A sentence for everything that is wrong with settings on a model, before anything is built."""

    def install(self, model: nn.Module, settings: Any) -> None:
        """Freeze the model and fill its slots, before sharding, on meta too."""

    def initialise(self, model: nn.Module, seed: int, local_rows: LocalRows = ...) -> None:
        """PEFT's starting values on whatever rows this rank holds."""

    def adapter_tensors(self, model: nn.Module) -> dict[str, Saved]:
        """PEFT's tensor names -> rows of our parameters; none if the model has no such adapter."""

    def config_dict(self, settings: Any, base_model_name: str) -> dict[str, Any]:
        """Settings -> adapter_config.json."""

    def settings_from(self, config: Mapping[str, Any], where: str = ...) -> Any:
        """adapter_config.json -> settings."""


METHODS: dict[str, Method] = {"lora": lora, "llama_adapter": llama_adapter, "prefix": prefix}
"""--peft_method -> its module."""

_BY_SETTINGS: dict[type, str] = {
    LoraSettings: "lora",
    LlamaAdapterSettings: "llama_adapter",
    PrefixSettings: "prefix",
}
_BY_PEFT_TYPE = {"LORA": "lora", "ADAPTION_PROMPT": "llama_adapter", "PREFIX_TUNING": "prefix"}


def name_of(settings: Settings) -> str:
    """The --peft_method that settings are for."""
    return _BY_SETTINGS[type(settings)]


def method_of(settings: Settings) -> Method:
    """The module that settings are for."""
    return METHODS[name_of(settings)]


def settings_from(config: Mapping[str, Any], where: str = "adapter_config.json") -> Settings:
    """Settings of a saved adapter, by its peft_type. Raises UserError with everything that cannot be followed."""
    kind = config.get("peft_type")
    if kind not in _BY_PEFT_TYPE:
        known = ", ".join(_BY_PEFT_TYPE)
        raise UserError(f"{where}: peft_type is {kind!r}; only {known} are supported")
    settings: Settings = METHODS[_BY_PEFT_TYPE[kind]].settings_from(config, where)
    return settings


def adapter_tensors(model: nn.Module) -> dict[str, Saved]:
    """Every tensor of PEFT's adapter_model.safetensors -> the rows of our parameters that hold it."""
    return {name: saved for method in METHODS.values() for name, saved in method.adapter_tensors(model).items()}
