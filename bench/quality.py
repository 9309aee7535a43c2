"""What a float8 base costs: the same run with and without it, or the same gradients; prints a table.

    python -m bench.quality --model FOLDER --train CSV --validation CSV
                                    `packtrain train` on rows of input and target, a pair of runs a seed: the losses
    python -m bench.quality --cosine FOLDER|CONFIG [--train CSV]
                                    the adapters' gradients of one batch, layer by layer, as cosines

The other of a pair is bf16 on a GPU and fp32 on a CPU, where float8 is emulated and slow: few steps. For the cosines
all have the same weights (of CONFIG: random ones), the same rows (without CSV: random ids) and the same adapters, which
a few steps of the first form gave: fresh ones have B = 0 and no gradient of A. fp32 is among them where it fits.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import shapes
from bench.runs import Outcome, Train
from packtrain import building, log, preflight
from packtrain.configs.parse import build
from packtrain.distributed.place import Place, open_place
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

BOUND = 1.01
"""A float8 base's mean loss may be so many times the other's."""

FORMS: dict[str, dict[str, Any]] = {"bf16": {}, "fp32": {"mixed_precision": False}, "float8": {"quantization": "fp8"}}
"""Name -> settings. The first that there is makes the adapters of the cosines."""


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 1 if a run failed or float8 is worse by more than BOUND."""
    options = options_of(words)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.cosine:
            print(cosine_table(gradients(options, Path(folder)), options))
            return 0
        losses = train_pairs(options, Path(folder))
    print(loss_table(losses, options))
    return int(not within(losses))


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder of the losses' model")
    parser.add_argument("--train", help="csv, json or jsonl file with input and target")
    parser.add_argument("--validation", help="the same, to evaluate on at the end")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=12, help="rows of a step of the losses, each padded")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA on all linear layers")
    parser.add_argument("--beside", type=int, default=3, help="runs at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds a run may take")
    parser.add_argument("--cosine", help="Hugging Face folder, or config.json of a shape")
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a row; of a row of random ids")
    parser.add_argument("--rows", type=int, default=2, help="of a step of the cosines")
    parser.add_argument("--warm", type=int, default=3, help="steps that make the cosines' adapters")
    parser.add_argument("--folder", help="where runs and weights are written; by default the system's temporary folder")
    options = parser.parse_args(words)
    if not options.cosine and not (options.model and options.train and options.validation):
        parser.error("give --model, --train and --validation, or --cosine")
    return options


def baseline() -> str:
    """What a run without --quantization computes in on this machine."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def train_pairs(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, tuple[float, float] | str]]:
    """Seed -> form -> validation loss before and after, or why there is none."""
    pairs = [(seed, form) for seed in options.seeds.split(",") for form in (baseline(), "float8")]

    def one(pair: tuple[str, str]) -> tuple[float, float] | str:
        run = Train(folder / "-".join(pair), _flags(options, *pair), {"HF_HUB_OFFLINE": "1"})
        return _losses(run, run.wait(options.limit, lambda run: False), options.steps)

    with ThreadPoolExecutor(options.beside) as pool:
        found = list(pool.map(one, pairs))
    losses: dict[str, dict[str, tuple[float, float] | str]] = {}
    for (seed, form), loss in zip(pairs, found, strict=True):
        losses.setdefault(seed, {})[form] = loss
    return losses


def _flags(options: argparse.Namespace, seed: str, form: str) -> list[str]:
    files = ["--grammar_dataset.train_split", options.train, "--grammar_dataset.test_split", options.validation]
    flags = ["--model_name", options.model, "--dataset", "grammar_dataset", *files, "--batching_strategy", "padding"]
    flags += ["--batch_size_training", str(options.batch), "--val_batch_size", "16", "--context_length", "512"]
    flags += ["--max_train_step", str(options.steps), "--num_epochs", "1000", "--lr", str(options.lr), "--eval_first"]
    flags += ["--use_peft", "--lora_config.r", str(options.rank), "--lora_config.lora_alpha", str(2 * options.rank)]
    flags += ["--target_modules", "all-linear", "--lora_dropout", "0", "--save_model", "False", "--seed", seed]
    return [*flags, "--nproc_per_node", "1", *(["--quantization", "fp8"] if form == "float8" else [])]


def _losses(run: Train, outcome: Outcome, steps: int) -> tuple[float, float] | str:
    if outcome.failed is not None:
        return outcome.failed
    found = {line["step"]: float(line["eval_loss"]) for line in run.lines() if line.get("event") == "eval"}
    return (found[0], found[steps]) if {0, steps} <= found.keys() else f"no loss at step 0 and {steps}: {found}"


def within(losses: dict[str, dict[str, tuple[float, float] | str]]) -> bool:
    """Whether all runs ended well and float8's mean is no more than BOUND times the other's."""
    if any(isinstance(loss, str) for pair in losses.values() for loss in pair.values()):
        return False
    return ratio(losses) <= BOUND


def ratio(losses: dict[str, dict[str, Any]]) -> float:
    """Float8's mean validation loss after the last step over the other's."""
    plain, eight = (statistics.mean(pair[form][1] for pair in losses.values()) for form in (baseline(), "float8"))
    return float(eight / plain)


def loss_table(losses: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    plain = baseline()
    said = f"{options.batch} rows a step, lr {options.lr:g}, LoRA r{options.rank} on all linears, {shapes.card()}"
    rows = [f"Validation loss before and after {options.steps} steps; {said}; torch {torch.__version__}", ""]
    rows += [f"| seed | {plain}, before | after | float8, before | after | after, ratio |", "|---|---|---|---|---|---|"]
    for seed, pair in losses.items():
        failed = [f"{form}: {loss}" for form, loss in pair.items() if isinstance(loss, str)]
        if failed:
            rows.append(f"| {seed} | {'; '.join(failed)} | | | | |")
            continue
        cells = " | ".join(f"{loss:.4f}" for form in (plain, "float8") for loss in pair[form])
        rows.append(f"| {seed} | {cells} | {pair['float8'][1] / pair[plain][1]:.4f} |")
    if not any(isinstance(loss, str) for pair in losses.values() for loss in pair.values()):
        columns = [(form, i) for form in (plain, "float8") for i in (0, 1)]
        means = " | ".join(f"{statistics.mean(p[form][i] for p in losses.values()):.4f}" for form, i in columns)
        rows.append(f"| mean | {means} | {ratio(losses):.4f} ({'within' if within(losses) else 'beyond'} 1 %) |")
    return "\n".join(rows)


def gradients(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Tensor] | str]:
    """Form -> gradient of each adapter matrix, fp32 on the host, or why there is none."""
    log.quiet()
    found: dict[str, dict[str, Tensor] | str] = {}
    adapters: dict[str, Tensor] | None = None
    with open_place() as place:
        model = _weights(options.cosine, folder, place.device)
        for form in [form for form in FORMS if form != "bf16" or place.device.type == "cuda"]:
            try:
                adapters, found[form] = _gradients(form, model, options, place, adapters)
            except torch.OutOfMemoryError:
                found[form] = "does not fit"
            gc.collect()
            torch.cuda.empty_cache()
    return found


def _weights(name: str, folder: Path, device: torch.device) -> Path:
    """A Hugging Face folder: that of the name, or one of random weights of that shape."""
    if Path(name).is_dir():
        return Path(name)
    shapes.weights(folder / "weights", json.loads(Path(name).read_text(encoding="utf-8")), device)
    return folder / "weights"


def _gradients(
    form: str, model: Path, options: argparse.Namespace, place: Place, adapters: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapters, their gradients) of a form; without adapters it makes them."""
    data: dict[str, Any] = {"dataset": "grammar_dataset", "grammar_dataset": {"train_split": options.train}}
    if options.train is None:
        rows = options.rows * (options.warm + 1)
        data = {"dataset": "synthetic_dataset", "synthetic_dataset": {"rows": rows, "length": options.length}}
    cfg = build(
        model_name=str(model),
        **data,
        **FORMS[form],
        batching_strategy="padding",
        batch_size_training=options.rows,
        context_length=options.length,
        use_peft=True,
        lora_config={"r": options.rank, "lora_alpha": 2 * options.rank, "lora_dropout": 0.0},
        target_modules="all-linear",
        lr=options.lr,
        run_validation=False,
        seed=0,
    )
    inputs = preflight.inputs(cfg, place)
    module = building.build(cfg, inputs, place)
    loader, _ = building.loaders(cfg, inputs, place)
    optimizer, _ = building.optimizer_of(cfg, module, loader.steps_per_epoch, loader.steps_per_epoch)
    learning = trainable(module)
    for step in range(options.warm if adapters is None else 0):
        batches = [batch.to(place.device) for batch in loader.step(step)]
        agreed = step_vector(batches, False, place.device)
        train_step(module, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
    if adapters is not None:
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(adapters[name])
    for batch in loader.step(options.warm):
        (module(batch.to(place.device)) / batch.count).backward()
    made = [gradient.cpu() for gradient in optimizer.gradients()]
    return {n: p.detach().cpu() for n, p in learning.items()}, dict(zip(learning, made, strict=True))


def cosine(a: dict[str, Tensor], b: dict[str, Tensor], layer: int | None = None, matrix: str = "lora_") -> float:
    """Of all elements of a layer's, or of all layers', matrices whose names have `matrix`; in float64."""
    names = [n for n in a if matrix in n and (layer is None or _layer(n) == layer)]
    x, y = (torch.cat([side[name].double().flatten() for name in names]) for side in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


def _layer(name: str) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


def cosine_table(found: dict[str, dict[str, Tensor] | str], options: argparse.Namespace) -> str:
    made = {form: gradient for form, gradient in found.items() if not isinstance(gradient, str)}
    pairs = [(a, b) for b in ("fp32", "bf16") for a in ("float8", "bf16") if a in made and b in made and a != b]
    said = f"{options.rows} rows of at most {options.length} tokens, LoRA r{options.rank} on all linears"
    rows = [f"Cosines of the adapters' gradients after {options.warm} steps; {said}, {shapes.card()}"]
    rows += [f"{form}: {said}" for form, said in found.items() if isinstance(said, str)]
    rows += ["", f"| | {' | '.join(f'{a} to {b}' for a, b in pairs)} |", "|---" * (1 + len(pairs)) + "|"]
    layers = sorted({_layer(name) for gradient in made.values() for name in gradient})
    places = {"first layer": layers[0], "middle layer": layers[len(layers) // 2], "last layer": layers[-1], "all": None}
    for place, layer in places.items():
        for what, matrix in (("A", "lora_A"), ("B", "lora_B"), ("A and B", "lora_")):
            cells = " | ".join(f"{cosine(made[a], made[b], layer, matrix):.4f}" for a, b in pairs)
            rows.append(f"| {place}, {what} | {cells} |")
    norms = {form: math.hypot(*(float(g.double().norm()) for g in made[form].values())) for form in made}
    rows.append(f"| norm, ratio | {' | '.join(f'{norms[a] / norms[b]:.4f}' for a, b in pairs)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
