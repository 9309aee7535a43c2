"""`packtrain train`: the run that torchrun and llama-recipes' command line start too.

Outside torchrun it starts the workers, one a GPU; inside it is one (worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from packtrain.checkpoint.places import output_root
from packtrain.checkpoint.store import settle
from packtrain.configs.run import RunConfig
from packtrain.distributed import parent
from packtrain.train.interrupt import Interrupt


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Start the run that `argv` asks for; returns the exit code."""
    parent.follow()
    train = cfg.train_config
    with Interrupt(train.grace_seconds) as interrupt:
        # torch is loaded from here on: what takes seconds can be stopped, and a worker's parent may die meanwhile
        launch = import_module("packtrain.distributed.launch")
        launched = import_module("packtrain.distributed.place").launched()
        nproc = train.nproc_per_node or launch.default_nproc()
        if launched or (nproc == 1 and not train.max_restarts):
            # who only starts workers need not wait for all that they import
            return int(import_module("packtrain.commands.worker").run(cfg, interrupt))
    return _start(cfg, argv, nproc, launch)


def _start(cfg: RunConfig, argv: Sequence[str], nproc: int, launch: Any) -> int:
    train = cfg.train_config
    code, reason = launch.start_workers(
        ["train", *argv],
        nproc,
        grace=train.grace_seconds,
        max_restarts=train.max_restarts,
        hang_timeout=train.hang_timeout,
    )
    if reason is not None:
        settle(output_root(cfg), reason)
    return int(code)
