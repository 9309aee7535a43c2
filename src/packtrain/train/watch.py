"""Who looks on while the loop steps: nobody, the FLOP counter (flops.py) or the profiler (profile.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from packtrain.batch import Batch


class Watch:
    """Nobody. Every rank has one, and calls it for every optimizer step."""

    def step(self, number: int, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """Around step `number` of the run over this rank's micro-batches, which are on the device."""
        return nullcontext()

    def finish(self) -> dict[str, Any]:
        """The steps are over: what was found, for result.json."""
        return {}
