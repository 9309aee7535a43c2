"""`packtrain check FLAGS`: the preflight of a run, alone; exit code 0 if the run could start."""

from __future__ import annotations

from collections.abc import Sequence

from packtrain import log, preflight
from packtrain.configs.run import RunConfig
from packtrain.errors import EXIT_DONE


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Examine all that the run would read. Raises UserError with every problem."""
    found = preflight.examine(cfg)
    for line in found.lines():
        log.say(line)
    log.say("nothing is wrong: the run can start")
    return EXIT_DONE
