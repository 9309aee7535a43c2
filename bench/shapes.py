"""Models by their shape alone, for benches: config.json's content, what a step of one costs, weights on a disk.

LLAMA_8B, LLAMA_70B, SMALL, TINY
step_flops                  model FLOPs of a row, as packtrain counts them
checkpoint                  a Hugging Face folder of random weights, as large as time and disk allow
weights                     the same whole, every layer of its own, with a tokenizer
card                        the name of what is measured on
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from packtrain.checkpoint.hf import expected_shapes
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings
from packtrain.train.flops import Cost, Work

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "initializer_range": 0.02,
}
"""The shape of Llama 3.1 8B."""

LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SMALL = LLAMA_8B | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
TINY = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
}

WRITERS = 8
DRAWN = 2**26 + 1
"""Numbers that are drawn, and repeated: odd, so that rows differ."""


def step_flops(shape: dict[str, Any], length: int, lora_rank: int | None) -> float:
    """Of one row of so many tokens, each but the first labelled; with LoRA on all linear layers, or all trained."""
    model = _on_meta(shape)
    if lora_rank is not None:
        settings = LoraSettings(r=lora_rank, lora_alpha=lora_rank, lora_dropout=0.0, target_modules="all-linear")
        lora.install(model, settings)
    return Cost.of(model).flops(Work(length, length - 1, length * (length + 1) // 2))


def checkpoint(folder: Path, shape: dict[str, Any], seconds: float) -> tuple[int, int]:
    """(layers, bytes) of what was written, bf16: all layers, or those that fit on the disk and into the time.

    All layers have the same numbers, which loading does not notice.
    """
    folder.mkdir(parents=True)
    until = time.monotonic() + seconds
    shapes = expected_shapes(_on_meta(shape | {"num_hidden_layers": 1}))
    block = torch.empty(DRAWN, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
    first = folder / "layer-0.safetensors"
    for file, of_layer in ((first, True), (folder / "rest.safetensors", False)):
        names = [name for name in shapes if name.startswith("model.layers.") == of_layer]
        save_file({name: _values(block, shapes[name]) for name in names}, file, metadata={"format": "pt"})
    room = int(0.9 * shutil.disk_usage(folder).free / first.stat().st_size)
    more = range(1, min(shape["num_hidden_layers"], 1 + room))
    with ThreadPoolExecutor(WRITERS) as pool:
        written = 1 + sum(pool.map(lambda layer: time.monotonic() < until and _again(first, layer), more))
    places = dict.fromkeys(shapes, "rest.safetensors")
    for name in (name for name in shapes if name.startswith("model.layers.0.")):
        places |= {name.replace(".0.", f".{n}.", 1): f"layer-{n}.safetensors" for n in range(written)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": written}))
    return written, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def weights(folder: Path, shape: dict[str, Any], device: torch.device) -> None:
    """Random bf16 weights of a shape, a file a layer, drawn on the device, and a tokenizer of as many words."""
    folder.mkdir(parents=True)
    files: dict[str, list[str]] = {}
    shapes = expected_shapes(_on_meta(shape))
    for name in shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"layer-{layer}.safetensors", []).append(name)

    def write(number: int, file: str) -> None:
        generator = torch.Generator(device).manual_seed(number)
        spread = shape.get("initializer_range", 0.02)
        drawn = {}
        for name in files[file]:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            drawn[name] = (tensor if tensor.dim() == 1 else tensor.normal_(0, spread, generator=generator)).cpu()
        save_file(drawn, folder / file, metadata={"format": "pt"})

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(len(files)), files))
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(shape | {"dtype": "bfloat16"}))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, shape["vocab_size"])}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def card() -> str:
    """The name of what is measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _again(first: Path, layer: int) -> bool:
    """The first layer's file again, under another layer's names; True."""
    with first.open("rb") as source, first.with_name(f"layer-{layer}.safetensors").open("wb") as target:
        size = int.from_bytes(source.read(8), "little")
        header = source.read(size).rstrip().replace(b"model.layers.0.", f"model.layers.{layer}.".encode())
        header = header.ljust(-(-len(header) // 8) * 8)
        target.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(source, target, 2**24)
    return True


def _values(block: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.Size(shape).numel()
    if len(shape) == 1:
        return torch.ones(shape, dtype=block.dtype)
    return block.repeat(-(-size // len(block)))[:size].view(shape).contiguous()


def _on_meta(shape: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig.from_dict(shape, "config.json")
    return LlamaForCausalLM(config, dtype=torch.bfloat16, device=torch.device("meta"))
