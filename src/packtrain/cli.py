"""argv -> RunConfig -> a command; our errors become one clean message and an exit code.

    main        the `packtrain` command
    train       llama-recipes' entry point: the same as `packtrain train`

Flags are read and checked before torch is imported, so that a typing error is answered in a second.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from packtrain import __version__
from packtrain.checkpoint.store import record_failure
from packtrain.configs.help import help_text
from packtrain.configs.parse import CONFIG_SUFFIXES, parse, parse_output_dir
from packtrain.configs.values import brief
from packtrain.errors import EXIT_DONE, PacktrainError, Reported, UserError

COMMANDS = {
    "train": "fine-tune; outside torchrun it starts the workers itself, one a GPU",
    "demo": "a real Llama learns to correct English on this machine, before and after",
    "data": "what a run would train on: rows, tokens, masks",
    "check": "the preflight of a run, alone",
    "verify": "proof on this machine that a run's numbers and its resume are right",
    "export": "a checkpoint, or a model and its adapter, as a folder that everybody can load",
    "generate": "text from a model, or a model and an adapter",
    "chat": "talk to them, turn by turn",
}
LATER = ("report",)
"""Commands of the plan that are not built yet."""

RUN_COMMANDS = ("train", "data", "check", "verify")
"""Commands that take a run's flags."""

SPEAK_SECONDS = 2.0
"""The first worker to end makes torchrun end the others: those with nothing to say wait for the one that has."""


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
        raise UserError(f"packtrain {command}: comes with a later version; there are {', '.join(COMMANDS)}")
    if command not in COMMANDS:
        raise UserError(_unknown(command))
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
            raise Reported(error.exit_code) from None
        root = parse_output_dir(rest) if command == "train" else None
        if root is not None:
            record_failure(Path(root), str(error))
        raise
    return int(importlib.import_module(f"packtrain.commands.{command}").run(cfg, rest))


def _unknown(command: str) -> str:
    """What to say of a first word that is no command."""
    if command.startswith("-") or command.endswith(CONFIG_SUFFIXES):
        return f"{brief(command)}: expected a command before it: packtrain train {brief(command)} ..."
    near = get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"packtrain {brief(command)}: no such command{hint or '; there are ' + ', '.join(COMMANDS)}"


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
    """One problem on the line, several below it; what another rank tells is left to it."""
    if isinstance(error, Reported):
        if "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(SPEAK_SECONDS)
    elif isinstance(error, UserError) and len(error.problems) > 1:
        print("packtrain: several things are wrong:", file=sys.stderr)
        for problem in error.problems:
            print(f"  - {problem}", file=sys.stderr)
    else:
        print(f"packtrain: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
