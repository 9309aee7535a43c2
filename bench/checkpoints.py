"""How long a checkpoint holds up the training: `python -m bench.checkpoints`; prints one table.

Steps are taken in groups of `--every`. The first step of a group saves: nothing, or a checkpoint that is waited for, or
one that is written beside the training; in turn, so that a busy machine is busy for all. Two figures of each:

    at the step     its seconds, saving included, less the median of steps that do not save
    in all          the same of the whole group: what the writing takes from the steps after it is in it
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from packtrain import building, log, preflight
from packtrain.checkpoint.dcp import saving_group
from packtrain.checkpoint.dcp_run import Checkpoints
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.train.step import step_vector, train_step

WAYS = ("none", "sync", "async")
WARM_UP = 2
"""Groups of each way that are not counted."""


def main() -> None:
    options = options_of()
    times, size = measure(options)
    print(_table(times, size, options))


def measure(options: argparse.Namespace) -> tuple[dict[str, list[list[float]]], int]:
    """(way -> groups -> seconds of each step, bytes of a checkpoint)."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_config(options)), encoding="utf-8")
        ours, theirs = context.Pipe(duplex=False)
        ranks = [
            context.Process(target=_rank, args=(rank, Path(folder), options, theirs), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        times, size = ours.recv()
        for process in ranks:
            process.join()
    return times, size


def stalls(times: dict[str, list[list[float]]], way: str = "async") -> tuple[list[float], float]:
    """(what each save added to its step, the median step that does not save), in seconds."""
    median = statistics.median(seconds for group in times["none"] for seconds in group[1:])
    return [group[0] - median for group in times[way]], median


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: one GPU a rank")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=384)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row; 4 rows a step of a rank")
    parser.add_argument("--every", type=int, default=10, help="steps of a group")
    parser.add_argument("--groups", type=int, default=40, help="of each way")
    parser.add_argument("--folder", help="where checkpoints are written; by default the system's temporary folder")
    return parser.parse_args(words)


def _config(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": options.hidden,
        "intermediate_size": 4 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(2, options.hidden // 64),
        "num_key_value_heads": max(2, options.hidden // 64),
        "vocab_size": options.vocabulary,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }


def _rank(rank: int, folder: Path, options: argparse.Namespace, pipe: Connection) -> None:
    log.quiet()
    torch.set_num_threads(1)
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = Place(
        rank=rank,
        world_size=options.ranks,
        local_rank=rank,
        local_world_size=options.ranks,
        machine=0,
        device=device,
        store=dist.FileStore(str(folder / "store"), options.ranks),
    )
    place.join(timeout=timedelta(minutes=5))
    times = _steps(place, folder, options)
    if rank == 0:
        newest = max((folder / "checkpoints").glob("step-*"), key=lambda path: path.stat().st_mtime)
        pipe.send((times, sum(path.stat().st_size for path in newest.iterdir())))
    dist.destroy_process_group()


def _steps(place: Place, folder: Path, options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Way -> groups -> seconds of each step, on this rank."""
    cfg = build(
        random_init=str(folder / "config.json"),
        dataset="synthetic_dataset",
        synthetic_dataset={"rows": 64, "length": options.length},
        batching_strategy="padding",
        run_validation=False,
        output_dir=str(folder / "out"),
    )
    inputs = preflight.inputs(cfg, place)
    model = building.build(cfg, inputs, place)
    loader, _ = building.loaders(cfg, inputs, place)
    optimizer, _ = building.optimizer_of(cfg, model, 1, 1)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        model,
        optimizer,
        place=place,
        group=saving_group(),
        adapter=False,
        config={},
        facts={"step_items": loader.step_items, "fingerprint": {}},
        kind="SHARDED_STATE_DICT",
    )
    groups: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    step = 0
    for _ in range(WARM_UP + options.groups):
        for way in WAYS:
            groups[way].append([])
            for first in (index == 0 for index in range(options.every)):
                step += 1
                began = time.perf_counter()
                batches = [batch.to(place.device) for batch in loader.step(step % loader.steps_per_epoch)]
                agreed = step_vector(batches, False, place.device)
                report = train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
                float(report.loss)
                if first and way != "none":
                    checkpoints.save({"step": step}, goes_on=True, wait=way == "sync")
                groups[way][-1].append(time.perf_counter() - began)
            checkpoints.settle()  # between groups, so that none writes into another's time
            dist.barrier(place.group)
    return {way: found[WARM_UP:] for way, found in groups.items()}


def _table(times: dict[str, list[list[float]]], size: int, options: argparse.Namespace) -> str:
    plain = [seconds for group in times["none"] for seconds in group[1:]]
    median = statistics.median(plain)
    lines = [
        f"{options.ranks} ranks, {options.device}, checkpoint of {size / 1e6:.1f} MB, "
        f"{options.groups} of each; a step is {1e3 * median:.1f} ms (p99 {1e3 * _percentile(plain, 99):.1f})",
        "",
        "| ms beyond the steps | at the step, p50 | p99 | in all, p50 | p99 |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        at = [group[0] - median for group in times[way]]
        whole = [sum(group) - median * len(group) for group in times[way]]
        figures = (_percentile(values, p) for values in (at, whole) for p in (50, 99))
        lines.append(f"| {way} | " + " | ".join(f"{1e3 * figure:.1f}" for figure in figures) + " |")
    return "\n".join(lines)


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


if __name__ == "__main__":
    main()
