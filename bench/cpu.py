"""A LoRA step of packtrain beside one of transformers + PEFT on this machine's CPU: `python -m bench.cpu`.

Both are in one process, on the same weights and the same two rows, and take turns, so that what else the machine does
falls on both; the figure is the ratio, by the clock and by the process's CPU seconds. fp32, LoRA r8 on q and v, the
shape of SmolLM2-135M with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM as TheirModel

from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import load_model
from packtrain.data.collate import make_batch
from packtrain.data.tokens import Tokens
from packtrain.distributed.place import open_place
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.optim import Optimizer
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TARGETS = ("q_proj", "v_proj")
RANK, RATE = 8, 1e-4
WARM_UP = 2


def rows_of(length: int, answers: float) -> Tokens:
    """Two rows of about `length` random tokens, of which the last share is labelled."""
    generator = np.random.default_rng(0)
    lengths = [length - 12, length + 12]
    edges = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(SHAPE["vocab_size"], size=edges[-1]).astype(np.int32)
    labels = ids.copy()
    for start, size in zip(edges, lengths, strict=False):
        labels[start : start + int(size * (1 - answers))] = -100
    return Tokens(ids=ids, labels=labels, offsets=edges, numbers=np.arange(2), file="bench")


def theirs(rows: Tokens, folder: Path) -> Callable[[], float]:
    """A step of transformers + PEFT; its weights are left in `folder` before there are adapters."""
    torch.manual_seed(0)
    base = TheirModel(TheirConfig(**SHAPE))
    base.save_pretrained(folder)
    settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(TARGETS))
    model = get_peft_model(base, settings).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    width = int(np.diff(rows.offsets).max())
    ids, labels, mask = (torch.full((2, width), value) for value in (0, -100, 0))
    for row, (start, stop) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
        ids[row, : stop - start] = torch.from_numpy(rows.ids[start:stop].astype(np.int64))
        labels[row, : stop - start] = torch.from_numpy(rows.labels[start:stop].astype(np.int64))
        mask[row, : stop - start] = 1

    def step() -> float:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ours(rows: Tokens, folder: Path, place: Any) -> Callable[[], float]:
    """A step of packtrain on the weights in `folder`."""
    config = LlamaConfig.from_dict({"model_type": "llama", **SHAPE})
    model = LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("cpu"))
    lora.install(model, LoraSettings(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=TARGETS))
    load_model(model, HfFolder(folder))
    lora.initialise(model, 0)
    model.train()
    optimizer = Optimizer(trainable(model), lr=RATE)
    batch = make_batch(rows, [np.arange(2)], seed=0, step=1, pad_id=0, width=int(rows.offsets[-1]))

    def step() -> float:
        agreed = step_vector([batch], False, place.device)
        report = train_step(model, [batch], agreed, optimizer, place, clip=None, memory=lambda: 0.0)
        return report.loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, about")
    parser.add_argument("--answers", type=float, default=0.4, help="share of a row's tokens that have labels")
    parser.add_argument("--steps", type=int, default=12, help="of each")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = rows_of(options.length, options.answers)
    with tempfile.TemporaryDirectory() as folder, open_place() as place:
        steps = {"transformers + peft": theirs(rows, Path(folder)), "packtrain": ours(rows, Path(folder), place)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.steps):
            for name, step in steps.items():
                began = time.perf_counter(), time.process_time()
                losses[name].append(step())
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    for name, seconds in times.items():
        clock, cpu = (statistics.median(column) for column in zip(*seconds[WARM_UP:], strict=True))
        said = f"{clock:.3f} s a step, {cpu:.3f} s of CPU (medians); first loss {losses[name][0]:.5f}"
        print(f"{name}: {said}, last {losses[name][-1]:.5f}")
    for i, what in enumerate(("by the clock", "by CPU seconds")):
        pairs = zip(*(times[name][WARM_UP:] for name in steps), strict=True)
        print(f"ratio {what}, median over the pairs: {statistics.median(a[i] / b[i] for a, b in pairs):.2f}")
    first = [found[0] for found in losses.values()]
    if abs(first[0] - first[1]) > 1e-4 * first[0]:
        raise SystemExit("the first losses differ: these are not the same computation")


if __name__ == "__main__":
    main()
