"""One rank of a run, from an open place to result.json.

run         inside `packtrain train`: the run and its last line
finetune    `packtrain.finetune`: the same run in this process, from Python
work        one rank
"""

from __future__ import annotations

from typing import Any

from packtrain import finetuning, log, preflight
from packtrain.configs.parse import build
from packtrain.configs.run import RunConfig
from packtrain.configs.support import remarks
from packtrain.distributed.place import open_place
from packtrain.errors import EXIT_DONE, EXIT_FAULT, PacktrainError, Reported, Stopped
from packtrain.train.interrupt import Interrupt


def run(cfg: RunConfig) -> int:
    """The run of one rank; returns the exit code."""
    result = work(cfg)
    if log.speaks() and result.get("last"):
        best = f"; lowest eval_loss {result['best_eval_loss']:.4f}: {result['best']}" if result.get("best") else ""
        log.say(f"saved: {result['last']}{best}")
    return EXIT_DONE


def finetune(**settings: Any) -> dict[str, Any]:
    """The run of these settings in this process; returns result.json's content."""
    return work(build(**settings))


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
            place.join(host_collectives=cfg.fsdp_config.fsdp_cpu_offload)
            return finetuning.run(cfg, place, found, interrupt)
        except Stopped as stopped:
            if place.rank == 0:
                raise
            raise Reported(stopped.exit_code) from None
        except Exception as error:
            if place.report(error):
                raise
            raise Reported(error.exit_code if isinstance(error, PacktrainError) else EXIT_FAULT) from None
