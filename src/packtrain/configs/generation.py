"""Settings of `packtrain generate` and `packtrain chat`: llama-recipes' inference flags."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """What to read, and how to choose the next token."""

    model_name: str | None = None
    """The model: a Hugging Face folder or a hub id."""

    peft_model: str | None = None
    """An adapter on top: a folder in PEFT's format, or a hub id."""

    prompt: str | None = None
    """The text to go on from; \\n in it is a new line. Without it, --prompt_file or standard input."""

    prompt_file: str | None = None
    """A file that holds the prompt, taken as it is."""

    conversation: str | None = None
    """A JSON file with a list of {"role", "content"} messages, answered through the model's chat template."""

    max_new_tokens: int = 100
    """At most so many tokens of answer."""

    do_sample: bool = True
    """Draw tokens by their probability; false takes the likeliest each time."""

    temperature: float = 1.0
    """Below 1 the likely tokens become likelier."""

    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""

    top_k: int = 50
    """Draw from so many of the likeliest tokens."""

    min_length: int | None = None
    """Prompt and answer together have at least so many tokens."""

    repetition_penalty: float = 1.0
    """Above 1 tokens that were there already become less likely."""

    length_penalty: float = 1.0
    """Above 0 longer answers win in beam search."""

    use_cache: bool = True
    """Keep keys and values of earlier tokens; without it every token costs the whole text again."""

    seed: int = 42
    """What the drawing begins from."""
