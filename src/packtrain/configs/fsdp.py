"""fsdp_config: how the model is spread over workers, in which precision, and what each keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpConfig:
    """Fully sharded data parallelism."""

    mixed_precision: bool = True
    """The same setting as train_config.mixed_precision."""

    use_fp16: bool = False
    """The same setting as train_config.use_fp16."""

    sharding_strategy: ShardingStrategy = "FULL_SHARD"
    """Shard weights, gradients and optimizer state; all but the weights; nothing; or within groups of workers only."""

    hsdp: bool = False
    """Short for sharding_strategy HYBRID_SHARD."""

    sharding_group_size: int = 0
    """Workers that share one copy of the model under HYBRID_SHARD; 0 means those of one machine."""

    replica_group_size: int = 0
    """Copies of the model under HYBRID_SHARD; 0 means as many as there are groups."""

    checkpoint_type: Literal["SHARDED_STATE_DICT", "FULL_STATE_DICT"] = "SHARDED_STATE_DICT"
    """Checkpoints as each worker's shard, or as one gathered set."""

    fsdp_activation_checkpointing: bool = True
    """If given: activation_checkpointing full or none."""

    fsdp_cpu_offload: bool = False
    """Keep shards and their optimizer state in host memory; of one GPU's frozen base the layers that do not fit."""

    pure_bf16: bool = False
    """bf16 weights and products on any device, a CPU too."""

    optimizer: Literal["AdamW", "anyprecision", "adamw8bit"] = "AdamW"
    """AdamW with fp32 states; bf16 weights without fp32 copies; or fp32 copies and 8-bit states."""

    use_kahan: bool = True
    """Carry what rounding loses to the next step, with optimizer anyprecision."""

    moments: Literal["bf16", "8bit"] = "bf16"
    """What optimizer anyprecision keeps its two averages of gradients in: 2 bytes a weight each, or 1."""
