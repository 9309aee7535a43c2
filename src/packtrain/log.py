"""Who speaks: rank 0, to standard error, in one style.

    say(text)       progress for people
    warn(text)      something the user will want to know
    once(text)      the same, said a single time in this process
    quiet()         every other rank's setting

Nothing a script needs is only here: that is in `run/metrics.jsonl` and `run/result.json`.
"""

from __future__ import annotations

import sys
from typing import TextIO

_state = {"speaks": True}
_said: set[str] = set()


def quiet(silent: bool = True) -> None:
    """Make this process silent (ranks other than 0) or let it speak again."""
    _state["speaks"] = not silent


def speaks() -> bool:
    """Whether this process prints."""
    return _state["speaks"]


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line if this process speaks."""
    if _state["speaks"]:
        print(text, file=stream or sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a line that asks for attention."""
    say(f"warning: {text}")


def once(text: str) -> None:
    """Print a line the first time it comes up in this process."""
    if text not in _said:
        _said.add(text)
        say(text)
