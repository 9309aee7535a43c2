"""One peer's training steps: what `python -m bench` starts for each, in a process of its own.

PEERS         name -> Peer: what it needs, what it is set to, and how it takes its steps
installed     what a peer misses, or None

All read the same Hugging Face folder and train LoRA on all linear layers, on the row of bench/same_row.py. Imports of
peers are in functions: each has the process to itself, and some change others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench import same_row

WARM_UP = 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Options = argparse.Namespace
"""model (folder), length, batch, rank, steps, lr."""


@dataclass(frozen=True)
class Peer:
    """A peer, or a way of using one."""

    modules: tuple[str, ...]
    settings: str
    """For the table."""

    run: Callable[[Options], dict[str, Any]]
    """Steps of options.batch rows -> `_figures`."""


def _transformers(options: Options, *, checkpointing: bool = False, liger: bool = False) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # noqa: PLC0415

        apply_liger_kernel_to_llama()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = LlamaForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa", device_map=device)
    settings = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=0.0, target_modules=LINEARS)
    model = get_peft_model(base, settings, autocast_adapter_dtype=False)  # adapters in bf16 too: a quarter faster
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return _steps(model, options)


def _unsloth(options: Options, *, checkpointing: bool) -> dict[str, Any]:
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1"}
    from unsloth import FastLanguageModel  # noqa: PLC0415

    base, _ = FastLanguageModel.from_pretrained(
        options.model, max_seq_length=options.length, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0,
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    return _steps(model, options, autocast=True)


def _steps(model: Any, options: Options, *, autocast: bool = False) -> dict[str, Any]:
    model.train()
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0, fused=True)
    ids = torch.tensor([same_row.ids()] * options.batch, device=device)
    losses: list[float] = []
    ends: list[float] = []
    for _ in range(options.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        ends.append(time.perf_counter())
    return _figures(losses, ends)


def _llama_cookbook(options: Options) -> dict[str, Any]:
    """Its own finetuning.main, as its command line calls it; a hook behind each optimizer step takes the time."""
    from llama_cookbook.finetuning import main  # noqa: PLC0415

    ends: list[float] = []

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as out:
        main(
            model_name=options.model,
            enable_fsdp=True,
            use_peft=True,
            use_fast_kernels=True,
            dataset="custom_dataset",
            batch_size_training=options.batch,
            context_length=options.length,
            num_epochs=1,
            max_train_step=options.steps,
            lr=options.lr,
            weight_decay=0.0,
            run_validation=False,
            save_model=False,
            save_metrics=True,
            num_workers_dataloader=0,
            output_dir=out,
            r=options.rank,
            lora_alpha=2 * options.rank,
            lora_dropout=0.0,
            target_modules=LINEARS,
            **{"custom_dataset.file": same_row.__file__},
        )
        (metrics,) = Path(out).glob("metrics_data_*.json")
        losses = json.loads(metrics.read_text(encoding="utf-8"))["train_step_loss"]
    return _figures(losses, ends)


def _figures(losses: list[float], ends: list[float]) -> dict[str, Any]:
    """Loss of each step, median seconds of a step after the first few, peak GiB (on a CPU: resident)."""
    times = [after - before for before, after in pairwise(ends)]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident
    return {"losses": losses, "seconds": statistics.median(times[WARM_UP - 1 :]), "memory": memory / 2**30}


_HF = ("transformers", "peft", "accelerate")
PEERS: dict[str, Peer] = {
    "transformers + peft": Peer(_HF, "sdpa, bf16 adapters", _transformers),
    "transformers + peft, checkpointing": Peer(
        _HF, "the same, gradient checkpointing", partial(_transformers, checkpointing=True)
    ),
    "liger": Peer((*_HF, "liger_kernel"), "transformers + peft on its kernels", partial(_transformers, liger=True)),
    "unsloth": Peer(("unsloth", "unsloth_zoo"), "no checkpointing", partial(_unsloth, checkpointing=False)),
    "unsloth, checkpointing": Peer(
        ("unsloth", "unsloth_zoo"), 'gradient checkpointing "unsloth"', partial(_unsloth, checkpointing=True)
    ),
    "llama-cookbook": Peer(
        ("llama_cookbook", "fire", "datasets"),
        "enable_fsdp, use_fast_kernels, its checkpointing",
        _llama_cookbook,
    ),
}


def installed(name: str) -> str | None:
    """Modules of a peer that are not installed, or None."""
    missing = [module for module in PEERS[name].modules if importlib.util.find_spec(module) is None]
    return ", ".join(missing) or None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True)
    for flag in ("length", "batch", "rank", "steps"):
        parser.add_argument(f"--{flag}", type=int, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps(PEERS[options.name].run(options)))
