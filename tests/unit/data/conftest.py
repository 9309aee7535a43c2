"""A small byte-level tokenizer, and the data sets' sections as plain namespaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Correct this to standard English: he go home\n---\nCorrected: he goes home",
    "Summarize this dialog:\nAnn: hello there\n---\nSummary:\nAnn says hello",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
]


def build_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def make_tokenizer() -> Any:
    return build_tokenizer


@pytest.fixture
def section() -> Any:
    """A data set's section with the given fields."""
    return SimpleNamespace
