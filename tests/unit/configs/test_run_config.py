"""RunConfig itself: sections, defaults, and that what is written is read back the same."""

from __future__ import annotations

import tempfile
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.configs.parse import parse
from packtrain.configs.run import (
    FIELDS,
    SECTIONS,
    RunConfig,
    Spec,
    activation,
    fields_of,
    flag,
    sentences,
    to_yaml_dict,
)
from packtrain.configs.support import remarks
from packtrain.configs.values import alternatives, choices, takes_names

MODEL = ["--model_name", "M"]

REFERENCE: dict[str, dict[str, Any]] = {
    "train_config": {
        "tokenizer_name": None,
        "enable_fsdp": False,
        "low_cpu_fsdp": False,
        "run_validation": True,
        "batch_size_training": 4,
        "batching_strategy": "packing",
        "context_length": 4096,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": False,
        "gradient_clipping_threshold": 1.0,
        "num_epochs": 3,
        "max_train_step": 0,
        "max_eval_step": 0,
        "num_workers_dataloader": 1,
        "lr": 1e-4,
        "weight_decay": 0.0,
        "gamma": 0.85,
        "seed": 42,
        "use_fp16": False,
        "mixed_precision": True,
        "val_batch_size": 1,
        "dataset": "samsum_dataset",
        "peft_method": "lora",
        "use_peft": False,
        "from_peft_checkpoint": "",
        "freeze_layers": False,
        "num_freeze_layers": 1,
        "freeze_LLM_only": False,
        "quantization": None,
        "one_gpu": False,
        "save_model": True,
        "dist_checkpoint_folder": "fine-tuned",
        "save_optimizer": False,
        "use_fast_kernels": False,
        "use_wandb": False,
        "save_metrics": False,
        "flop_counter": False,
        "flop_counter_start": 3,
        "use_profiler": False,
        # "PATH/to/..." in llama-recipes
        "model_name": None,
        "output_dir": None,
        "dist_checkpoint_root_folder": None,
        "profiler_dir": None,
    },
    "fsdp_config": {
        "mixed_precision": True,
        "use_fp16": False,
        "sharding_strategy": "FULL_SHARD",
        "hsdp": False,
        "sharding_group_size": 0,
        "replica_group_size": 0,
        "checkpoint_type": "SHARDED_STATE_DICT",
        "fsdp_activation_checkpointing": True,
        "fsdp_cpu_offload": False,
        "pure_bf16": False,
        "optimizer": "AdamW",
    },
    "lora_config": {
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ("q_proj", "v_proj"),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.05,
        "inference_mode": False,
    },
    "llama_adapter_config": {"adapter_len": 10, "adapter_layers": 30, "task_type": "CAUSAL_LM"},
    "prefix_config": {"num_virtual_tokens": 30, "task_type": "CAUSAL_LM"},
    "quantization_config": {
        "quant_type": "fp4",
        "compute_dtype": "bfloat16",
        "use_double_quant": False,
        "quant_storage": "bfloat16",
    },
    "samsum_dataset": {"train_split": "train", "test_split": "validation"},
    "alpaca_dataset": {"train_split": "train", "test_split": "val"},
    "custom_dataset": {"train_split": "train", "test_split": "validation", "data_path": ""},
    "llamaguard_toxicchat_dataset": {"train_split": "train", "test_split": "test"},
    "wandb_config": {
        "project": "llama_cookbook",
        **dict.fromkeys(("entity", "job_type", "tags", "group", "notes", "mode")),
    },
}
"""llama-recipes' fields and defaults, from its documentation."""


def test_llama_recipes_fields_have_their_defaults() -> None:
    cfg = RunConfig()
    found = {section: {name: cfg.get(f"{section}.{name}") for name in wanted} for section, wanted in REFERENCE.items()}
    assert found == REFERENCE


def test_every_field_has_its_sentence() -> None:
    for section, cls in SECTIONS.items():
        assert list(sentences(cls)) == list(get_type_hints(cls)), section
        assert all(text.endswith(".") and len(text) > 8 for text in sentences(cls).values()), section


def test_sections_are_frozen() -> None:
    cfg = RunConfig()
    with pytest.raises(FrozenInstanceError):
        cfg.train_config = SECTIONS["train_config"]()  # type: ignore[misc]
    for section, cls in SECTIONS.items():
        assert cls.__dataclass_params__.frozen
        assert "__dict__" not in dir(getattr(cfg, section))


def test_defaults_are_values_of_their_types() -> None:
    for spec in FIELDS.values():
        kinds = alternatives(spec.kind)
        if choices(spec.kind):
            assert spec.default in choices(spec.kind) or (spec.default is None and NoneType in kinds)
        else:
            plain = tuple(get_origin(kind) or kind for kind in kinds)
            assert isinstance(spec.default, plain)


def test_fields_of_says_everything_of_every_field() -> None:
    rows = list(fields_of(parse([*MODEL, "--use_peft", "--r", "16"])))
    assert len(rows) == sum(len(fields(cls)) for cls in SECTIONS.values())
    (row,) = [row for row in rows if row.name == "r"]
    assert row == ("lora_config", "r", "INT", 8, 16, "flag", "The rank of each update.")


@pytest.mark.parametrize(
    ("line", "on"),
    [
        ("", {"samsum_dataset"}),
        ("--dataset grammar_dataset", {"grammar_dataset"}),
        ("--use_peft", {"samsum_dataset", "lora_config"}),
        ("--peft_method lora", {"samsum_dataset"}),
    ],
)
def test_active(line: str, on: set[str]) -> None:
    cfg = parse([*MODEL, *line.split()])
    assert {section for section in SECTIONS if cfg.active(section)} == {"train_config", "fsdp_config", *on}


def test_dataset_config_is_the_chosen_section() -> None:
    line = "--model_name M --dataset grammar_dataset --train_split a.csv"
    cfg = parse(line.split())
    assert cfg.dataset_config is cfg.grammar_dataset
    assert cfg.dataset_config.train_split == "a.csv"


def test_flags_named_in_messages_reach_their_field() -> None:
    assert flag("train_config.mixed_precision") == "--mixed_precision"
    assert flag("fsdp_config.mixed_precision") == "--fsdp_config.mixed_precision"
    assert flag("fsdp_config.pure_bf16") == "--pure_bf16"
    assert flag("alpaca_dataset.data_path") == "--alpaca_dataset.data_path"
    assert activation("lora_config") == "--use_peft --peft_method lora"
    assert activation("train_config") == ""


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: text.strip("'\"") not in ("", "None")
)
NAMES = st.lists(st.from_regex(r"[a-z_][a-z0-9_.]{0,6}[a-z0-9]", fullmatch=True), min_size=1, max_size=3)


def values_of(spec: Spec) -> st.SearchStrategy[str]:
    """Texts that a flag of this field takes."""
    if choices(spec.kind):
        return st.sampled_from(choices(spec.kind))
    if takes_names(spec.kind):
        patterns = st.sampled_from([".*(q|v)_proj", "all-linear"] if str in get_args(spec.kind) else ["a"])
        return NAMES.map(",".join) | NAMES.map(lambda names: f"[{', '.join(names)}]") | patterns
    texts: dict[Any, st.SearchStrategy[str]] = {
        bool: st.sampled_from(["true", "True", "false", "False"]),
        int: st.integers(-(2**63) + 1, 2**63 - 1).map(str) | st.just("1_000") | st.just("1e3"),
        float: st.floats(allow_nan=False, allow_infinity=False).map(repr) | st.integers(-99, 99).map(str),
    }
    return texts.get(spec.kind, TEXTS)


SETTINGS = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), values_of(FIELDS[name]))), max_size=25
)


@settings(max_examples=50, deadline=None)
@given(said=SETTINGS)
def test_flags_to_yaml_and_back(said: list[tuple[str, str]]) -> None:
    """Whatever the flags, both written forms give the same settings again, and every other reader the same values."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("packtrain.configs.parse.found", return_value=()):
        cfg = parse([f"--{name}={text}" for name, text in said])
        plain, commented = Path(folder, "plain.yaml"), Path(folder, "config.yaml")
        plain.write_text(yaml.safe_dump(to_yaml_dict(cfg)), encoding="utf-8")
        cfg.write(commented)
        for file in (plain, commented):
            again = parse([str(file)])
            assert again == cfg
            assert set(again.origin.values()) == {"file"}


def test_the_round_trip_can_fail() -> None:
    """Equality does look at the settings, and not at who set them."""
    one, same, other = (parse([*MODEL, *line.split()]) for line in ("", "--lr 1e-4", "--lr 2e-4"))
    assert one == same
    assert one.origin != same.origin
    assert one != other


def test_the_written_file_says_who_set_what(tmp_path: Path) -> None:
    cfg = parse([*MODEL, "--lr", "3e-5"])
    cfg.write(tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    assert "train_config:" in lines
    assert "  lr: 3.0e-05  # flag" in lines
    assert "  seed: 42  # default" in lines
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == to_yaml_dict(cfg)


def test_a_written_file_runs_without_remarks(tmp_path: Path) -> None:
    cfg = parse([*MODEL, "--use_peft", "--r=4", "--hsdp", "--fsdp_activation_checkpointing=False", "--seed=3"])
    cfg.write(tmp_path / "config.yaml")
    assert remarks(parse([str(tmp_path / "config.yaml")])) == []
