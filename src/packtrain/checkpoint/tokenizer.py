"""A tokenizer from a Hugging Face folder, read by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from packtrain.checkpoint.hub import resolve
from packtrain.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""


def read_tokenizer(name: str, flag: str, *, config_is_right: bool = True) -> Any | None:
    """The tokenizer of a folder or hub id; None if there is none. Raises UserError, naming `flag`, if it is broken.

    transformers looks into config.json too. Where that is wrong, and said already, `config_is_right` keeps it away.
    """
    folder = resolve(name, flag)
    if not has_tokenizer(folder):
        return None
    config = None if config_is_right else PreTrainedConfig()
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # broken files raise every kind in transformers, and Exception itself in tokenizers
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{flag} {name}: its tokenizer cannot be read ({type(error).__name__}: {reason}); copy or download "
            "tokenizer.json and tokenizer_config.json again, or give another folder with --tokenizer_name"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's file is in the folder."""
    return any((folder / file).exists() for file in FILES)
