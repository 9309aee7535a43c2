"""What --flop_counter and --use_profiler ask for: the watch of a run."""

from __future__ import annotations

from pathlib import Path

from packtrain.configs.run import RunConfig
from packtrain.distributed.place import Place
from packtrain.model.llama import LlamaForCausalLM
from packtrain.train.flops import FlopCounter
from packtrain.train.profile import Profiler
from packtrain.train.watch import Watch


def watch_of(cfg: RunConfig, model: LlamaForCausalLM, place: Place, run_folder: Path, total_steps: int) -> Watch:
    """The one that was asked for, which check.py lets be one alone; profiles go to RUN_FOLDER/profile by default."""
    train = cfg.train_config
    if train.flop_counter:
        return FlopCounter(model, place, start=train.flop_counter_start, total_steps=total_steps)
    if train.use_profiler:
        return Profiler(Path(train.profiler_dir) if train.profiler_dir else run_folder / "profile", place)
    return Watch()
