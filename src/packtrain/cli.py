"""argv -> RunConfig -> a command; our errors become one clean message and an exit code.

    main        the `packtrain` command
    train       llama-recipes' entry point: the same as `packtrain train`

Flags are read and checked before torch is imported, so that a typing error is answered in a second.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from packtrain import __version__
from packtrain.configs.help import help_text
from packtrain.configs.parse import parse
from packtrain.errors import EXIT_DONE, PacktrainError, UserError

COMMANDS = {
    "train": "fine-tune; outside torchrun it starts the workers itself, one a GPU",
    "demo": "a real Llama learns to correct English on this machine, before and after",
    "data": "what a run would train on: rows, tokens, masks",
    "check": "the preflight of a run, alone",
    "generate": "text from a model, or a model and an adapter",
    "chat": "talk to them, turn by turn",
}
LATER = ("export", "report", "verify")
"""Commands of the plan that are not built yet."""

RUN_COMMANDS = ("train", "data", "check")
"""Commands that take a run's flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `packtrain` command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except PacktrainError as error:
        _tell(error)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_DONE


def train(argv: Sequence[str]) -> int:
    """llama-recipes' finetuning.py: flags only."""
    return main(["train", *argv])


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in {"--help", "-h", "help"}:
        print(_overview())
        return EXIT_DONE
    if command == "--version":
        print(f"packtrain {__version__}")
        return EXIT_DONE
    if command in LATER:
        raise UserError(f"packtrain {command}: not built yet")
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"packtrain {command}: no such command{hint} Commands: {', '.join(COMMANDS)}")
    if command in RUN_COMMANDS:
        return _run_command(command, rest)
    return int(importlib.import_module(f"packtrain.commands.{command}").run(rest))


def _run_command(command: str, rest: list[str]) -> int:
    if {"--help", "-h"} & set(rest):
        print(help_text(command))
        return EXIT_DONE
    try:
        cfg = parse(rest)
    except UserError as error:
        # under torchrun every rank reads the same flags: the first one speaks for all
        if os.environ.get("RANK", "0") != "0":
            return error.exit_code
        raise
    return int(importlib.import_module(f"packtrain.commands.{command}").run(cfg, rest))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  packtrain {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "packtrain: fine-tune Llama models on every GPU you have: fast, exact, and without losing work.",
            "",
            *lines,
            "",
            "packtrain COMMAND --help lists a command's flags; --version says which packtrain this is.",
        ]
    )


def _tell(error: PacktrainError) -> None:
    """One problem on the line, several below it. An error without words has been told by another rank."""
    if isinstance(error, UserError) and len(error.problems) > 1:
        print(f"packtrain: {len(error.problems)} problems", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {problem}", file=sys.stderr)
    elif str(error):
        print(f"packtrain: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
