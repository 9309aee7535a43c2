"""`packtrain train`: the run that torchrun and llama-recipes' command line start too.

Outside torchrun it starts the workers, one a GPU; inside it is one (worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from packtrain.configs.run import RunConfig
from packtrain.distributed.launch import default_nproc, start_workers
from packtrain.distributed.place import launched


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Start the run that `argv` asks for; returns the exit code."""
    if not launched():
        nproc = cfg.train_config.nproc_per_node or default_nproc()
        if nproc > 1:
            return start_workers(["train", *argv], nproc)
    # who only starts workers need not wait for all that they import
    return int(import_module("packtrain.commands.worker").run(cfg))
