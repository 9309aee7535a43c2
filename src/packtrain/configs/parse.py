"""argv, CONFIG.yaml or Python's arguments -> RunConfig, or one UserError with all that is wrong.

    parse(argv)       a command's words: an optional CONFIG.yaml and flags; flags win
    build(**names)    the same from Python
    parse_output_dir(argv)   where results go, of words that may otherwise be wrong

Each source becomes a list of `Said`; one `_Draft` gives every name to the fields that it means, reads the values,
fills in what follows from them, and asks `check.py` about the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any

from packtrain.configs import yaml_file
from packtrain.configs.check import Problem, found
from packtrain.configs.run import FIELDS, SECTIONS, SWITCHES, RunConfig, Spec, activation, is_active, named
from packtrain.configs.training import TrainConfig
from packtrain.configs.values import Quoted, Said, brief, choices, convert, expected, shown
from packtrain.errors import raise_if

CONFIG_SUFFIXES = (".yaml", ".yml")

_DTYPES = {
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}
SPELLINGS: dict[str, dict[Any, Any]] = {
    "train_config.quantization": {
        **dict.fromkeys((True, "True", "true"), "8bit"),
        **dict.fromkeys((False, "False", "false")),
        "int4": "4bit",
        "int8": "8bit",
    },
    "train_config.from_peft_checkpoint": {None: ""},
    "custom_dataset.data_path": {None: ""},
    "lora_config.bias": {None: "none"},
    "lora_config.modules_to_save": {None: ()},
    "fsdp_config.sharding_strategy": {
        f"ShardingStrategy.{name}": name for name in choices(FIELDS["fsdp_config.sharding_strategy"].kind)
    },
    "fsdp_config.checkpoint_type": {
        f"StateDictType.{name}": name for name in choices(FIELDS["fsdp_config.checkpoint_type"].kind)
    },
    "quantization_config.compute_dtype": _DTYPES,
    "quantization_config.quant_storage": _DTYPES,
}
"""Other ways to say a value: field -> {as it is said: as it is meant}."""

HABITS = {
    "learning_rate": "lr",
    "batch_size": "batch_size_training",
    "per_device_train_batch_size": "batch_size_training",
    "per_device_eval_batch_size": "val_batch_size",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "max_steps": "max_train_step",
    "max_seq_length": "context_length",
    "max_grad_norm": "gradient_clipping_threshold",
    "gradient_checkpointing": "activation_checkpointing",
    "lr_scheduler_type": "lr_scheduler",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "model": "model_name",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
}
"""Other tools' names, which no likeness of letters would find."""

TWINS = ("mixed_precision", "use_fp16")
"""One setting each, that llama-recipes keeps in train_config and fsdp_config."""


def parse(argv: Sequence[str]) -> RunConfig:
    """A run's settings from a command's words, program and command left out. Raises UserError with every problem."""
    said, configs, problems = read_argv(argv)
    problems += [
        f"{brief(extra)}: expected one CONFIG.yaml, found {brief(configs[0])} before it" for extra in configs[1:]
    ]
    in_file, wrong = yaml_file.read(configs[0]) if configs else ([], [])
    return _Draft([*problems, *wrong], blind=bool(wrong) and not in_file).resolve(in_file, said)


def build(**settings: Any) -> RunConfig:
    """A run's settings from Python: names bare, dotted, or nested by section. Raises UserError with every problem."""
    said = []
    for key, value in settings.items():
        if key in SECTIONS and isinstance(value, Mapping):
            said += [Said(f"{key}.{name}", inner, f"{key}.{name}", "flag") for name, inner in value.items()]
        else:
            said.append(Said(key, value, key, "flag"))
    return _Draft([], blind=False).resolve([], said)


def parse_output_dir(argv: Sequence[str]) -> str | None:
    """The last --output_dir that can be read, whatever else is wrong; None if there is none."""
    flags, configs, _ = read_argv(argv)
    in_file = yaml_file.read(configs[0])[0] if configs else []
    named = [said.value for said in [*in_file, *flags] if said.key in {"output_dir", "train_config.output_dir"}]
    return next((str(value) for value in reversed(named) if isinstance(value, str) and value), None)


def read_argv(argv: Sequence[str]) -> tuple[list[Said], list[str], list[str]]:
    """(flags, CONFIG.yaml's, problems) in a command's words."""
    said: list[Said] = []
    configs: list[str] = []
    problems: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if not _is_flag(word):
            if word.endswith(CONFIG_SUFFIXES):
                configs.append(word)
            else:
                problems.append(f"{_before_equals(word)}: expected a flag (--name) or one CONFIG.yaml")
            continue
        name, equals, text = word.lstrip("-").partition("=")
        key, where = name.replace("-", "_"), f"--{brief(name)}"
        if positive := _negated(key):
            said.append(Said(positive, False, where, "flag"))
            if equals:
                problems.append(f"{where}: expected no value, found {shown(text)}")
        elif equals:
            said.append(Said(key, _unquoted(text), where, "flag"))
        elif words and not _is_flag(words[0]) and not (_stands_alone(key) and words[0].endswith(CONFIG_SUFFIXES)):
            said.append(Said(key, _unquoted(words.popleft()), where, "flag"))
        else:
            said.append(Said(key, True, where, "flag", alone=True))
    return said, configs, problems


def _is_flag(word: str) -> bool:
    """`--name`, or with one dash as Fire reads it too; `-1` and `-` are values."""
    return word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha())


def _before_equals(word: str) -> str:
    """A stray word as a message may quote it: NAME=VALUE without the value, which may be a secret."""
    name, equals, _ = word.partition("=")
    return shown(f"{name}=...") if equals else shown(word)


def _unquoted(text: str) -> str:
    """Fire takes a quoted word without its quotes."""
    inner = text[1:-1]
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in inner:
        return Quoted(inner)
    return text


def _meant(key: str) -> list[Spec]:
    """The fields that a name may mean: one if it is dotted, one a section if it is bare."""
    if "." in key:
        return [FIELDS[key]] if key in FIELDS else []
    return named(key)


def _negated(key: str) -> str | None:
    """The name without its `no` (or `no_`), if that makes it one: use_peft of nouse_peft."""
    section, dot, name = key.rpartition(".")
    if _meant(key):
        return None
    for before, after in ((key, ""), (name, f"{section}{dot}")):
        if before.startswith("no"):
            positive = after + before[2:].removeprefix("_")
            if _meant(positive):
                return positive
    return None


def _stands_alone(key: str) -> bool:
    """Whether a flag says something without a value."""
    return any(spec.kind is bool or True in SPELLINGS.get(spec.dotted, {}) for spec in _meant(key))


def nearest(key: str) -> str | None:
    """The known name that `key` was probably meant to be; None if nothing is like it."""
    section, _, name = key.rpartition(".")
    if specs := named(HABITS.get(name, name)):
        same = [spec for spec in specs if spec.section == section]
        spec = (same or specs)[0]
        return spec.dotted if section else spec.name
    known = list(FIELDS) if section else [*(spec.name for spec in FIELDS.values()), *SECTIONS, *HABITS]
    like = get_close_matches(key, known, n=1, cutoff=0.6)
    return HABITS.get(like[0], like[0]) if like else None


def _read(spec: Spec, raw: object) -> Any:
    """`raw` as the field's value, by any of its spellings; ValueError if it is none."""
    if isinstance(raw, Enum) or type(raw).__module__ == "torch":
        raw = str(raw)  # an enumeration or a torch.dtype, from Python, is known by its name
    raw = None if isinstance(raw, str) and raw == "None" else raw
    spellings = SPELLINGS.get(spec.dotted, {})
    if isinstance(raw, str | bool | None) and raw in spellings:
        return spellings[raw]
    return convert(spec.kind, raw)


def _mistyped(spec: Spec, said: Said) -> str:
    like = get_close_matches(str(said.value), choices(spec.kind), n=1) if isinstance(said.value, str) else []
    hint = f"; did you mean {like[0]}?" if like else ""
    return (
        f"{said.where}: expected {expected(spec.kind).removesuffix(' or None')}, found no value"
        if said.alone
        else f"{said.where}: expected {expected(spec.kind)}, found {shown(said.value)}{hint}"
    )


class _Draft:
    """Settings in the making."""

    def __init__(self, problems: list[str], blind: bool) -> None:
        """`blind`: a file could not be read, so nothing can be called missing."""
        self._problems = problems
        self._blind = blind
        self._values: dict[str, Any] = {}
        self._origin: dict[str, str] = {}
        self._where: dict[str, str] = {}
        self._doubt: set[str] = set()
        self._train = TrainConfig()

    def resolve(self, in_file: list[Said], flags: list[Said]) -> RunConfig:
        """The finished settings; UserError with every problem of theirs and of how they fit."""
        self._train = self._switches([*in_file, *flags])
        # A name that means several fields gives way to one that means a single field, wherever in the file they stand.
        in_file = sorted(in_file, key=lambda said: len(self._reached(said.key)) < 2)
        self._repeated(in_file)
        # Unknown names first: what they were meant to be is in doubt, and shall not be called missing as well.
        for said in sorted([*in_file, *flags], key=lambda said: bool(_meant(said.key))):
            self._take(said)
        self._imply()
        cfg = self._finished()
        rest = [problem.text for problem in found(cfg) if self._is_sure(problem)]
        raise_if(dict.fromkeys([*self._problems, *rest]))
        return cfg

    def _is_sure(self, problem: Problem) -> bool:
        """Whether a problem stands, whatever the settings that could not be read were meant to be."""
        if self._blind and not self._values.keys() >= set(problem.about):
            return False
        return self._doubt.isdisjoint(problem.about)

    def _switches(self, all_said: Iterable[Said]) -> TrainConfig:
        """The settings that say which sections count; what is wrong with them comes up again, in `_take`."""
        names = {name for switches in SWITCHES.values() for name in switches}
        chosen: dict[str, Any] = {}
        for said in all_said:
            name = said.key.removeprefix("train_config.")
            if name in names:
                try:
                    chosen[name] = _read(FIELDS[f"train_config.{name}"], said.value)
                except ValueError:
                    self._doubt.add(f"train_config.{name}")
        return TrainConfig(**chosen)

    def _reached(self, key: str) -> list[Spec]:
        """The fields that a name sets in this run: a bare one those of the sections that count."""
        specs = _meant(key)
        return specs if "." in key else [spec for spec in specs if is_active(self._train, spec.section)]

    def _repeated(self, in_file: list[Said]) -> None:
        """Of two flags the last wins; of two lines, at different places in a file, none is the last."""
        first: dict[str, str] = {}
        for said in in_file:
            specs = self._reached(said.key)
            if len(specs) != 1:
                continue
            before = first.setdefault(specs[0].dotted, said.where)
            if before != said.where:
                self._problems.append(f"{said.where}: says again what {before} says; expected one of the two")

    def _take(self, said: Said) -> None:
        specs = self._reached(said.key)
        if not specs:
            self._unreached(said)
        for spec in specs:
            try:
                self._set(spec.dotted, _read(spec, said.value), said.origin, said.where)
            except ValueError:
                self._problems.append(_mistyped(spec, said))
                self._doubt.add(spec.dotted)

    def _unreached(self, said: Said) -> None:
        specs = _meant(said.key)
        if not specs:
            self._problems.append(self._unknown(said))
            return
        sections = [spec.section for spec in specs]
        switches = [f"train_config.{name}" for section in sections for name in SWITCHES[section]]
        if not self._blind and self._doubt.isdisjoint(switches):
            homes = ", ".join(f"{section} ({activation(section)})" for section in sections)
            self._problems.append(
                f"{said.where}: belongs to {homes}, which this run does not use; add that or leave it out"
            )

    def _unknown(self, said: Said) -> str:
        what = "flag" if said.where.startswith("--") else "setting"
        if said.key in SECTIONS:
            return f"{said.where}: is a section; its settings are written {said.where}.NAME"
        like = nearest(said.key)
        if like is None:
            return f"{said.where}: no such {what}; packtrain train --help lists them all"
        self._doubt.update(dotted for dotted, spec in FIELDS.items() if like in (dotted, spec.name, spec.section))
        return f"{said.where}: no such {what}; did you mean {'--' if what == 'flag' else ''}{like}?"

    def _set(self, dotted: str, value: Any, origin: str, where: str) -> None:
        self._values[dotted], self._origin[dotted], self._where[dotted] = value, origin, where

    def _follow(self, dotted: str, value: Any, of: str) -> None:
        """Set a field that nobody set, in the name of the one that it follows from."""
        if dotted not in self._values:
            self._set(dotted, value, self._origin[of], self._where[of])

    def _imply(self) -> None:
        """What follows from what was said."""
        for name in TWINS:
            pair = (f"train_config.{name}", f"fsdp_config.{name}")
            for said, other in (pair, pair[::-1]):
                if said in self._values:
                    self._follow(other, self._values[said], said)
        if self._values.get("fsdp_config.hsdp"):
            self._follow("fsdp_config.sharding_strategy", "HYBRID_SHARD", "fsdp_config.hsdp")
        ours, theirs = "train_config.activation_checkpointing", "fsdp_config.fsdp_activation_checkpointing"
        if theirs in self._values:
            self._follow(ours, "full" if self._values[theirs] else "none", theirs)
        if ours in self._values:
            self._follow(theirs, self._values[ours] != "none", ours)

    def _finished(self) -> RunConfig:
        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for dotted, value in self._values.items():
            section, name = dotted.split(".")
            sections[section][name] = value
        origin = {dotted: self._origin.get(dotted, "default") for dotted in FIELDS}
        built = {section: SECTIONS[section](**values) for section, values in sections.items()}
        return RunConfig(**built, origin=origin, where=self._where)
