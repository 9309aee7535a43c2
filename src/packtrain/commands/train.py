"""`packtrain train`: the run that torchrun and llama-recipes' command line start too.

run         outside torchrun: start the workers, one a GPU; inside: be one
finetune    the same run in this process, from Python
work        one rank, from an open place to result.json
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packtrain import finetuning, log, preflight
from packtrain.configs.parse import build
from packtrain.configs.run import RunConfig
from packtrain.configs.support import remarks
from packtrain.distributed.launch import default_nproc, start_workers
from packtrain.distributed.place import launched, open_place
from packtrain.errors import EXIT_DONE, EXIT_FAULT, PacktrainError, Stopped
from packtrain.train.interrupt import Interrupt


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Start the run that `argv` asks for; returns the exit code."""
    if not launched():
        nproc = cfg.train_config.nproc_per_node or default_nproc()
        if nproc > 1:
            return start_workers(["train", *argv], nproc)
    result = work(cfg)
    if log.speaks() and result.get("last"):
        best = f"; lowest eval_loss {result['best_eval_loss']:.4f}: {result['best']}" if result.get("best") else ""
        log.say(f"saved: {result['last']}{best}")
    return EXIT_DONE


def finetune(**settings: Any) -> dict[str, Any]:
    """`packtrain.finetune`: the run of these settings in this process; returns result.json's content."""
    return work(build(**settings))


class Reported(PacktrainError):
    """An error whose message is out already, by the rank that met it first; says nothing, keeps the exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def work(cfg: RunConfig) -> dict[str, Any]:
    """One rank's whole run; the dict is the same on all of them.

    An error is raised as it is by the rank that reports it first, and as `Reported` by the others.
    """
    with Interrupt() as interrupt, open_place() as place:
        log.quiet(place.rank != 0)
        for line in remarks(cfg):
            log.say(line)
        try:
            found = preflight.inputs(cfg, place)
            place.join()
            return finetuning.run(cfg, place, found, interrupt)
        except Stopped as stopped:
            if place.rank == 0:
                raise
            raise Reported(stopped.exit_code) from None
        except Exception as error:
            if place.report(error):
                raise
            raise Reported(error.exit_code if isinstance(error, PacktrainError) else EXIT_FAULT) from None
