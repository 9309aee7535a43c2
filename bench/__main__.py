"""packtrain and its peers in turn, on this machine: `python -m bench`, or `make bench`; prints one table.

Each run is a process of its own, on the same random weights and the same row again and again (bench/same_row.py).
packtrain's figures are those of its run/metrics.jsonl; a peer's are made by bench/peers.py, and one that is not
installed is said to be. A row that is learned by heart shows what the training does: first losses, of the base alone,
must agree with the median within FIRST, and the last ones within LAST of how far it fell. If not, the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import same_row
from bench.peers import PEERS, WARM_UP, installed
from bench.runs import Train
from bench.shapes import LLAMA_8B, card, step_flops, weights
from packtrain.train.flops import peak

OURS = {
    "packtrain": "",
    "packtrain fp8": "--quantization fp8",
    "packtrain fp8, selective": "--quantization fp8 --activation_checkpointing selective",
}
"""Name -> flags, which the table shows."""

FIRST, LAST = 0.005, 0.15
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "flash-attn-4",
    "liger-kernel",
    "unsloth",
    "llama-cookbook",
)


def main() -> int:
    """Exit code: 1 if losses differ or nothing could be measured."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        shape = LLAMA_8B if options.config is None else json.loads(Path(options.config).read_text(encoding="utf-8"))
        model = Path(options.weights) if options.weights else folder / "weights"
        if model.exists():
            shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
        else:
            weights(model, shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            torch.cuda.empty_cache()
        # One row more than is used: llama-cookbook packs rows and drops what is left over.
        row = f"{options.length} {shape['vocab_size']} {options.batch * options.steps + 1}"
        os.environ[same_row.VARIABLE] = row
        runs: list[tuple[str, str, dict[str, Any]]] = []
        for name, settings in [*OURS.items(), *((name, peer.settings) for name, peer in PEERS.items())]:
            if not options.only or name in options.only.split(";"):
                run = _packtrain if name in OURS else _peer
                runs.append((name, settings, run(name, options, model, folder)))
                print(name, runs[-1][2], file=sys.stderr, flush=True)
    judge([found for _, _, found in runs])
    print(table(runs, options, shape))
    return int(not any("losses" in f for _, _, f in runs) or any(f.get("differs") for _, _, f in runs))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--config", help="a model's config.json; by default the 8B shape of Llama 3.1")
    parser.add_argument("--weights", help="a Hugging Face folder; made of random weights, and left, if it is not there")
    parser.add_argument("--folder", help="where all else is written; by default the system's temporary folder")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA on all linear layers")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="a choice of runs, with ; between them")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a run may take")
    return parser.parse_args()


def _packtrain(name: str, options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    flags = ["--model_name", str(model), "--nproc_per_node", "1"]
    flags += ["--dataset", "custom_dataset", "--custom_dataset.file", same_row.__file__]
    flags += ["--context_length", str(options.length), "--batch_size_training", str(options.batch)]
    flags += ["--max_train_step", str(options.steps), "--num_epochs", "1", "--lr", str(options.lr)]
    flags += ["--use_peft", "--lora_config.r", str(options.rank), "--lora_config.lora_alpha", str(2 * options.rank)]
    flags += ["--target_modules", "all-linear", "--lora_dropout", "0"]
    flags += ["--run_validation", "False", "--save_model", "False", *OURS[name].split()]
    run = Train(folder / name.replace(" ", "-"), flags, {"HF_HUB_OFFLINE": "1"})
    outcome = run.wait(options.timeout, lambda run: False)
    if outcome.failed is not None:
        return {"failed": outcome.failed[:100]}
    seconds = statistics.median(step["step_time"] for step in outcome.steps[WARM_UP:])
    losses = [step["loss"] for step in outcome.steps]
    return {"losses": losses, "seconds": seconds, "memory": outcome.steps[-1]["memory_gb"]}


def _peer(name: str, options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    if (missing := installed(name)) is not None:
        return {"failed": f"not installed: {missing}"}
    out = folder / f"{name.replace(' ', '-')}.json"
    command = [sys.executable, "-m", "bench.peers", name, "--model", str(model), "--out", str(out)]
    for flag in ("length", "batch", "rank", "steps", "lr"):
        command += [f"--{flag}", str(getattr(options, flag))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {options.timeout} s"}
    if done.returncode == 0:
        return dict(json.loads(out.read_text(encoding="utf-8")))
    said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return {"failed": said[-1].strip().replace("|", "/")[:100]}


def judge(found: list[dict[str, Any]]) -> None:
    """Marks what `differs`: a first loss beyond FIRST of the median, a last one beyond LAST of the median fall."""
    whole = [run for run in found if "losses" in run]
    if not whole:
        return
    first, last = (statistics.median(run["losses"][i] for run in whole) for i in (0, -1))
    for run in whole:
        apart = abs(run["losses"][-1] - last)
        run["differs"] = not (abs(run["losses"][0] - first) <= FIRST * first and apart <= LAST * abs(first - last))


def table(runs: list[tuple[str, str, dict[str, Any]]], options: argparse.Namespace, shape: dict[str, Any]) -> str:
    """Rows for name, settings, tokens/s, model TFLOP/s, their share of the card's bf16 peak, GiB, losses."""
    tokens = options.batch * options.length
    work, most = options.batch * step_flops(shape, options.length, options.rank) / 1e12, peak(card())
    size = f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}, vocabulary {shape['vocab_size']}"
    said = f"LoRA r{options.rank} on all linears, dropout 0, {options.batch} x {options.length} tokens, AdamW"
    said += f" at {options.lr:g}, {options.steps} steps"
    rows = [f"{said}; {size}; {card()}; {_versions()}", ""]
    rows += ["| | settings | tokens/s | TFLOP/s | MFU, bf16 | peak GiB | loss, first | last |", "|---" * 8 + "|"]
    for name, settings, found in runs:
        if "failed" in found:
            rows.append(f"| {name} | {settings} | {found['failed']} | | | | | |")
            continue
        tera = work / found["seconds"]
        share = "-" if most is None else f"{tera / most:.1%}"
        figures = f"{tokens / found['seconds']:,.0f} | {tera:.1f} | {share} | {found['memory']:.1f}"
        losses = f"{found['losses'][0]:.4f} | {found['losses'][-1]:.4f}{' (differs)' if found['differs'] else ''}"
        rows.append(f"| {name} | {settings} | {figures} | {losses} |")
    return "\n".join(rows)


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
