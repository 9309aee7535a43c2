"""Things small enough to fine-tune in a test: a tokenizer, Llamas of two layers, adapters, rows, a run's flags.

    tokenizer()                 byte-level, trained on CORPUS; `extra` tokens on top
    model(folder, ...)          transformers' own LlamaForCausalLM with random weights, saved with that tokenizer
    adapter(folder, base, ...)  a LoRA that peft made of it and saved
    grammar(file, rows)         input,target; `alpaca` is its like
    flags(...)                  a run's command line

Any test module can `import tiny`: tests/ is on pytest's path.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "Correct this to standard English: he go home\n---\nCorrected: he goes home",
    "Summarize this dialog:\nAnn: hello there\n---\nSummary:\nAnn says hello",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
]
VOCABULARY = 384
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
"""A Llama of 123,000 parameters."""


def tokenizer(extra: int = 0) -> Any:
    """`VOCABULARY` tokens, of which <s>, </s> and <pad> are special, and `extra` more."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_tokens([f"<new{number}>" for number in range(extra)])
    return made


@cache
def _trained() -> str:
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytes_.train_from_iterator(CORPUS, trainer)
    return bytes_.to_str()


def model(folder: Path, *, shard_size: str = "5GB", with_tokenizer: bool = True, seed: int = 0, **config: Any) -> Path:
    """A Hugging Face folder; keywords are config.json's. Small `shard_size`s make several files and an index."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(SIZES | config))).save_pretrained(folder, max_shard_size=shard_size)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, **lora: Any) -> Path:
    """An adapter's folder: r 4 on q_proj and v_proj unless keywords of LoraConfig say otherwise; B is not zero."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 (two seconds that most tests do without)

    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    wrapped = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **(settings | lora))
    )
    wrapped.save_pretrained(folder)
    return folder


def pairs(count: int) -> list[tuple[str, str]]:
    """Sentences and their corrections, all different."""
    return [(f"he go home {number} time", f"He goes home {number} times.") for number in range(count)]


def grammar(file: Path, rows: Sequence[tuple[str, str]] | int = 8) -> Path:
    """A csv of grammar_dataset."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("input", "target"), *(pairs(rows) if isinstance(rows, int) else rows)])
    return file


def alpaca(file: Path, rows: int = 40) -> Path:
    """A json of alpaca_dataset; half of the rows have an input."""
    made = [
        {"instruction": f"Add {number} and 1.", "input": "quickly" * (number % 2), "output": str(number + 1)}
        for number in range(rows)
    ]
    file.write_text(json.dumps(made), encoding="utf-8")
    return file


def flags(**settings: Any) -> list[str]:
    """`--name value` of each setting; None leaves one out, a section's setting is written `section__name`."""
    words: list[str] = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name.replace('__', '.')}", str(value)]
    return words
