"""`packtrain verify FLAGS`: the user's own proof, on their model, data and machine, of the run that FLAGS would be.

    numbers     one step of the run, as its flags say, against a plain fp32 reference (verify_numbers.py)
    resume      a run that was stopped and goes on, against one that was not, bit by bit (verify_resume.py)

It starts workers as `packtrain train` does. Exit code 0 if everything is within its bound, 1 if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from packtrain.checkpoint.places import output_root
from packtrain.configs.run import RunConfig
from packtrain.distributed import parent
from packtrain.train.interrupt import Interrupt


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Verify the run that `argv` asks for; returns the exit code."""
    parent.follow()
    train = cfg.train_config
    with Interrupt(train.grace_seconds) as interrupt:
        if not import_module("packtrain.distributed.place").launched():
            launch = import_module("packtrain.distributed.launch")
            nproc = train.nproc_per_node or launch.default_nproc()
            if nproc > 1:
                # ranks wait for rank 0, which works at the reference alone: standing still is no fault here
                code, _ = launch.start_workers(["verify", *argv], nproc, grace=train.grace_seconds, hang_timeout=0.0)
                return int(code)
        worker = import_module("packtrain.commands.worker")
        result = worker.work(apart(cfg), interrupt, None, import_module("packtrain.commands.verify_run").run)
        return int(not result["ok"])


def apart(cfg: RunConfig) -> RunConfig:
    """The run in a folder of its own beside its real one, that tells nobody and is not evaluated."""
    root = output_root(cfg)
    train = replace(
        cfg.train_config,
        output_dir=str(root.with_name(f"{root.name}.packtrain-verify")),
        dist_checkpoint_root_folder=None,
        overwrite_output_dir=False,
        run_validation=False,
        save_model=True,
        save_steps=0,
        save_minutes=0.0,
        save_metrics=False,
        use_wandb=False,
        use_profiler=False,
        flop_counter=False,
        max_train_step=2 * cfg.train_config.verify_steps,
        num_epochs=2 * cfg.train_config.verify_steps,
    )
    return replace(cfg, train_config=train)
