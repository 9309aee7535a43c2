"""Text from a model, or a model and an adapter: `packtrain generate` and what the demo measures with.

    load        transformers' model and tokenizer, the adapter on top through peft
    complete    greedy or sampled continuations of many prompts, a batch at a time

Generation is transformers' and peft's work on purpose: what they read is what users deploy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model_name: str, peft_model: str | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) ready to generate: bf16 on a GPU, fp32 on a CPU. `peft_model` is an adapter's folder."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = peft_model if peft_model and (Path(peft_model) / "tokenizer_config.json").exists() else model_name
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype).to(device)
    if peft_model:
        model = PeftModel.from_pretrained(model, peft_model)
    return model.eval(), tokenizer


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], *, batch_size: int = 16, **sampling: Any) -> list[str]:
    """The continuation of each prompt, without special tokens. `sampling` goes to transformers' generate.

    Prompts are padded on the left, shortest first, so that a batch wastes little.
    """
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [begin + tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        block = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=model.device)
        out = model.generate(input_ids=block, attention_mask=mask, pad_token_id=pad, **sampling)
        for i, row in zip(chosen, out[:, width:], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers
