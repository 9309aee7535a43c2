"""Settings that parse and still cannot be run: each refusal names the flag, what was found and what is expected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packtrain.configs import check
from packtrain.configs.parse import parse
from packtrain.configs.run import FIELDS, RunConfig
from packtrain.configs.training import TrainConfig
from packtrain.errors import UserError

MODEL = ["--model_name", "M"]


def problems(line: str) -> list[str]:
    try:
        parse([*MODEL, *line.split()])
    except UserError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("dotted", "bad", "good"),
    [
        ("lr", ("0", "-0.5"), ("1e-9", "1")),
        ("gamma", ("0", "-1"), ("0.5", "1")),
        ("gradient_clipping_threshold", ("0", "-1"), ("0.1",)),
        ("weight_decay", ("-0.1",), ("0", "0.1")),
        ("context_length", ("1", "0", "-1"), ("2",)),
        ("batch_size_training", ("0", "-1"), ("1",)),
        ("val_batch_size", ("0",), ("1",)),
        ("gradient_accumulation_steps", ("0",), ("1",)),
        ("num_epochs", ("0",), ("1",)),
        ("max_train_step", ("-1",), ("0", "1")),
        ("max_eval_step", ("-1",), ("0", "1")),
        ("warmup_steps", ("-1",), ("0", "1")),
        ("eval_steps", ("-1",), ("0", "1")),
        ("num_workers_dataloader", ("-1",), ("0", "1")),
        ("nproc_per_node", ("-1",), ("0", "1")),
        ("seed", ("-1",), ("0", "1")),
        ("lora_config.lora_dropout", ("1", "-0.1", "2"), ("0", "0.99")),
        ("lora_config.r", ("0", "-1"), ("1",)),
        ("lora_config.lora_alpha", ("0",), ("1",)),
        ("llama_adapter_config.adapter_len", ("0",), ("1",)),
        ("llama_adapter_config.adapter_layers", ("0",), ("1",)),
        ("prefix_config.num_virtual_tokens", ("0",), ("1",)),
        ("synthetic_dataset.rows", ("0",), ("1",)),
        ("synthetic_dataset.length", ("1",), ("2",)),
        ("synthetic_dataset.vocab_size", ("-1",), ("0",)),
        ("fsdp_config.sharding_group_size --hsdp", ("-1",), ("0", "4")),
        ("fsdp_config.replica_group_size --hsdp", ("-1",), ("0", "4")),
    ],
)
def test_ranges(dotted: str, bad: tuple[str, ...], good: tuple[str, ...]) -> None:
    name, _, rest = dotted.partition(" ")
    for value in bad:
        (problem,) = problems(f"--{name} {value} {rest}")
        assert problem.startswith(f"--{name}: expected ")
        assert problem.partition("found ")[2].removesuffix(".0") == value
    for value in good:
        assert problems(f"--{name} {value} {rest}") == []


def test_every_number_has_a_range() -> None:
    ranged = [dotted for _, _, names in check.RANGES for dotted in names]
    numbers = [dotted for dotted, spec in FIELDS.items() if spec.kind in (int, float)]
    assert sorted(ranged) == sorted(numbers)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--random_init c.json",
            "--random_init: draws the weights that --model_name would read; expected one of the two",
        ),
        ("--from_peft_checkpoint D", "--from_peft_checkpoint: trains an adapter (found 'D'); add --use_peft"),
        ("--quantization", "--quantization: trains an adapter (found '8bit'); add --use_peft"),
        (
            "--use_peft --peft_method None",
            "--peft_method: expected lora, llama_adapter or prefix, found None: --use_peft needs something to train",
        ),
        ("--use_peft --target_modules []", "--target_modules: expected names of linear layers, found none"),
        (
            "--use_peft --target_modules (q_proj",
            "--target_modules: expected names or a regular expression, found '(q_proj'",
        ),
        (
            "--lora_config.inference_mode",
            "--lora_config.inference_mode: expected False, found True, which would train noth",
        ),
        (
            "--mixed_precision False --fsdp_config.mixed_precision True",
            "--fsdp_config.mixed_precision: is True, while --mixed_precision is False; they are one setting: say one",
        ),
        ("--use_fp16 --mixed_precision False", "--use_fp16: asks for fp16 and --mixed_precision False for fp32; leave"),
        ("--use_fp16 --pure_bf16", "--use_fp16: asks for fp16 and --pure_bf16 for bf16; leave out one of the two"),
        (
            "--hsdp --sharding_strategy FULL_SHARD",
            "--hsdp: means HYBRID_SHARD, while --sharding_strategy is FULL_SHARD; leave out one of the two",
        ),
        (
            "--sharding_group_size 4",
            "--sharding_group_size: sizes the groups of HYBRID_SHARD, while --sharding_strategy is FULL_SHARD; add",
        ),
        (
            "--replica_group_size 2 --sharding_strategy NO_SHARD",
            "--replica_group_size: sizes the groups of HYBRID_SHARD, while --sharding_strategy is NO_SHARD; add --hsdp",
        ),
        (
            "--fsdp_activation_checkpointing True --activation_checkpointing none",
            "--fsdp_activation_checkpointing: is True, while --activation_checkpointing is none; leave out one",
        ),
        (
            "--fsdp_activation_checkpointing False --activation_checkpointing full",
            "--fsdp_activation_checkpointing: is False, while --activation_checkpointing is full; leave out one of the",
        ),
        (
            "--dataset custom_dataset --custom_dataset.file x.txt",
            "--custom_dataset.file: expected FILE.py or FILE.py:FUNCTION, found 'x.txt'",
        ),
        (
            "--custom_dataset.file x.py:1f",
            "--custom_dataset.file: expected FILE.py or FILE.py:FUNCTION, found 'x.py:1f'",
        ),
        (
            "--grammar_dataset.train_split=",
            "--grammar_dataset.train_split: expected a file or a split's name, found none",
        ),
        ("--dist_checkpoint_folder=", "--dist_checkpoint_folder: expected a folder's name, found none"),
        ("--use_profiler --flop_counter", "--use_profiler: cannot go with --flop_counter; leave out one of the two"),
        (
            "--use_profiler --max_train_step 6",
            "--use_profiler: waits 1 step, warms up for 2 and records 3; expected 7 or more of --max_train_step, found",
        ),
        (
            "--flop_counter --flop_counter_start 4 --max_train_step 4",
            "--flop_counter_start: counts the step after 4 others; expected more of --max_train_step, found 4",
        ),
        ("--freeze_LLM_only", "--freeze_LLM_only: is for vision models, and packtrain trains text models only"),
    ],
)
def test_settings_at_odds(line: str, said: str) -> None:
    found = problems(line)
    assert any(problem.startswith(said) for problem in found), found


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--use_peft --from_peft_checkpoint D",
        "--mixed_precision False --pure_bf16",
        "--mixed_precision False --fsdp_config.mixed_precision False",
        "--sharding_strategy HYBRID_SHARD --sharding_group_size 2 --replica_group_size 2",
        "--nohsdp --sharding_strategy HYBRID_SHARD",
        "--fsdp_activation_checkpointing True --activation_checkpointing full",
        "--fsdp_activation_checkpointing False --activation_checkpointing none",
        "--fsdp_activation_checkpointing True --activation_checkpointing auto",
        "--custom_dataset.file x.py",
        "--custom_dataset.file C:\\x.py:get_foo",
        "--peft_method None",
        "--lr_scheduler cosine --warmup_steps 10",
        "--lr_scheduler linear",
        "--lr_scheduler constant",
        "--batching_strategy padding",
        "--on_bad_rows skip --eval_first --eval_steps 5 --overwrite_output_dir",
        "--attention sdpa",
        "--dataset synthetic_dataset --rows 8 --length 16",
    ],
)
def test_what_fits_is_let_through(line: str) -> None:
    assert problems(line) == []


def test_a_model_is_needed_or_random_weights() -> None:
    def without_model(line: str) -> list[str]:
        try:
            parse(line.split())
        except UserError as error:
            return error.problems
        return []

    assert without_model("--random_init c.json --dataset synthetic_dataset") == []
    assert without_model("--random_init c.json --tokenizer_name T") == []
    (problem,) = without_model("--random_init c.json")
    assert problem.startswith(
        "--tokenizer_name: expected a tokenizer's folder or hub id, found none: --random_init has"
    )
    (problem,) = without_model("")
    assert problem.startswith("--model_name: expected a model's folder or hub id, found none")


def test_problems_of_settings_made_without_parsing() -> None:
    assert check.problems(RunConfig(train_config=TrainConfig(model_name="M"))) == []
    broken = RunConfig(train_config=TrainConfig(model_name="M", lr=-1.0, num_epochs=0))
    assert check.problems(broken) == [
        "--lr: expected a number above 0, found -1.0",
        "--num_epochs: expected 1 or more, found 0",
    ]


@pytest.mark.parametrize("rule", [rule for rule in check.RULES if rule.__name__ != "_vision"])
def test_each_rule_is_needed(rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rule gone, one of these lines goes through that it alone had stopped."""
    lines = [
        "--lr -1",
        "--random_init c.json",
        "--use_peft --target_modules []",
        "--use_peft --target_modules (q_proj",
        "--mixed_precision False --fsdp_config.mixed_precision True",
        "--hsdp --sharding_strategy FULL_SHARD",
        "--fsdp_activation_checkpointing True --activation_checkpointing none",
        "--custom_dataset.file x.txt",
        "--deterministic",
    ]
    if rule is check._measuring:
        monkeypatch.setattr(check, "not_yet", lambda cfg: iter(()))
        lines = ["--use_profiler --flop_counter", "--use_profiler --max_train_step 1"]
    assert all(problems(line) for line in lines)
    monkeypatch.setattr(check, "RULES", tuple(other for other in check.RULES if other is not rule))
    assert not all(problems(line) for line in lines)


def test_a_problem_with_a_default_is_told_by_its_flag() -> None:
    cfg = parse([*MODEL])
    cfg = replace(cfg, lora_config=replace(cfg.lora_config, r=0))
    assert check.problems(cfg) == ["--r: expected 1 or more, found 0"]
