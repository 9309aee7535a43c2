"""One peer's training steps on random weights: what `python -m bench` starts for each, in a process of its own.

PEERS         name -> how it makes its model
installed     what a peer misses, or None
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3


def _transformers(config: dict[str, Any], rank: int, *, checkpointing: bool, liger: bool) -> Any:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # noqa: PLC0415

        apply_liger_kernel_to_llama()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**config), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(model, settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


PEERS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], int], Any]]] = {
    "transformers + peft": (
        ("transformers", "peft"),
        lambda config, rank: _transformers(config, rank, checkpointing=False, liger=False),
    ),
    "transformers + peft, checkpointing": (
        ("transformers", "peft"),
        lambda config, rank: _transformers(config, rank, checkpointing=True, liger=False),
    ),
    "liger": (
        ("transformers", "peft", "liger_kernel"),
        lambda config, rank: _transformers(config, rank, checkpointing=False, liger=True),
    ),
}
"""Name -> (modules it needs, model of a config.json's content and a rank)."""


def installed(name: str) -> str | None:
    """Modules of a peer that are not installed, or None."""
    missing = [module for module in PEERS[name][0] if importlib.util.find_spec(module) is None]
    return ", ".join(missing) or None


def measure(name: str, config: dict[str, Any], *, length: int, batch: int, rank: int, steps: int) -> dict[str, float]:
    """First loss, median seconds of a step after the first three, peak GiB (CUDA)."""
    model = PEERS[name][1](config, rank)
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    times: list[float] = []
    losses: list[float] = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, config["vocab_size"], (batch, length), generator=generator).to(device)
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {"loss": losses[0], "seconds": statistics.median(times[WARM_UP:]), "memory": memory}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    for flag in ("length", "batch", "rank", "steps"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    options = parser.parse_args()
    sizes = {flag: getattr(options, flag) for flag in ("length", "batch", "rank", "steps")}
    options.out.write_text(json.dumps(measure(options.name, json.loads(options.config.read_text()), **sizes)))
