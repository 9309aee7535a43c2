"""What a run says of its batches and its ranks before it begins."""

from __future__ import annotations

from packtrain.configs.run import RunConfig
from packtrain.data.loader import Loader
from packtrain.distributed.parallelize import group_sizes
from packtrain.distributed.place import Place


def batch_line(cfg: RunConfig, place: Place, training: Loader, steps: int) -> str:
    """What is trained on, and how a step takes it."""
    train = cfg.train_config
    items = "rows" if training.items == training.rows else f"of {training.items} packs"
    return (
        f"{training.rows} rows, {training.labels_total:,} trained tokens an epoch; a step takes {training.step_items} "
        f"{items} ({train.batch_size_training} x {training.accumulation} accumulated x {place.world_size} ranks); "
        f"{training.steps_per_epoch} steps an epoch, {steps} in all"
    )


def sharding_line(cfg: RunConfig, place: Place) -> str:
    """How the model is spread over the ranks."""
    fsdp = cfg.fsdp_config
    groups = fsdp.sharding_group_size, fsdp.replica_group_size
    _, shards = group_sizes(place.world_size, place.local_world_size, fsdp.sharding_strategy, *groups)
    home = ", shards in host memory" if fsdp.fsdp_cpu_offload and shards > 1 else ""
    if fsdp.fsdp_cpu_offload and not home and place.device.type == "cpu":
        home = f", and in host memory without {cfg.place('fsdp_config.fsdp_cpu_offload')} too"
    if place.world_size == 1:
        return f"one rank on {place.device}: the model is not sharded{home}"
    asked = "" if cfg.train_config.enable_fsdp else " (several ranks always shard; --enable_fsdp says so)"
    return f"{place.world_size} ranks on {place.device.type}: {fsdp.sharding_strategy}{home}{asked}"
