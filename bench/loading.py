"""Host memory of loading one checkpoint on several workers, three ways: `python -m bench.loading`; prints one table.

    packtrain           preflight and building.build, FULL_SHARD: each worker streams its own rows
    rank 0 loads        rank 0 holds the whole model, the others' is on meta; parameters are broadcast one by one
    every rank loads    each worker holds the whole model and keeps its rows of it

The second is what llama-recipes' --low_cpu_fsdp does, the third what it does without; both are written here with
packtrain's model, so that only the way of loading differs. In the third the workers take turns, each frees the model
before the next begins, and the figures are sums over workers: most machines could not hold all copies at once.

"Private" is anonymous and shared memory (RssAnon + RssShmem in /proc/PID/status), read every 2 ms from outside; "with
mapped files" is the kernel's own high-water mark of resident memory (VmHWM, reset first), which counts the page cache
of the mapped safetensors once in every worker that touches it. Each worker's figure is its peak while loading, less
what it had after imports and the process group, less its shards; the figures are summed over workers as if their peaks
came together.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from packtrain import building, log, preflight
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import expected_shapes, load_model
from packtrain.configs.parse import build as settings_of
from packtrain.configs.run import RunConfig
from packtrain.distributed.parallelize import local_rows, materialise, parallelize
from packtrain.distributed.place import Place
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM, blocks

GIB = 2**30
POLL_SECONDS = 0.002
BAR_GIB = 1.0
"""What packtrain's workers may take beyond their shards, all together."""

WIDTH = 2048
VOCABULARY = 32000
PRELOAD = ["packtrain.preflight", "torch.distributed.fsdp", "torch.distributed.tensor", "safetensors.torch"]


@dataclass(frozen=True)
class Loaded:
    """One worker's load, in bytes and seconds."""

    shards: int
    """Of the model's parameters, in this worker."""
    private: int
    """Private memory at its peak, less what was there before."""
    resident: int
    """The same of all resident memory, mapped files too."""
    seconds: float
    total: float
    """A sum over this worker's parameters: every way must load the same."""


def main() -> None:
    """Print the table; exit code 1 if packtrain's workers took more than `BAR_GIB` beyond their shards."""
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__)
    parser.add_argument("--gib", type=float, default=2.1, help="size of the checkpoint, bf16")
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packtrain-loading-") as folder:
        size = make_checkpoint(Path(folder), options.gib * GIB)
        found = {way: measure(way, Path(folder), options.workers) for way in WAYS}
    print(table(found, size))
    sums = {way: sum(worker.total for worker in loads) for way, loads in found.items()}
    if max(sums.values()) - min(sums.values()) > 1e-6:
        raise SystemExit(f"the ways did not load the same weights: {sums}")
    extra = sum(worker.private - worker.shards for worker in found["packtrain"])
    raise SystemExit(0 if extra <= BAR_GIB * GIB else 1)


def make_checkpoint(folder: Path, least: float, width: int = WIDTH, vocabulary: int = VOCABULARY) -> int:
    """A Llama of random bf16 weights of at least so many bytes, a file for each layer; returns their size."""
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    layers = 1
    while _bytes(described | {"num_hidden_layers": layers}) < least:
        layers += 1
    described["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(described))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in _shapes(described).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for number, (file, shapes) in enumerate(files.items()):
        drawn = torch.Generator().manual_seed(number)
        save_file(
            {
                name: torch.empty(shape).uniform_(-0.02, 0.02, generator=drawn).bfloat16()
                for name, shape in shapes.items()
            },
            folder / file,
            metadata={"format": "pt"},
        )
    places = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return _bytes(described)


def _shapes(described: dict[str, object]) -> dict[str, tuple[int, ...]]:
    config = LlamaConfig.from_dict(described, "config.json")
    return expected_shapes(LlamaForCausalLM(config, dtype=torch.bfloat16, device=torch.device("meta")))


def _bytes(described: dict[str, object]) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in _shapes(described).values())


def measure(way: str, folder: Path, workers: int, timeout: float = 900) -> list[Loaded]:
    """Load `folder` on so many gloo workers; what each took."""
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory() as meeting:
        for rank in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, way, folder, Path(meeting), rank, workers), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            found = _watch(processes, pipes, time.monotonic() + timeout)
            for process in processes:
                process.join(30)
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


def _watch(processes: list[BaseProcess], pipes: list[Connection], deadline: float) -> list[Loaded]:
    """Let all workers load once all are ready, and read their private memory until the last is done."""
    before = [pipe.recv() for pipe in pipes]
    peaks = list(before)
    for pipe in pipes:
        pipe.send("go")
    answers: dict[int, dict[str, float]] = {}
    while len(answers) < len(pipes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(pipes) - len(answers)} of {len(pipes)} workers did not finish")
        for ready in wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], POLL_SECONDS):
            rank = pipes.index(ready)  # type: ignore[arg-type]
            answers[rank] = pipes[rank].recv()
            peaks[rank] = max(peaks[rank], answers[rank].pop("private"))
        for rank, process in enumerate(processes):
            if rank not in answers:
                peaks[rank] = max(peaks[rank], private_bytes(process.pid))
    for pipe in pipes:
        pipe.send("look")
    sums = [pipe.recv() for pipe in pipes]
    return [
        Loaded(**answers[rank], private=peak - before[rank], total=sums[rank])  # type: ignore[arg-type]
        for rank, peak in enumerate(peaks)
    ]


_SEEN = [0]
"""The most that a worker saw of its own private memory: a whole model may come and go between looks from outside."""


def _see() -> None:
    _SEEN[0] = max(_SEEN[0], private_bytes(os.getpid()))


def private_bytes(pid: int | None) -> int:
    """Resident memory of a process that is no file's."""
    status = _status(pid)
    return status["RssAnon"] + status["RssShmem"]


def _status(pid: int | None) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _work(pipe: Connection, way: str, folder: Path, meeting: Path, rank: int, workers: int) -> None:
    """The life of one worker."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive who started it
    torch.set_num_threads(1)
    log.quiet()
    store = dist.FileStore(str(meeting / "store"), workers)
    place = Place(
        rank=rank,
        world_size=workers,
        local_rank=rank,
        local_world_size=workers,
        machine=0,
        device=torch.device("cpu"),
        store=store,
    )
    cfg = settings_of(
        model_name=str(folder),
        dataset="synthetic_dataset",
        synthetic_dataset={"rows": 16, "length": 16},
        run_validation=False,
        enable_fsdp=True,
        pure_bf16=True,
        output_dir=str(meeting / "out"),
    )
    inputs = preflight.inputs(cfg, place)
    place.join()
    dist.barrier()
    gc.collect()
    before = _status(os.getpid())["VmRSS"]
    pipe.send(private_bytes(os.getpid()))
    pipe.recv()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    began = time.monotonic()
    model = WAYS[way](cfg, inputs, place)
    seconds = time.monotonic() - began
    status = _status(os.getpid())
    rows = [local_rows(parameter)[0] for parameter in model.parameters()]
    pipe.send(
        {
            "shards": sum(row.nbytes for row in rows),
            "private": max(_SEEN[0], private_bytes(os.getpid())),
            "resident": status["VmHWM"] - before,
            "seconds": seconds,
        }
    )
    pipe.recv()  # what is computed from here on is no part of loading
    pipe.send(sum(row.sum(dtype=torch.float64).item() for row in rows))
    dist.barrier()
    dist.destroy_process_group()


def _sharded(cfg: RunConfig, inputs: building.Inputs, place: Place) -> LlamaForCausalLM:
    """The model as packtrain shards it, with memory and no values."""
    model = LlamaForCausalLM(inputs.model_config, dtype=torch.bfloat16, device=torch.device("meta"))
    materialise(model, parallelize(model, blocks(model), place, cfg.fsdp_config.sharding_strategy, recompute=False))
    return model


def _whole(inputs: building.Inputs) -> LlamaForCausalLM:
    assert inputs.weights is not None
    model = LlamaForCausalLM(inputs.model_config, dtype=torch.bfloat16, device=torch.device("cpu"))
    load_model(model, HfFolder(inputs.weights.path))
    _see()
    return model


@torch.no_grad()
def _rank_0_loads(cfg: RunConfig, inputs: building.Inputs, place: Place) -> LlamaForCausalLM:
    whole = dict(_whole(inputs).named_parameters()) if place.rank == 0 else {}
    model = _sharded(cfg, inputs, place)
    for name, parameter in model.named_parameters():
        tensor = whole.pop(name).detach() if whole else torch.empty(parameter.shape, dtype=parameter.dtype)
        dist.broadcast(tensor, 0)
        _keep(parameter, tensor)
    return model


@torch.no_grad()
def _every_rank_loads(cfg: RunConfig, inputs: building.Inputs, place: Place) -> LlamaForCausalLM:
    model = _sharded(cfg, inputs, place)
    for turn in range(place.world_size):
        if turn == place.rank:
            whole = dict(_whole(inputs).named_parameters())
            for name, parameter in model.named_parameters():
                _keep(parameter, whole[name])
            whole.clear()
        dist.barrier()
    return model


def _keep(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    assert isinstance(parameter, DTensor)
    local, first = local_rows(parameter)
    local.copy_(whole[first : first + len(local)])
    _see()


WAYS: dict[str, Callable[[RunConfig, building.Inputs, Place], LlamaForCausalLM]] = {
    "packtrain": building.build,
    "rank 0 loads": _rank_0_loads,
    "every rank loads": _every_rank_loads,
}


def table(found: dict[str, list[Loaded]], size: int) -> str:
    """Sums over workers, in GiB."""
    workers = len(found["packtrain"])
    rows = [
        f"a checkpoint of {size / GIB:.2f} GiB (bf16) on {workers} gloo workers; memory beyond their shards, in GiB",
        "",
        "| | private, all workers | private, the largest worker | with mapped files, all workers | seconds |",
        "|---|---|---|---|---|",
    ]
    for way, loads in found.items():
        private = [worker.private - worker.shards for worker in loads]
        resident = sum(worker.resident - worker.shards for worker in loads)
        figures = f"{sum(private) / GIB:.2f} | {max(private) / GIB:.2f} | {resident / GIB:.2f}"
        rows.append(f"| {way} | {figures} | {max(worker.seconds for worker in loads):.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
