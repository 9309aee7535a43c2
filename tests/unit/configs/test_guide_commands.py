"""The commands of Meta's multi-GPU guide and of llama-recipes' documents: each is read as it stands."""

from __future__ import annotations

import shlex

import pytest

from packtrain.configs.parse import parse
from packtrain.errors import UserError

FSDP = "--enable_fsdp --model_name /path/to/model/8B"
LORA = f"{FSDP} --use_peft --peft_method lora --output_dir /path/to/save/model"
ONE = "--use_peft --peft_method lora --model_name M --output_dir O"
DIST = "--dist_checkpoint_root_folder model_checkpoints --dist_checkpoint_folder fine-tuned"

RUNS = [
    LORA,
    f"{LORA} --use_fast_kernels",
    f"{FSDP} {DIST} --fsdp_config.pure_bf16 --use_fast_kernels",
    "--enable_fsdp --low_cpu_fsdp --fsdp_config.pure_bf16 --model_name /path/to/model/70B --batch_size_training 1 "
    + DIST,
    f"{LORA} --dataset grammar_dataset",
    f"{LORA} --dataset alpaca_dataset",
    f"{LORA} --dataset samsum_dataset",
    f"{LORA} --flop_counter --flop_counter_start 3",
    f"{LORA} --use_profiler --profiler_dir /path/to/save/results",
    f"{LORA} --use_profiler --profiler_dir P --max_train_step 7",
    f"{LORA} --dataset llamaguard_toxicchat_dataset",
    *(f"{LORA} --fsdp_config.sharding_strategy {one}" for one in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")),
    f"{LORA} --fsdp_config.sharding_strategy HYBRID_SHARD",
    f"{LORA} --fsdp_config.checkpoint_type SHARDED_STATE_DICT",
    f"{LORA} --fsdp_config.checkpoint_type FULL_STATE_DICT",
    f"{LORA} --fsdp_config.checkpoint_type StateDictType.SHARDED_STATE_DICT",
    f"{LORA} --hsdp --sharding_group_size 4 --replica_group_size 2",
    ONE,
    f"{LORA} --mixed_precision False",
    f'{LORA} --dataset custom_dataset --custom_dataset.file "examples/custom_dataset.py:get_foo"',
    f"{LORA} --dataset custom_dataset --custom_dataset.file examples/custom_dataset.py --custom_dataset.data_path D",
    f"{LORA} --run_validation False",
    f"{LORA} --batching_strategy padding",
    f"{LORA} --from_peft_checkpoint DIR",
    f"{FSDP} --use_peft --peft_method llama_adapter --output_dir O",
    f"{FSDP} --use_peft --peft_method prefix --output_dir O",
    f"{LORA} --use_wandb --wandb_config.project P",
    f"{LORA} --save_metrics",
    f"{FSDP} --freeze_layers --num_freeze_layers 8",
    f"{FSDP} --fsdp_config.pure_bf16 --fsdp_config.optimizer anyprecision",
    f"{LORA} --use_fp16 --fsdp_config.fsdp_cpu_offload",
    f"{LORA} --max_train_step 10 --max_eval_step 5",
    f"{LORA} --lr 1e-5 --num_epochs 1 --gradient_accumulation_steps 2 --context_length 2048 --weight_decay 0.1",
    f"{LORA} --lora_config.r 16 --lora_config.target_modules [q_proj,k_proj,v_proj,o_proj] --seed 1 --gamma 0.9",
    f"{ONE} --quantization 8bit",
    f"{ONE} --quantization",
    f"{ONE} --quantization int4",
    f"{ONE} --quantization 4bit --quantization_config.quant_type nf4",
    f"{LORA} --quantization 4bit --mixed_precision False",
    f"{LORA} --save_model False --tokenizer_name T --val_batch_size 2 --num_workers_dataloader 4 --gradient_clipping",
]


@pytest.mark.parametrize("line", RUNS)
def test_a_documented_command_is_read(line: str) -> None:
    assert parse(shlex.split(line)).train_config.model_name


def test_flop_counter_and_profiler_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--use_profiler: cannot go with --flop_counter"):
        parse(shlex.split(f"{LORA} --flop_counter --use_profiler --profiler_dir P"))
