"""One section for each `--dataset`: where its rows are. Paths count from the working directory, as in llama-recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class SamsumDataset:
    """Dialogues and their summaries: `dialogue`, `summary`."""

    train_split: str = "train"
    """Rows to train on: a csv, json or jsonl file, or a split of data_path."""

    test_split: str = "validation"
    """Rows to evaluate on: a file, or a split of data_path."""

    data_path: str = "knkarthick/samsum"
    """The hub id of the data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarDataset:
    """Sentences and their corrections: `input`, `target`."""

    train_split: str = "src/llama_cookbook/datasets/grammar_dataset/gtrain_10k.csv"
    """Rows to train on: a csv, json or jsonl file."""

    test_split: str = "src/llama_cookbook/datasets/grammar_dataset/grammar_validation.csv"
    """Rows to evaluate on: a csv, json or jsonl file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlpacaDataset:
    """Instructions and their answers: `instruction`, `input`, `output`."""

    train_split: Literal["train", "val"] = "train"
    """Which part is trained on: train is all but the first 5 % of the rows, val is those."""

    test_split: Literal["train", "val"] = "val"
    """Which part is evaluated on."""

    data_path: str = "src/llama_cookbook/datasets/alpaca_data.json"
    """The file with all rows: json, jsonl or csv."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CustomDataset:
    """A Python function of the user's own that makes the rows."""

    file: str = "getting-started/finetuning/datasets/custom_dataset.py"
    """FILE.py or FILE.py:FUNCTION; FUNCTION (else get_custom_dataset) is called with this section, tokenizer, split."""

    train_split: str = "train"
    """The split to ask for when training."""

    test_split: str = "validation"
    """The split to ask for when evaluating."""

    data_path: str = ""
    """For the function's own use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaguardToxicchatDataset:
    """Messages and whether they are safe, as Llama Guard answers: `user_input`, `toxicity`, `openai_moderation`."""

    train_split: str = "train"
    """Rows to train on: a csv, json or jsonl file, or a split of data_path."""

    test_split: str = "test"
    """Rows to evaluate on: a file, or a split of data_path."""

    data_path: str = "lmsys/toxic-chat"
    """The hub id of the data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticDataset:
    """Rows of random ids, to measure with: needs no tokenizer."""

    rows: int = 1024
    """How many rows to train on."""

    length: int = 512
    """Tokens of each row."""

    vocab_size: int = 0
    """Ids are drawn below this; 0 means the model's vocabulary."""

    seed: int = 42
    """Decides the ids."""
