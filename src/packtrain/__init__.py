"""Fine-tune Llama models on every GPU you have: fast, exact, and without losing work."""

from importlib import import_module
from typing import Any

__all__ = ["__version__", "finetune"]

__version__ = "0.1.0"


def finetune(**settings: Any) -> dict[str, Any]:
    """Fine-tune in this process and return what run/result.json holds.

    Takes the flags' names: bare (`lr=1e-4`), dotted (`**{"fsdp_config.pure_bf16": True}`) or nested
    (`lora_config={"r": 16}`). Starts no workers: under torchrun every process calls it. Raises
    `packtrain.errors.UserError` with everything that is wrong with settings, data or weights.
    """
    # torch is only loaded when a run is, so that flags can be checked without it
    result: dict[str, Any] = import_module("packtrain.commands.worker").finetune(**settings)
    return result
