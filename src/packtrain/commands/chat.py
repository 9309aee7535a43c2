"""`packtrain chat`: talk to a model, or a model and an adapter, turn by turn, through its chat template."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformers import set_seed

from packtrain.commands.generate import answer_all, default_device, load, sampling, templated
from packtrain.configs.flat import flat_help, parse_flat
from packtrain.configs.generation import GenerationConfig
from packtrain.errors import EXIT_DONE, UserError


def run(argv: Sequence[str]) -> int:
    """A conversation on the terminal; an empty line or the end of input ends it."""
    if {"--help", "-h"} & set(argv):
        print(flat_help("chat", GenerationConfig))
        return EXIT_DONE
    cfg = parse_flat(argv, GenerationConfig)
    if cfg.model_name is None:
        raise UserError("--model_name: missing; expected a Hugging Face folder or a hub id")
    model, tokenizer = load(cfg.model_name, cfg.peft_model, default_device())
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {cfg.model_name} has no chat template; use packtrain generate --prompt")
    set_seed(cfg.seed)
    messages: list[dict[str, str]] = []
    print("(an empty line ends the conversation)", file=sys.stderr)
    while said := _line():
        messages.append({"role": "user", "content": said})
        answer = answer_all(model, tokenizer, [templated(tokenizer, messages)], **sampling(cfg))[0].strip()
        messages.append({"role": "assistant", "content": answer})
        print(answer)
    return EXIT_DONE


def _line() -> str:
    """What the user types next; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
