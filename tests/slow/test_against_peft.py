"""One fine-tune, twice: `packtrain train`, and a plain loop of transformers and PEFT. The losses must be the same.

    plain       the loop: SmolLM2-135M, JFLEG, LoRA; it gets packtrain's first adapter and order of rows, nothing else
    product     the same settings through the command, on one rank and on two
    tests       step by step, then the validation loss, then the saved adapter measured without packtrain

All of it in fp32 on the CPU. The figures that it prints are kept in docs/against_peft.md. Takes minutes.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed import HashStore
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from packtrain import building, preflight
from packtrain.checkpoint.adapter import save_adapter
from packtrain.commands.smollm2 import fetch
from packtrain.configs.parse import parse
from packtrain.distributed.place import Place

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS, VALIDATION_ROWS, BATCH, VALIDATION_BATCH = 240, 80, 4, 8
LR, WEIGHT_DECAY, CLIP = 5e-4, 0.01, 1.0
FLAGS = (
    "--use_peft --peft_method lora --dataset grammar_dataset --batching_strategy padding --context_length 256 "
    f"--num_epochs 1 --lr {LR} --lr_scheduler cosine --weight_decay {WEIGHT_DECAY} "
    f"--gradient_clipping --gradient_clipping_threshold {CLIP} --val_batch_size {VALIDATION_BATCH} --eval_first "
    "--r 8 --lora_alpha 16 --lora_dropout 0 --target_modules all-linear"
)
IGNORE = -100

Row = tuple[list[int], list[int]]
"""Token ids, and labels of the same length."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """JFLEG, cut: every tenth row to train on (a sentence has four in a row), the first ones to validate."""
    if not (DATA / "jfleg_train.csv").exists():
        pytest.skip(f"{DATA} has no jfleg_train.csv and jfleg_validation.csv")
    folder = tmp_path_factory.mktemp("jfleg")
    train, validation = folder / "train.csv", folder / "validation.csv"
    _copy(DATA / "jfleg_train.csv", train, slice(0, 10 * ROWS, 10))
    _copy(DATA / "jfleg_validation.csv", validation, slice(VALIDATION_ROWS))
    return train, validation


def _copy(source: Path, target: Path, rows: slice) -> None:
    with source.open(encoding="utf-8", newline="") as read, target.open("w", encoding="utf-8", newline="") as write:
        header, *found = csv.reader(read)
        csv.writer(write).writerows([header, *found[rows]])


def flags(files: tuple[Path, Path], out: Path, ranks: int) -> list[str]:
    """The run's command line. A step takes the same rows on any number of ranks."""
    train, validation = files
    return [
        *FLAGS.split(),
        *("--model_name", str(fetch()), "--output_dir", str(out)),
        *("--grammar_dataset.train_split", str(train), "--grammar_dataset.test_split", str(validation)),
        *("--nproc_per_node", str(ranks), "--batch_size_training", str(BATCH // ranks)),
    ]


@dataclass(frozen=True)
class Figures:
    """What both sides report of a fine-tune."""

    before: float
    """Validation loss, untrained."""
    losses: list[float]
    norms: list[float]
    after: float
    """Validation loss after the last step."""
    tokens_per_second: float
    """Of the median step, padding not counted."""

    def __str__(self) -> str:
        return (
            f"{self.before:.6f} | {self.losses[0]:.6f} | {self.norms[0]:.6f} | {self.losses[-1]:.6f} | "
            f"{self.after:.6f} | {self.tokens_per_second:.0f}"
        )


# The plain loop. It knows packtrain for its first adapter and its order of rows, and for nothing else.


@pytest.fixture(scope="module")
def plain(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """The fine-tune as one writes it with transformers and PEFT."""
    start = tmp_path_factory.mktemp("start")
    order = start_and_order(flags(files, start / "unused", 1), start)
    tokenizer = AutoTokenizer.from_pretrained(fetch())
    train, validation = (read(file, tokenizer) for file in files)
    base = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0, target_modules="all-linear")
    model = get_peft_model(base, lora)
    weights = [p for p in model.parameters() if p.requires_grad]
    first = load_file(start / "adapter_model.safetensors")
    assert len(first) == len(weights)
    assert not set_peft_model_state_dict(model, first).unexpected_keys
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(order))
    before = validation_loss(model, validation)
    losses, norms, speeds = [], [], []
    model.train()
    for rows in order:
        began = time.perf_counter()
        batch = padded([train[row] for row in rows])
        loss = model(**batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, CLIP).item())
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        speeds.append(batch["attention_mask"].sum().item() / (time.perf_counter() - began))
    return Figures(before, losses, norms, validation_loss(model, validation), statistics.median(speeds))


def start_and_order(argv: list[str], folder: Path) -> list[tuple[int, ...]]:
    """Save packtrain's untrained adapter in `folder`; return the rows of each of its steps."""
    cfg = parse(argv)
    inputs = preflight.examine(cfg).inputs
    alone = Place(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        machine=0,
        device=torch.device("cpu"),
        store=HashStore(),
    )
    save_adapter(building.build(cfg, inputs, alone), folder, config={})
    loader, _ = building.loaders(cfg, inputs, alone)
    return [batch.rows for step in range(loader.steps_per_epoch) for batch in loader.step(step)]


def read(file: Path, tokenizer: Any) -> list[Row]:
    """llama-recipes' prompt and mask: bos and prompt are read, answer and eos are learnt."""
    rows = []
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            prompt = f"{tokenizer.bos_token}Correct this to standard English: {row['input']}\n---\nCorrected: "
            answer = row["target"] + tokenizer.eos_token
            first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
            rows.append((first + second, [IGNORE] * len(first) + second))
    return rows


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right: what a transformers model takes."""
    width = max(len(ids) for ids, _ in rows)
    gaps = [width - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([ids + [0] * gap for (ids, _), gap in zip(rows, gaps, strict=True)]),
        "labels": torch.tensor([labels + [IGNORE] * gap for (_, labels), gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
    }


@torch.no_grad()
def validation_loss(model: Any, rows: list[Row]) -> float:
    """Mean over all labelled tokens."""
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows), VALIDATION_BATCH):
        batch = padded(rows[first : first + VALIDATION_BATCH])
        labelled = int((batch["labels"][:, 1:] != IGNORE).sum())
        total += model(**batch).loss.item() * labelled
        count += labelled
    return total / count


# The product, as a user starts it.


@dataclass(frozen=True)
class Run:
    """A finished run."""

    ranks: int
    out: Path
    figures: Figures


@pytest.fixture(scope="module", params=[1, 2], ids=["1rank", "2ranks"])
def product(request: pytest.FixtureRequest, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`packtrain train` in processes of its own."""
    ranks: int = request.param
    out = tmp_path_factory.mktemp(f"ranks{ranks}") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "packtrain", "train", *flags(files, out, ranks)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(ranks, out, _figures(out))


def _figures(out: Path) -> Figures:
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    evals = {line["step"]: line["eval_loss"] for line in lines if line.get("event") == "eval"}
    steps = [line for line in lines if "event" not in line]
    return Figures(
        before=evals[0],
        losses=[line["loss"] for line in steps],
        norms=[line["grad_norm"] for line in steps],
        after=evals[len(steps)],
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in steps),
    )


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print past pytest's capture: the figures are half of what this file is for."""

    def print_(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="")

    return print_


# What must hold.


def test_the_plain_loop_learns(plain: Figures, say: Callable[[str], None]) -> None:
    say("| | validation loss before | loss, step 1 | gradient norm, step 1 | loss, last step | after | tokens/s |")
    say(f"| transformers + PEFT | {plain} |")
    assert len(plain.losses) == ROWS // BATCH
    assert plain.after < 0.9 * plain.before, "without a gain, equal losses would prove nothing"


def test_first_steps_are_the_same(product: Run, plain: Figures) -> None:
    ours = product.figures
    assert ours.before == pytest.approx(plain.before, rel=1e-5)
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    assert ours.norms[0] == pytest.approx(plain.norms[0], rel=1e-4)
    assert ours.losses[:5] == pytest.approx(plain.losses[:5], rel=1e-3)
    assert ours.losses[:5] != pytest.approx(plain.losses[1:6], rel=1e-2), "rows in another order would be noticed"


def test_validation_loss_is_the_same(product: Run, plain: Figures, say: Callable[[str], None]) -> None:
    ours = product.figures
    apart = max(abs(a / b - 1) for a, b in zip(ours.losses, plain.losses, strict=True))
    say(f"| packtrain, {product.ranks} rank(s) | {ours} |")
    say(f"  validation loss {ours.after / plain.after - 1:+.6%} of PEFT's, step losses at most {apart:.4%} apart")
    assert ours.after == pytest.approx(plain.after, rel=0.005)


def test_saved_adapter_alone(product: Run, files: tuple[Path, Path], say: Callable[[str], None]) -> None:
    base = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(product.out)
    model = PeftModel.from_pretrained(base, product.out)
    measured = validation_loss(model, read(files[1], tokenizer))
    say(f"  saved adapter in transformers + peft {measured:.6f}, eval_loss {product.figures.after:.6f}")
    assert measured == pytest.approx(product.figures.after, abs=1e-4)
    assert measured != pytest.approx(product.figures.before, abs=0.01), "the adapter does something"
