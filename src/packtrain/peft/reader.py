"""adapter_config.json, key by key: what is read, what is accepted, what is refused by name.

Reader     one method's keys; `read` gives its settings
whole      a reader of whole numbers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packtrain.errors import UserError

_SILENT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
"""Keys of every method that change nothing in what an adapter computes here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """How adapter_config.json is read, key by key.

    A key that is not known is passed over while its value is empty, zero, false or null, and refused else.
    """

    method: str
    """For messages."""
    read_by: Mapping[str, Callable[[Any], Any]]
    """Settings: key -> value as JSON has it to ours; raises TypeError that says what was expected."""
    needs: tuple[str, ...]
    """Keys that must be there."""
    accepts: Mapping[str, tuple[Any, ...]]
    """Keys of which only these values are followed."""
    silent: frozenset[str] = frozenset()
    """Keys of this method that change nothing in what an adapter computes here."""

    def read(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The settings that are there. Raises UserError with everything that is wrong or cannot be followed."""
        problems = self._unsupported(config, where)
        values = {key: self._value(key, config[key], where, problems) for key in self.read_by if key in config}
        for key in ("peft_type", *self.needs):
            if key not in config:
                problems.append(f"{where}: no {key}; expected one in the file that peft or packtrain wrote")
        if problems:
            raise UserError(problems)
        return values

    def _unsupported(self, config: Mapping[str, Any], where: str) -> list[str]:
        problems = []
        for key, value in config.items():
            if key in _SILENT or key in self.silent or key in self.read_by:
                continue
            accepted = self.accepts.get(key)
            if accepted is None:
                if value:
                    problems.append(
                        f"{where}: {key} is {value!r}, which is not supported; only plain {self.method} without it is"
                    )
            elif value not in accepted:
                choices = " or ".join(repr(choice) for choice in accepted)
                problems.append(f"{where}: {key} is {value!r}; only {choices} is supported")
        return problems

    def _value(self, key: str, value: Any, where: str, problems: list[str]) -> Any:
        try:
            return self.read_by[key](value)
        except TypeError as expected:
            problems.append(f"{where}: {key} is {value!r}; expected {expected}")
            return None


def whole(value: Any) -> int:
    """For `read_by`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value
