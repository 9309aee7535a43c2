"""RunConfig: every setting of a run, and who set it.

SECTIONS           section -> its dataclass, in the order of --help
FIELDS             "section.name" -> Spec: the one vocabulary of flags, YAML and Python
SWITCHES           section -> the train_config settings that make it count
RunConfig          the sections as attributes; `active`, `typed`, `place`, `dataset_config`, `write`
fields_of(cfg)     all of it as rows: for run/config.yaml, --help and tests/golden/flags.txt
to_yaml_dict(cfg)  all of it as plain values, nested by section; reading it back gives the same RunConfig
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml

from packtrain.configs.datasets import (
    AlpacaDataset,
    CustomDataset,
    GrammarDataset,
    LlamaguardToxicchatDataset,
    SamsumDataset,
    SyntheticDataset,
)
from packtrain.configs.fsdp import FsdpConfig
from packtrain.configs.logging import WandbConfig
from packtrain.configs.peft import LlamaAdapterConfig, LoraConfig, PrefixConfig
from packtrain.configs.quantization import QuantizationConfig
from packtrain.configs.training import DatasetName, TrainConfig
from packtrain.configs.values import kind_name

DatasetConfig = (
    SamsumDataset | GrammarDataset | AlpacaDataset | CustomDataset | LlamaguardToxicchatDataset | SyntheticDataset
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Every setting of a run, resolved. Two are equal if their settings are, whoever set them."""

    train_config: TrainConfig = field(default_factory=TrainConfig)
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    lora_config: LoraConfig = field(default_factory=LoraConfig)
    llama_adapter_config: LlamaAdapterConfig = field(default_factory=LlamaAdapterConfig)
    prefix_config: PrefixConfig = field(default_factory=PrefixConfig)
    quantization_config: QuantizationConfig = field(default_factory=QuantizationConfig)
    samsum_dataset: SamsumDataset = field(default_factory=SamsumDataset)
    grammar_dataset: GrammarDataset = field(default_factory=GrammarDataset)
    alpaca_dataset: AlpacaDataset = field(default_factory=AlpacaDataset)
    custom_dataset: CustomDataset = field(default_factory=CustomDataset)
    llamaguard_toxicchat_dataset: LlamaguardToxicchatDataset = field(default_factory=LlamaguardToxicchatDataset)
    synthetic_dataset: SyntheticDataset = field(default_factory=SyntheticDataset)
    wandb_config: WandbConfig = field(default_factory=WandbConfig)

    origin: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Who set "section.name": default, file or flag (Python's arguments too)."""

    where: Mapping[str, str] = field(default_factory=dict, compare=False)
    """How a message points at "section.name", if somebody set it: `--lr`, `run.yaml:3: lr`."""

    @property
    def dataset_config(self) -> DatasetConfig:
        """The chosen data set's section."""
        found: DatasetConfig = getattr(self, self.train_config.dataset)
        return found

    def active(self, section: str) -> bool:
        """Whether the section counts in this run."""
        return is_active(self.train_config, section)

    def get(self, dotted: str) -> Any:
        """The value of "section.name"."""
        section, name = dotted.split(".")
        return getattr(getattr(self, section), name)

    def typed(self, dotted: str) -> bool:
        """Whether somebody set "section.name", in a file, by a flag or from Python."""
        return self.origin.get(dotted, "default") != "default"

    def place(self, dotted: str) -> str:
        """How a message points at "section.name"."""
        return self.where.get(dotted) or flag(dotted)

    def write(self, path: Path) -> None:
        """Every setting as YAML, with who set it as a comment. `packtrain train PATH` reads it back."""
        lines: list[str] = []
        for section, rows in groupby(fields_of(self), key=lambda row: row.section):
            lines.append(f"{section}:")
            lines.extend(f"  {row.name}: {_yaml(row.value)}  # {row.origin}" for row in rows)
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")


class Spec(NamedTuple):
    """One setting as it is declared."""

    section: str
    name: str
    kind: Any
    default: Any

    @property
    def dotted(self) -> str:
        """The name that means this field and no other."""
        return f"{self.section}.{self.name}"


class Field(NamedTuple):
    """One setting of a run."""

    section: str
    name: str
    type: str
    default: Any
    value: Any
    origin: str
    doc: str


SECTIONS: dict[str, Any] = {
    name: kind for name, kind in get_type_hints(RunConfig).items() if name not in {"origin", "where"}
}

FIELDS: dict[str, Spec] = {
    f"{section}.{name}": Spec(section, name, kind, getattr(cls(), name))
    for section, cls in SECTIONS.items()
    for name, kind in get_type_hints(cls).items()
}

_BY_NAME: dict[str, list[Spec]] = {}
for _spec in FIELDS.values():
    _BY_NAME.setdefault(_spec.name, []).append(_spec)

SWITCHES: dict[str, dict[str, tuple[Any, ...]]] = {
    "lora_config": {"use_peft": (True,), "peft_method": ("lora",)},
    "llama_adapter_config": {"use_peft": (True,), "peft_method": ("llama_adapter",)},
    "prefix_config": {"use_peft": (True,), "peft_method": ("prefix",)},
    "quantization_config": {"quantization": ("4bit", "8bit")},
    "wandb_config": {"use_wandb": (True,)},
    **{name: {"dataset": (name,)} for name in get_args(DatasetName)},
}
"""Section -> {train_config field: the values under which the section counts}. The others always do."""


def is_active(train: TrainConfig, section: str) -> bool:
    """Whether a section counts under these settings."""
    return all(getattr(train, name) in values for name, values in SWITCHES.get(section, {}).items())


def activation(section: str) -> str:
    """The flags that make a section count, e.g. `--use_peft --peft_method lora`."""
    switches = SWITCHES.get(section, {}).items()
    return " ".join(f"--{name}" if values[0] is True else f"--{name} {values[0]}" for name, values in switches)


def named(name: str) -> list[Spec]:
    """The fields that a bare name may mean, one a section."""
    return _BY_NAME.get(name, [])


def flag(dotted: str) -> str:
    """The shortest flag that means this field and no other, but for train_config's, which come first."""
    section, name = dotted.split(".")
    return f"--{name}" if section == "train_config" or len(named(name)) == 1 else f"--{dotted}"


def fields_of(cfg: RunConfig) -> Iterator[Field]:
    """Every setting of a run, section by section."""
    for dotted, spec in FIELDS.items():
        yield Field(
            section=spec.section,
            name=spec.name,
            type=kind_name(spec.kind),
            default=spec.default,
            value=cfg.get(dotted),
            origin=cfg.origin.get(dotted, "default"),
            doc=sentences(SECTIONS[spec.section])[spec.name],
        )


def to_yaml_dict(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """Every setting as plain values, nested by section."""
    nested: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for dotted, spec in FIELDS.items():
        value = cfg.get(dotted)
        nested[spec.section][spec.name] = list(value) if isinstance(value, tuple) else value
    return nested


@cache
def sentences(cls: type) -> dict[str, str]:
    """Field -> the sentence under it in the source, for one dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        above.target.id: " ".join(below.value.value.split())
        for above, below in pairwise(body.body)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _yaml(value: Any) -> str:
    """One value in one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    options: dict[str, Any] = {"default_flow_style": True, "width": 2**31, "allow_unicode": True}
    text: str = yaml.safe_dump(plain, **options).removesuffix("\n").removesuffix("\n...")
    if len(text.splitlines()) > 1:  # a line's end of any kind within the text: double quotes write it as an escape
        text = yaml.safe_dump(plain, default_style='"', **options | {"allow_unicode": False}).removesuffix("\n")
    return text
