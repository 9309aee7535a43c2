"""argv and Python's arguments to a RunConfig: every way to write a flag, and what each mistake is told."""

from __future__ import annotations

import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from packtrain.configs.parse import HABITS, SPELLINGS, build, parse
from packtrain.configs.run import FIELDS, named
from packtrain.errors import EXIT_USER, UserError

MODEL = "--model_name M"
PEFT = f"{MODEL} --use_peft"


def problems(line: str | list[str]) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(line.split() if isinstance(line, str) else line)
    assert error.value.exit_code == EXIT_USER
    return error.value.problems


@pytest.mark.parametrize(
    ("line", "dotted", "value"),
    [
        ("--use_peft", "train_config.use_peft", True),
        ("--use_peft=true", "train_config.use_peft", True),
        ("--use_peft=True", "train_config.use_peft", True),
        ("--use_peft true", "train_config.use_peft", True),
        ("--use_peft False", "train_config.use_peft", False),
        ("--use-peft", "train_config.use_peft", True),
        ("-use_peft", "train_config.use_peft", True),
        ("--train_config.use_peft", "train_config.use_peft", True),
        ("--train-config.use-peft true", "train_config.use_peft", True),
        ("--norun_validation", "train_config.run_validation", False),
        ("--no_run_validation", "train_config.run_validation", False),
        ("--no-run-validation", "train_config.run_validation", False),
        ("--notrain_config.run_validation", "train_config.run_validation", False),
        ("--train_config.norun_validation", "train_config.run_validation", False),
        ("--run_validation False", "train_config.run_validation", False),
        ("--lr 3e-4", "train_config.lr", 3e-4),
        ("--lr=3e-4", "train_config.lr", 3e-4),
        ("--lr 1", "train_config.lr", 1.0),
        ("--lr 1 --lr 2", "train_config.lr", 2.0),
        ("--lr 1 --train_config.lr 2 --lr 3", "train_config.lr", 3.0),
        ("--context_length 1_024", "train_config.context_length", 1024),
        ("--max_train_step 1e3", "train_config.max_train_step", 1000),
        ("--tokenizer_name 'T'", "train_config.tokenizer_name", "T"),
        ('--tokenizer_name "T"', "train_config.tokenizer_name", "T"),
        ("--tokenizer_name 123", "train_config.tokenizer_name", "123"),
        ("--tokenizer_name=a=b", "train_config.tokenizer_name", "a=b"),
        ("--tokenizer_name None", "train_config.tokenizer_name", None),
        ("--peft_method None", "train_config.peft_method", None),
        ("--from_peft_checkpoint None", "train_config.from_peft_checkpoint", ""),
        ("--quantization None", "train_config.quantization", None),
        ("--quantization False", "train_config.quantization", None),
        ("--noquantization", "train_config.quantization", None),
        ("--pure_bf16", "fsdp_config.pure_bf16", True),
        ("--fsdp_config.pure_bf16", "fsdp_config.pure_bf16", True),
        ("--sharding_strategy NO_SHARD", "fsdp_config.sharding_strategy", "NO_SHARD"),
        ("--sharding_strategy ShardingStrategy.NO_SHARD", "fsdp_config.sharding_strategy", "NO_SHARD"),
        ("--checkpoint_type StateDictType.SHARDED_STATE_DICT", "fsdp_config.checkpoint_type", "SHARDED_STATE_DICT"),
        ("--hsdp", "fsdp_config.sharding_strategy", "HYBRID_SHARD"),
        ("--hsdp --sharding_strategy HYBRID_SHARD", "fsdp_config.sharding_strategy", "HYBRID_SHARD"),
        ("--hsdp --sharding_group_size 4", "fsdp_config.sharding_group_size", 4),
        ("--nohsdp", "fsdp_config.sharding_strategy", "FULL_SHARD"),
        ("--mixed_precision False", "train_config.mixed_precision", False),
        ("--mixed_precision False", "fsdp_config.mixed_precision", False),
        ("--fsdp_config.mixed_precision False", "train_config.mixed_precision", False),
        ("--train_config.mixed_precision False", "fsdp_config.mixed_precision", False),
        ("--fsdp_activation_checkpointing", "train_config.activation_checkpointing", "full"),
        ("--fsdp_activation_checkpointing False", "train_config.activation_checkpointing", "none"),
        ("--activation_checkpointing none", "fsdp_config.fsdp_activation_checkpointing", False),
        ("", "train_config.activation_checkpointing", "auto"),
        ("--lora_config.r 4", "lora_config.r", 4),
        ("--use_peft --r 4", "lora_config.r", 4),
        ("--r 4 --use_peft", "lora_config.r", 4),
        ("--use_peft -r 4", "lora_config.r", 4),
        ("--use_peft --target_modules [q_proj,k_proj]", "lora_config.target_modules", ("q_proj", "k_proj")),
        ("--use_peft --target_modules q_proj,k_proj", "lora_config.target_modules", ("q_proj", "k_proj")),
        ("--use_peft --target_modules ['q_proj','k_proj']", "lora_config.target_modules", ("q_proj", "k_proj")),
        ("--use_peft --target_modules all-linear", "lora_config.target_modules", "all-linear"),
        ("--use_peft --target_modules .*(q|v)_proj", "lora_config.target_modules", ".*(q|v)_proj"),
        ("--use_peft --modules_to_save None", "lora_config.modules_to_save", ()),
        ("--use_peft --modules_to_save lm_head", "lora_config.modules_to_save", ("lm_head",)),
        ("--use_peft --bias None", "lora_config.bias", "none"),
        ("--quantization_config.compute_dtype torch.float16", "quantization_config.compute_dtype", "float16"),
        ("--quantization_config.quant_storage bf16", "quantization_config.quant_storage", "bfloat16"),
        ("--dataset samsum_dataset --train_split x", "samsum_dataset.train_split", "x"),
        ("--train_split x.csv --dataset grammar_dataset", "grammar_dataset.train_split", "x.csv"),
        ("--grammar_dataset.train_split x", "grammar_dataset.train_split", "x"),
        ("--dataset custom_dataset --file a/b.py:get_foo", "custom_dataset.file", "a/b.py:get_foo"),
        ("--dataset synthetic_dataset --seed 7", "synthetic_dataset.seed", 7),
        ("--dataset synthetic_dataset --seed 7", "train_config.seed", 7),
        ("--dataset synthetic_dataset --synthetic_dataset.seed 7", "train_config.seed", 42),
        ("--wandb_config.tags a,b", "wandb_config.tags", ("a", "b")),
        ("--wandb_config.notes x", "wandb_config.notes", "x"),
    ],
)
def test_every_way_to_write_a_flag(line: str, dotted: str, value: object) -> None:
    cfg = parse([*MODEL.split(), *line.split()])
    assert cfg.get(dotted) == value
    assert type(cfg.get(dotted)) is type(value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        # unknown
        ("--lrr 3", "--lrr: no such flag; did you mean --lr?"),
        ("--learning_rate 3", "--learning_rate: no such flag; did you mean --lr?"),
        ("--fsdp_confg.pure_bf16", "--fsdp_confg.pure_bf16: no such flag; did you mean --fsdp_config.pure_bf16?"),
        ("--fsdp_config.pure_bf61", "--fsdp_config.pure_bf61: no such flag; did you mean --fsdp_config.pure_bf16?"),
        ("--train_config.r 3", "--train_config.r: no such flag; did you mean --lora_config.r?"),
        ("--a.b.c 3", "--a.b.c: no such flag"),
        ("--freeze_llm_only", "--freeze_llm_only: no such flag; did you mean --freeze_LLM_only?"),
        ("--lora_config 3", "--lora_config: is a section; its settings are written --lora_config.NAME"),
        ("--qqqqqqqq", "--qqqqqqqq: no such flag; packtrain train --help lists them all"),
        ("--", "--: no such flag"),
        # mistyped
        ("--lr abc", "--lr: expected a number, found 'abc'"),
        ("--lr", "--lr: expected a number, found no value"),
        ("--lr --use_peft", "--lr: expected a number, found no value"),
        ("--lr=", "--lr: expected a number, found ''"),
        ("--nolr", "--nolr: expected a number, found False"),
        ("--lr nan", "--lr: expected a number, found 'nan'"),
        ("--batch_size_training 2.0", "--batch_size_training: expected a whole number, found '2.0'"),
        ("--batch_size_training '2'", "--batch_size_training: expected a whole number, found the quoted text '2'"),
        ("--max_train_step 1e-1", "--max_train_step: expected a whole number, found '1e-1'"),
        ("--use_peft maybe", "--use_peft: expected true or false, found 'maybe'"),
        ("--use_peft 1", "--use_peft: expected true or false, found '1'"),
        ("--nouse_peft=true", "--nouse_peft: expected no value, found 'true'"),
        ("--output_dir=", "--output_dir: expected text or None, found ''"),
        ("--output_dir", "--output_dir: expected text, found no value"),
        ("--seed None", "--seed: expected a whole number, found 'None'"),
        ("--batching_strategy packin", "expected one of packing, padding, found 'packin'; did you mean packing?"),
        (
            "--sharding_strategy FULL",
            "--sharding_strategy: expected one of FULL_SHARD, SHARD_GRAD_OP, NO_SHARD, HYBRID",
        ),
        ("--dataset grammar", "samsum_dataset, grammar_dataset, alpaca_dataset, custom_dataset"),
        ("--dataset grammar", "found 'grammar'; did you mean grammar_dataset?"),
        ("--peft_method lorra", "--peft_method: expected one of lora, llama_adapter, prefix or None, found 'lorra'"),
        ("--quantization 3bit", "--quantization: expected one of 4bit, 8bit, fp8 or None, found '3bit'"),
        ("--lora_config.task_type SEQ_CLS", "--lora_config.task_type: expected CAUSAL_LM, found 'SEQ_CLS'"),
        (
            "--lora_config.target_modules a,,b",
            "--lora_config.target_modules: expected a list of names or a regular exp",
        ),
        ("--fsdp_config.optimizer adamw", "--fsdp_config.optimizer: expected one of AdamW, anyprecision, adamw8bit"),
        ("--lora_config.r x", "--lora_config.r: expected a whole number, found 'x'"),
        # out of place
        ("--r 4", "--r: belongs to lora_config (--use_peft --peft_method lora), which this run does not use"),
        ("--quant_type nf4", "--quant_type: belongs to quantization_config (--quantization 4bit)"),
        ("--project x", "--project: belongs to wandb_config (--use_wandb)"),
        (
            "--dataset grammar_dataset --data_path x",
            "--data_path: belongs to samsum_dataset (--dataset samsum_dataset), ",
        ),
        ("stray", "'stray': expected a flag (--name) or one CONFIG.yaml"),
        ("--nouse_peft x", "'x': expected a flag (--name) or one CONFIG.yaml"),
        ("- ", "'-': expected a flag (--name) or one CONFIG.yaml"),
    ],
)
def test_every_mistake_names_flag_found_and_expected(line: str, said: str) -> None:
    found = problems(f"{MODEL} {line}")
    assert any(said in problem for problem in found), found
    assert len(found) == 1, found


def test_all_problems_come_in_one_message() -> None:
    found = problems(f"{MODEL} --lr abc --num_epochs 0 --bogus_flag --batch_size_training 2.5 stray --gamma=-1")
    assert len(found) == 6
    for part in ("--lr", "--num_epochs", "--bogus_flag", "--batch_size_training", "'stray'", "--gamma"):
        assert sum(problem.startswith(part) for problem in found) == 1, part


@pytest.mark.parametrize("line", ["--modle_name M", "--model M", "--train_config.model_nam M"])
def test_a_misspelt_name_is_not_also_called_missing(line: str) -> None:
    (problem,) = problems(line)
    assert "did you mean" in problem
    assert "model_name" in problem


def test_the_guard_against_missing_settings_does_fire() -> None:
    (problem,) = problems("--lr 1e-4")
    assert problem.startswith("--model_name: expected a model's folder or hub id, found none")


@pytest.mark.parametrize("line", ["--use_pef --r 4", "--use_peft maybe --r 4", "--dataset gramar_dataset --length 3"])
def test_no_section_is_called_unused_when_its_switch_is_in_doubt(line: str) -> None:
    found = problems(f"{MODEL} {line}")
    assert not any("belongs to" in problem for problem in found), found


def test_origin_says_who_set_each_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nseed: 1\nmodel_name: M\n")
    cfg = parse([str(file), "--seed", "2"])
    assert (cfg.train_config.lr, cfg.train_config.seed) == (1e-3, 2)
    assert set(cfg.origin) == set(FIELDS)
    set_by = {dotted: who for dotted, who in cfg.origin.items() if who != "default"}
    assert set_by == {"train_config.lr": "file", "train_config.model_name": "file", "train_config.seed": "flag"}


@pytest.mark.parametrize("line", ["{file} --use_peft", "--use_peft {file}", "--lr 1 {file} --use_peft"])
def test_the_config_may_stand_anywhere(tmp_path: Path, line: str) -> None:
    file = tmp_path / "run.yml"
    file.write_text("model_name: M\n")
    cfg = parse(line.format(file=file).split())
    assert cfg.train_config.model_name == "M"
    assert cfg.train_config.use_peft


def test_two_configs_are_one_too_many(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model_name: M\n")
    (problem,) = problems([str(file), "b.yaml"])
    assert problem.startswith("b.yaml: expected one CONFIG.yaml")


@pytest.mark.parametrize("line", ["--hf_token {s}", "--hf_token={s}", "HF_TOKEN={s}", "{s}", "--lr {s}", "--{s}"])
def test_secrets_are_never_echoed(line: str) -> None:
    secret = "hf_QwErTyUiOpAsDfGhJk"
    assert secret not in "\n".join(problems(f"{MODEL} {line.format(s=secret)}"))


def test_values_of_unknown_flags_are_never_echoed() -> None:
    for line in ("--password hunter2", "--password=hunter2", "PASSWORD=hunter2"):
        assert "hunter2" not in "\n".join(problems(f"{MODEL} {line}"))


@pytest.mark.parametrize(
    ("settings", "dotted", "value"),
    [
        ({"lr": 1e-3}, "train_config.lr", 1e-3),
        ({"lr": 1}, "train_config.lr", 1.0),
        ({"lr": "1e-3"}, "train_config.lr", 1e-3),
        ({"fsdp_config.pure_bf16": True}, "fsdp_config.pure_bf16", True),
        ({"lora_config": {"r": 16}}, "lora_config.r", 16),
        ({"use_peft": True, "r": 16}, "lora_config.r", 16),
        ({"train_config": {"lr": 1e-3}}, "train_config.lr", 1e-3),
        ({"output_dir": Path("out")}, "train_config.output_dir", "out"),
        ({"output_dir": None}, "train_config.output_dir", None),
        ({"use_peft": True, "target_modules": ["q_proj"]}, "lora_config.target_modules", ("q_proj",)),
        ({"hsdp": True}, "fsdp_config.sharding_strategy", "HYBRID_SHARD"),
    ],
)
def test_python_takes_the_same_names(settings: dict[str, Any], dotted: str, value: object) -> None:
    cfg = build(model_name="M", **settings)
    assert cfg.get(dotted) == value
    assert type(cfg.get(dotted)) is type(value)
    assert cfg.origin["train_config.model_name"] == "flag"


def test_python_takes_enumerations_by_name() -> None:
    class ShardingStrategy(Enum):
        NO_SHARD = 3

    cfg = build(model_name="M", sharding_strategy=ShardingStrategy.NO_SHARD)
    assert cfg.fsdp_config.sharding_strategy == "NO_SHARD"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": "abc"}, "lr: expected a number, found 'abc'"),
        ({"lr": True}, "lr: expected a number, found True"),
        ({"num_epochs": 2.0}, "num_epochs: expected a whole number, found 2.0"),
        ({"use_peft": 1}, "use_peft: expected true or false, found 1"),
        ({"learning_rate": 1}, "learning_rate: no such setting; did you mean lr?"),
        ({"lora_config": 3}, "lora_config: is a section; its settings are written lora_config.NAME"),
        ({"lora_config": {"rr": 3}}, "lora_config.rr: no such setting; did you mean lora_config.r?"),
        ({"lora_config": {"r": {}}}, "lora_config.r: expected a whole number, found a dict"),
        ({"lr": -1}, "lr: expected a number above 0, found -1.0"),
    ],
)
def test_python_is_told_the_same_mistakes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        build(model_name="M", **settings)
    assert error.value.problems == [said]


def test_hints_and_spellings_name_real_fields() -> None:
    assert all(named(name) for name in HABITS.values())
    assert not any(named(name) for name in HABITS)
    assert set(SPELLINGS) <= set(FIELDS)


def test_a_bad_flag_is_told_within_a_second_and_without_torch() -> None:
    code = (
        "import sys\nfrom packtrain.configs.parse import parse\n"
        "from packtrain.configs.help import help_text\nhelp_text()\n"
        "try:\n    parse(['--bogus_flag'])\nexcept Exception as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5  # on a busy machine; 0.2 s alone
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--bogus_flag: no such flag" in done.stdout
