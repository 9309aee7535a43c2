"""packtrain and its peers in turn, on this machine: `python -m bench`, or `make bench`; prints one table.

Each run is a process of its own on the same random model and rows of random ids. packtrain's figures are those of its
run/metrics.jsonl; a peer's are made by bench/peers.py; peers that are not installed are left out, which is said. Random
weights are drawn anew by each, so first losses must agree within 1 %, and a run whose loss does not is marked.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import PEERS, installed

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

OURS = {
    "packtrain": [],
    "packtrain fp8": ["--quantization", "fp8"],
    "packtrain fp8, selective": ["--quantization", "fp8", "--activation_checkpointing", "selective"],
}
WARM_UP = 3


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA_8B) if options.config is None else Path(options.config).read_text())
        runs = [
            (name, _packtrain(name, flags, options, config)) for name, flags in OURS.items() if _wanted(name, options)
        ]
        for name in PEERS:
            if _wanted(name, options):
                missing = installed(name)
                runs.append(
                    (name, {"failed": f"not installed: {missing}"} if missing else _peer(name, options, config))
                )
        print(_table(runs, options, json.loads(config.read_text())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--config", help="a model's config.json; by default the 8B shape of Llama 3.1")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA on all linear layers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="a comma-separated choice of runs")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a run may take")
    return parser.parse_args()


def _wanted(name: str, options: argparse.Namespace) -> bool:
    return not options.only or name in options.only.split(",")


def _packtrain(name: str, flags: list[str], options: argparse.Namespace, config: Path) -> dict[str, Any]:
    out = config.parent / name.replace(" ", "-")
    command = [sys.executable, "-m", "packtrain", "train", "--random_init", str(config), "--nproc_per_node", "1"]
    command += ["--dataset", "synthetic_dataset", "--synthetic_dataset.rows", str(options.batch * options.steps)]
    command += ["--synthetic_dataset.length", str(options.length), "--context_length", str(options.length)]
    command += ["--batch_size_training", str(options.batch), "--use_peft", "--lora_config.r", str(options.rank)]
    command += ["--lora_config.lora_alpha", str(2 * options.rank), "--target_modules", "all-linear"]
    command += ["--lora_dropout", "0", "--num_epochs", "1", "--run_validation", "False", "--save_model", "False"]
    failed = _run([*command, "--output_dir", str(out), *flags], options.timeout)
    if failed is not None:
        return {"failed": failed}
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    # The last steps' times are not their own: they are read together, at the end.
    times = [line["step_time"] for line in steps][WARM_UP:-2]
    return {"loss": steps[0]["loss"], "seconds": statistics.median(times), "memory": steps[-1]["memory_gb"]}


def _peer(name: str, options: argparse.Namespace, config: Path) -> dict[str, Any]:
    out = config.parent / f"{name.replace(' ', '-')}.json"
    command = [sys.executable, "-m", "bench.peers", name, "--config", str(config), "--out", str(out)]
    for flag in ("length", "batch", "rank", "steps"):
        command += [f"--{flag}", str(getattr(options, flag))]
    failed = _run(command, options.timeout)
    return {"failed": failed} if failed is not None else json.loads(out.read_text())


def _run(command: list[str], timeout: int) -> str | None:
    """The last line a failed run said, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"took more than {timeout} s"
    said = (done.stderr or done.stdout).strip().splitlines() or [""]
    return None if done.returncode == 0 else said[-1][:100]


def flops(config: dict[str, Any], tokens: int, length: int) -> float:
    """Of a LoRA step: forward and input gradients of every matrix, attention 3.5 times its causal forward."""
    width, features = config["hidden_size"], config["intermediate_size"]
    heads, key_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layer = width * head * (2 * heads + 2 * key_heads) + 3 * width * features
    matrices = config["num_hidden_layers"] * layer + config["vocab_size"] * width
    return tokens * (4.0 * matrices + 3.5 * config["num_hidden_layers"] * 2 * length * heads * head)


def _table(runs: list[tuple[str, dict[str, Any]]], options: argparse.Namespace, config: dict[str, Any]) -> str:
    tokens = options.batch * options.length
    work = flops(config, tokens, options.length)
    expected = math.log(config["vocab_size"])
    losses = [found["loss"] for _, found in runs if "loss" in found]
    middle = statistics.median(losses) if losses else expected
    rows = [f"LoRA r{options.rank} on all linears, {options.batch} x {options.length} tokens; {_versions()}", ""]
    rows += ["| | tokens/s | TFLOP/s | peak GiB | first loss |", "|---|---|---|---|---|"]
    for name, found in runs:
        if "failed" in found:
            rows.append(f"| {name} | {found['failed']} | | | |")
            continue
        mark = "" if abs(found["loss"] - middle) <= 0.01 * middle else " (differs)"
        rate, tera = tokens / found["seconds"], work / found["seconds"] / 1e12
        rows.append(f"| {name} | {rate:,.0f} | {tera:.1f} | {found['memory']:.1f} | {found['loss']:.3f}{mark} |")
    return "\n".join(rows)


def _versions() -> str:
    found = []
    for name in ("torch", "triton", "transformers", "peft", "flash-attn-4", "liger-kernel"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
