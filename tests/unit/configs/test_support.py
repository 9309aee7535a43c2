"""What is refused until it is built, what is accepted and does nothing, and what both are told."""

from __future__ import annotations

import pytest

from packtrain.configs import support
from packtrain.configs.parse import parse
from packtrain.configs.run import FIELDS
from packtrain.configs.support import LATER, RESTATES, remarks, status
from packtrain.errors import UserError

MODEL = ["--model_name", "M"]
REFUSED = [
    "--deterministic",
]


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_not_built_is_refused_in_a_sentence(line: str) -> None:
    with pytest.raises(UserError) as error:
        parse([*MODEL, *line.split()])
    (problem,) = error.value.problems
    assert "comes with a later version (found " in problem
    flags = [word for word in line.split() if word.startswith("--")]
    assert problem.startswith(flags[-1])


def test_every_row_is_tested_and_can_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in LATER:
        monkeypatch.setattr(support, "LATER", (row,))
        assert any(_refused(line) for line in REFUSED), row
    monkeypatch.setattr(support, "LATER", ())
    assert not any(_refused(line) for line in REFUSED)


def _refused(line: str) -> bool:
    try:
        parse([*MODEL, *line.split()])
    except UserError:
        return True
    return False


def test_the_rows_name_real_fields() -> None:
    assert {dotted for row in LATER for dotted in row.fields} <= set(FIELDS)
    assert set(RESTATES) <= set(FIELDS)
    assert {name for names, _, _ in support.NEEDS for name in names} <= set(FIELDS)


@pytest.mark.parametrize(
    "line",
    [
        "--use_peft --peft_method lora --bias none",
        "--quantization None",
        "--nouse_fp16",
        "--optimizer AdamW",
        "--use_kahan",
        "--checkpoint_type SHARDED_STATE_DICT",
        "--freeze_layers False --num_freeze_layers 1",
        "--attention auto",
        "--save_steps 5 --save_optimizer False",
        "--grace_seconds 30",
        "--lora_config.task_type CAUSAL_LM",
    ],
)
def test_what_happens_anyway_is_accepted(line: str) -> None:
    assert not _refused(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--low_cpu_fsdp", "--low_cpu_fsdp: accepted, does nothing: weights are always streamed"),
        ("--low_cpu_fsdp False", "--low_cpu_fsdp: accepted, does nothing: weights are always streamed"),
        ("--one_gpu", "--one_gpu: accepted, does nothing: the number of workers decides"),
        ("--use_fast_kernels", "--use_fast_kernels: accepted, does nothing: the fastest attention"),
        ("--use_peft --task_type CAUSAL_LM", "--task_type: accepted, does nothing: packtrain trains text generation"),
        ("--use_peft --noinference_mode", "--noinference_mode: accepted, does nothing: a run trains"),
        ("--lora_config.r 4", "--lora_config.r: has no effect without --use_peft --peft_method lora"),
        ("--alpaca_dataset.data_path x", "--alpaca_dataset.data_path: has no effect without --dataset alpaca_dataset"),
        ("--quantization_config.quant_type nf4", "--quantization_config.quant_type: has no effect without --quantiz"),
        ("--use_peft --quantization fp8 --quantization_config.compute_dtype fp16", "--quantization_config.compute_dty"),
        ("--use_peft --quantization 8bit --quant_type nf4", "--quant_type: has no effect with --quantization 8bit"),
        ("--use_peft --quantization 8bit --use_double_quant", "--use_double_quant: has no effect with --quantization"),
        ("--wandb_config.project p", "--wandb_config.project: has no effect without --use_wandb"),
        ("--gradient_clipping_threshold 2", "--gradient_clipping_threshold: has no effect without --gradient_clipping"),
        ("--flop_counter_start 3", "--flop_counter_start: has no effect without --flop_counter"),
        ("--profiler_dir P", "--profiler_dir: has no effect without --use_profiler"),
        ("--gamma 0.5 --lr_scheduler cosine", "--gamma: has no effect without --lr_scheduler gamma"),
        ("--eval_steps 5 --norun_validation", "--eval_steps: has no effect without --run_validation"),
        ("--dist_checkpoint_folder x", "--dist_checkpoint_folder: has no effect without --dist_checkpoint_root_folder"),
        ("--optimizer anyprecision", "--optimizer: has no effect without --pure_bf16"),
        ("--nouse_kahan", "--nouse_kahan: has no effect without --pure_bf16 --optimizer anyprecision"),
        ("--pure_bf16 --nouse_kahan", "--nouse_kahan: has no effect without --pure_bf16 --optimizer anyprecision"),
        ("--pure_bf16 --moments 8bit", "--moments: has no effect without --pure_bf16 --optimizer anyprecision"),
        ("--num_freeze_layers 8", "--num_freeze_layers: has no effect without --freeze_layers"),
        ("--use_peft --freeze_layers", "--freeze_layers: has no effect with --use_peft"),
        ("--max_train_step 5 --warmup_steps 5", "--warmup_steps: 5 steps, so lr is still rising when --max_train_step"),
    ],
)
def test_what_has_no_effect_is_said(line: str, said: str) -> None:
    (remark,) = remarks(parse([*MODEL, *line.split()]))
    assert remark.startswith(said)


@pytest.mark.parametrize(
    "line",
    [
        "--enable_fsdp --use_peft --r 4 --lr 1e-3",
        "--gradient_clipping --gradient_clipping_threshold 2",
        "--gamma 0.5",
        "--flop_counter --flop_counter_start 4",
        "--use_profiler --profiler_dir P",
        "--attention eager",
        "--eval_steps 5",
        "--dist_checkpoint_folder x --dist_checkpoint_root_folder y --output_dir o",
        "--max_train_step 6 --warmup_steps 5",
        "--pure_bf16 --optimizer anyprecision --nouse_kahan",
        "--pure_bf16 --optimizer anyprecision --moments 8bit",
        "--optimizer adamw8bit",
        "--freeze_layers --num_freeze_layers 8",
        "--use_fp16 --fsdp_cpu_offload --save_metrics",
        "--use_wandb --wandb_config.project p",
        "--use_peft --quantization 4bit --quant_type nf4 --use_double_quant --compute_dtype fp16 --quant_storage fp32",
        "--use_peft --quantization int8 --compute_dtype bf16",
    ],
)
def test_what_has_an_effect_is_not_remarked_on(line: str) -> None:
    assert remarks(parse([*MODEL, *line.split()])) == []


@pytest.mark.parametrize(
    ("dotted", "said"),
    [
        ("train_config.lr", "obeyed"),
        ("train_config.low_cpu_fsdp", "restates"),
        ("train_config.use_fp16", "obeyed"),
        ("train_config.freeze_LLM_only", "refused"),
        ("lora_config.bias", "obeyed"),
        ("prefix_config.num_virtual_tokens", "obeyed"),
        ("quantization_config.quant_type", "obeyed"),
        ("wandb_config.project", "obeyed"),
        ("llamaguard_toxicchat_dataset.test_split", "obeyed"),
        ("lora_config.r", "obeyed"),
        ("grammar_dataset.train_split", "obeyed"),
        ("train_config.attention", "obeyed"),
        ("train_config.peft_method", "obeyed"),
    ],
)
def test_status(dotted: str, said: str) -> None:
    assert status(dotted) == said
