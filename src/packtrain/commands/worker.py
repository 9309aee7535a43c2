"""One rank of a run, from an open place to result.json.

run         inside `packtrain train`: the run and its last line
finetune    `packtrain.finetune`: the same run in this process, from Python
work        one rank
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from packtrain import finetuning, log, preflight
from packtrain.building import Inputs
from packtrain.configs.parse import build
from packtrain.configs.run import RunConfig
from packtrain.configs.support import remarks
from packtrain.distributed import parent
from packtrain.distributed.place import Place, describe, is_echo, launched, open_place
from packtrain.errors import EXIT_DONE, EXIT_FAULT, Fault, PacktrainError, Reported, Stopped, UserError
from packtrain.train.interrupt import Interrupt, StoppedEarly

Job = Callable[[RunConfig, Place, Inputs, Interrupt], dict[str, Any]]
"""What a rank does once it has joined the others."""


def run(cfg: RunConfig, interrupt: Interrupt) -> int:
    """The run of one rank; returns the exit code."""
    result = work(cfg, interrupt, cfg.train_config.hang_timeout)
    if log.speaks() and result.get("last"):
        best = f"; lowest eval_loss {result['best_eval_loss']:.4f}: {result['best']}" if result.get("best") else ""
        log.say(f"saved: {result['last']}{best}")
    return EXIT_DONE


def finetune(**settings: Any) -> dict[str, Any]:
    """The run of these settings in this process; returns result.json's content."""
    cfg = build(**settings)
    with Interrupt(cfg.train_config.grace_seconds) as interrupt:
        # a process that is not a worker is the user's own: standing still is no reason to end it
        return work(cfg, interrupt, cfg.train_config.hang_timeout if launched() else None)


def work(cfg: RunConfig, interrupt: Interrupt, hang_timeout: float | None, job: Job = finetuning.run) -> dict[str, Any]:
    """One rank's whole run, or another `job` with what it reads; the dict is the same on all of them.

    An error is raised as it is by the rank that reports it first, and as `Reported` by the others.
    """
    with open_place(hang_timeout=hang_timeout) as place:
        log.quiet(place.rank != 0)
        for line in remarks(cfg):
            log.say(line)
        if cfg.train_config.max_restarts and parent.AGENT in os.environ:
            log.say("--max_restarts: has no effect where torchrun starts the workers; give it to torchrun")
        try:
            found = preflight.inputs(cfg, place)
            place.join(host_collectives=cfg.fsdp_config.fsdp_cpu_offload)
            return job(cfg, place, found, interrupt)
        except Stopped as stopped:
            if place.rank == 0:
                raise
            raise Reported(stopped.exit_code) from None
        except StoppedEarly:
            raise
        except (Exception, SystemExit) as found:
            error = _quit(found) if isinstance(found, SystemExit) else found
            if not place.report(error):
                raise Reported(error.exit_code if isinstance(error, PacktrainError) else EXIT_FAULT) from None
            if is_echo(error):  # its traceback would only say where this rank waited
                raise Fault(f"rank {place.rank}: {describe(error)}") from None
            if error is not found:
                raise error from None
            if place.world_size > 1 and not isinstance(error, PacktrainError):
                print(f"packtrain: rank {place.rank}: {describe(error)}", file=sys.stderr)  # its traceback follows
            raise


def _quit(end: SystemExit) -> UserError:
    """What to say of code that ends the process: ours does not, so it is the user's."""
    where = traceback.extract_tb(end.__traceback__)[-1]
    return UserError(
        f"{where.filename}, line {where.lineno}: the process was ended there (sys.exit, code {end.code}); "
        "raise an exception, or return rows"
    )
