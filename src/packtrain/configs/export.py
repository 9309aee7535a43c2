"""Settings of `packtrain export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What to read, and how to write it."""

    checkpoint: str | None = None
    """A run's checkpoint: a step-N folder, or what holds such folders, of which the newest is taken."""

    model_name: str | None = None
    """The base model, a folder or a hub id: an adapter is merged into it; of a checkpoint, the tokenizer's place."""

    peft_model: str | None = None
    """A LoRA adapter to merge into --model_name: a folder in PEFT's format, or a hub id."""

    output_dir: str | None = None
    """Where the Hugging Face folder goes: a new or empty folder."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights written; auto is the dtype of those read: a checkpoint's training dtype, the base model's."""

    shard_bytes: int = 5_000_000_000
    """At most so many bytes a file; a larger tensor has one to itself."""
