"""Rows to prompts and answers, and those to token ids.

The prompts are llama-recipes' own, to the character. Prompt and answer are encoded apart, with no special tokens
added, as `bos_token + prompt` and `answer + eos_token`: so no merge crosses the join, the mask is exact, there is
one BOS and the end of sequence is learned. (llama-recipes encodes alpaca's two parts together, which lets its mask
shift; here all data sets go one way.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packtrain.data import toxicchat
from packtrain.errors import UserError

Values = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Template:
    """What a data set's rows must hold, and the prompt made of them."""

    columns: tuple[str, ...]
    """Must be there, as text."""

    optional: tuple[str, ...]
    """May be absent or null, which is the same as empty."""

    answer: str
    """The one of `columns` that is trained; it may not be empty."""

    prompt: Callable[[Values], str]

    turn: bool = False
    """The prompt is a user's turn and the answer an assistant's, marked as the tokenizer marks them."""


def grammar_prompt(row: Values) -> str:
    """llama-recipes' prompt of grammar_dataset."""
    return f"Correct this to standard English: {row['input']}\n---\nCorrected: "


def samsum_prompt(row: Values) -> str:
    """llama-recipes' prompt of samsum_dataset."""
    return f"Summarize this dialog:\n{row['dialogue']}\n---\nSummary:\n"


def alpaca_prompt(row: Values) -> str:
    """Stanford Alpaca's prompt, with or without an input."""
    if row["input"] == "":
        return (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{row['instruction']}\n\n### Response:"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:"
    )


TEMPLATES = {
    "grammar_dataset": Template(("input", "target"), (), "target", grammar_prompt),
    "samsum_dataset": Template(("dialogue", "summary"), (), "summary", samsum_prompt),
    "alpaca_dataset": Template(("instruction", "output"), ("input",), "output", alpaca_prompt),
    "llamaguard_toxicchat_dataset": Template(("user_input", "toxicity"), (), "toxicity", toxicchat.prompt, turn=True),
}

HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
TURNS = {
    "<|start_header_id|>": (HEADER.format("user"), f"<|eot_id|>{HEADER.format('assistant')}"),
    "": ("[INST] ", " [/INST] "),
}
"""A token of the vocabulary -> what stands before and after a user's turn: Llama 3's, else Llama 2's, plain text."""


class Encoder:
    """A tokenizer, used as llama-recipes uses it, many rows at a time; `turn` as in Template."""

    def __init__(self, tokenizer: Any, turn: bool = False) -> None:
        if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no eos_token, so a model could not learn where to "
                "stop: set eos_token in its tokenizer_config.json, or give another with --tokenizer_name"
            )
        self._tokenizer = tokenizer
        self._bos, self._bos_ids = self._special(tokenizer.bos_token, tokenizer.bos_token_id, first=True)
        self._eos, self._eos_ids = self._special(tokenizer.eos_token, tokenizer.eos_token_id, first=False)
        self._turn = ("", "")
        if turn:
            vocabulary = tokenizer.get_vocab()
            self._turn = next(around for token, around in TURNS.items() if not token or token in vocabulary)

    def _special(self, text: str | None, token: int | None, first: bool) -> tuple[str, list[int]]:
        """(text to join before encoding, ids to join after it): the text where it encodes to its id, else the id."""
        if text is None or token is None:
            return "", []
        probe = self._encode([f"{text}a" if first else f"a{text}"])[0]
        return (text, []) if probe[0 if first else -1] == token else ("", [token])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return found

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids of bos + prompt, ids of answer + eos) of each row."""
        begin, end = self._turn
        before = self._encode([self._bos + begin + prompt + end for prompt in prompts])
        after = self._encode([answer + self._eos for answer in answers])
        return [(self._bos_ids + prompt, answer + self._eos_ids) for prompt, answer in zip(before, after, strict=True)]
