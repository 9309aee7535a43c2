"""`packtrain demo`: a real Llama learns to correct English on this machine, before and after.

Real weights (SmolLM2-135M-Instruct), real sentences (examples/data), the entry point a user has. It measures the
validation loss and the share of validation sentences corrected exactly, before and after, and says how to go on.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from packtrain.commands.generate import complete, load
from packtrain.commands.smollm2 import fetch
from packtrain.data.render import grammar_prompt
from packtrain.distributed.launch import default_nproc, start_workers
from packtrain.errors import Fault, UserError

OUTPUT = Path("packtrain-out/demo")
DATA = Path(__file__).resolve().parents[3] / "examples" / "data"
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Corrections:
    """What a model made of the validation sentences."""

    texts: list[str]
    exact: int


def run(argv: list[str]) -> int:
    """The whole demo; `argv` holds further flags for the training, e.g. --num_epochs 1."""
    console = Console(stderr=True, highlight=False)
    train, validation = DATA / "grammar_train.csv", DATA / "grammar_validation.csv"
    if not train.exists():
        raise UserError(f"demo: {train} is missing; the demo runs from a clone of the repository (pip install -e .)")
    console.print("[bold]packtrain demo[/bold]: SmolLM2-135M-Instruct learns to correct English")
    model = fetch()
    console.print(f"weights    {model}\nsentences  {train}, {validation}")
    pairs = _pairs(validation)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(f"correcting {len(pairs)} validation sentences before the training ...")
    before = _correct(str(model), None, pairs, device)
    nproc = default_nproc() if torch.cuda.is_available() else 2
    code, _ = start_workers(["train", *_flags(model, train, validation), *argv], nproc)
    if code != 0:
        return code
    console.print(f"correcting {len(pairs)} validation sentences after it ...")
    after = _correct(str(model), str(OUTPUT / "best"), pairs, device)
    _report(console, pairs, before, after, str(model))
    return 0


def _flags(model: Path, train: Path, validation: Path) -> list[str]:
    return (
        f"--model_name {model} --use_peft --peft_method lora --dataset grammar_dataset "
        f"--grammar_dataset.train_split {train} --grammar_dataset.test_split {validation} "
        f"--output_dir {OUTPUT} --overwrite_output_dir --enable_fsdp --eval_first "
        "--batching_strategy padding --batch_size_training 8 --val_batch_size 16 --context_length 256 "
        "--num_epochs 2 --lr 1e-3 --lr_scheduler cosine --warmup_steps 5 "
        "--r 16 --lora_alpha 32 --lora_dropout 0 --target_modules all-linear"
    ).split()


def _pairs(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["input"], row["target"]) for row in csv.DictReader(file)]


def _correct(model_name: str, adapter: str | None, pairs: list[tuple[str, str]], device: torch.device) -> Corrections:
    model, tokenizer = load(model_name, adapter, device)
    prompts = [grammar_prompt({"input": source}) for source, _ in pairs]
    texts = complete(model, tokenizer, prompts, max_new_tokens=48, do_sample=False)
    texts = [text.strip() for text in texts]
    return Corrections(texts, sum(text == target for text, (_, target) in zip(texts, pairs, strict=True)))


def _eval_losses() -> tuple[float, float]:
    """(at step 0, the lowest afterwards), from the run's own file."""
    lines = [json.loads(line) for line in (OUTPUT / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if line.get("event") == "eval"}
    first = losses.pop(0, None)
    if first is None or not losses:
        raise Fault(f"{OUTPUT}/run/metrics.jsonl holds no evaluation before or after the training")
    return first, min(losses.values())


def _report(
    console: Console, pairs: list[tuple[str, str]], before: Corrections, after: Corrections, model_name: str
) -> None:
    first, best = _eval_losses()
    total = len(pairs)
    table = Table(title="What it learnt", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name)
    table.add_row("validation loss", f"{first:.4f}", f"{best:.4f} ({best / first - 1:+.0%})")
    table.add_row("corrected exactly", f"{before.exact} of {total}", f"{after.exact} of {total}")
    console.print(table)
    gained = [i for i in range(total) if after.texts[i] == pairs[i][1] != before.texts[i]]
    others = [i for i in range(total) if i not in gained]
    for i in (gained + others)[:SHOWN]:
        source, target = pairs[i]
        console.print(f"\n[dim]sentence[/dim]  {source}", markup=True)
        console.print("[dim]before  [/dim]  ", end="")
        console.print(_one_line(before.texts[i]), markup=False)
        console.print("[dim]after   [/dim]  ", end="")
        console.print(_one_line(after.texts[i]), markup=False)
        console.print("[dim]expected[/dim]  ", end="")
        console.print(target, markup=False)
    console.print(f"\nThe adapter: {OUTPUT} (last), {OUTPUT / 'best'} (lowest validation loss), in PEFT's format.")
    prompt = grammar_prompt({"input": "She go to school every days."}).replace("\n", "\\n")
    console.print("Talk to it:", end=" ")
    console.print(
        f'packtrain generate --model_name {model_name} --peft_model {OUTPUT / "best"} --prompt "{prompt}"', markup=False
    )
    console.print("Your own data: README.md, 'Carry on'.")


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:97] + "..."


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
