"""Every command of golden/commands.txt is run, on as many workers as it says, and leaves the files that it promises.

home        a working directory as llama-recipes' users have it: their data sets' paths, a tiny model in models/
REFUSED     commands that may not run, with what is said: those that exclude each other, and what is not built yet
start       ranks from the forkserver, in torchrun's environment, through the command line
torchrun    the real one, for some
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import runpy
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import forkserver
from safetensors.torch import load_file
from torch.distributed import TCPStore

import tiny

ROOT = Path(__file__).resolve().parents[2]
FILE = (ROOT / "tests/golden/commands.txt").read_text(encoding="utf-8").splitlines()
LINES = list(dict.fromkeys(line for line in FILE if line and not line.startswith("#")))
REFUSED = {
    "--flop_counter --use_profiler": "--use_profiler: cannot go with --flop_counter",
}
"""Part of a command -> part of the sentence. A row goes when its work lands; until then this fails if it does."""

BY_TORCHRUN = [LINES[0], next(line for line in LINES if "pure_bf16" in line)]
PROMISED = {
    "--save_metrics": "save/model/metrics_data_0-*.json",
    "--use_profiler": "save/results/rank-1.*.pt.trace.json.gz",
    "--use_wandb": "wandb.json",
}
PATIENCE = 120

WANDB = """
import json
from types import SimpleNamespace

def init(**settings):
    def finish(exit_code):
        json.dump([settings["project"], exit_code], open("wandb.json", "w"))
    return SimpleNamespace(summary={}, log=lambda figures, step: None, finish=finish)
"""
FOO = """
def get_foo(dataset_config, tokenizer, split):
    rows = [tokenizer.encode(f"foo {number} bar", add_special_tokens=False) for number in range(8)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]

def get_custom_dataset(dataset_config, tokenizer, split):
    assert dataset_config.data_path == "foo.json"
    return get_foo(dataset_config, tokenizer, split)
"""


class Command(NamedTuple):
    """A line, read as a shell and torchrun would."""

    words: list[str]
    machines: int
    workers: int
    """On each machine."""
    entry: list[str]
    """Script, or module, and flags."""

    @classmethod
    def read(cls, line: str) -> Command:
        program, *rest = shlex.split(line)
        if program == "python":
            return cls(rest, 1, 1, rest[1:] if rest[0] == "-m" else rest)
        entry = rest.index("getting-started/finetuning/finetuning.py")
        options = dict(zip(rest[:entry:2], rest[1:entry:2], strict=True))
        return cls(rest, int(options["--nnodes"]), int(options["--nproc_per_node"]), rest[entry:])

    @property
    def flags(self) -> list[str]:
        return self.entry[1:]

    def value(self, flag: str, default: str = "") -> str:
        """What follows a flag."""
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default

    def folder(self) -> str:
        """Where results go."""
        root = self.value("--dist_checkpoint_root_folder")
        name = self.value("--model_name").replace("/", "--")
        return f"{root}/fine-tuned-{name}" if root else "save/model"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command's working directory has, made once."""
    folder = tmp_path_factory.mktemp("shared")
    for part in ("src/llama_cookbook/datasets/grammar_dataset", "models", "adapters", "examples"):
        (folder / part).mkdir(parents=True)
    tiny.model(folder / "models/8B")
    (folder / "models/70B").symlink_to("8B")
    tiny.adapter(folder / "adapters/lora", folder / "models/8B", r=8, lora_alpha=32, lora_dropout=0.05)
    sets = folder / "src/llama_cookbook/datasets"
    tiny.grammar(sets / "grammar_dataset/gtrain_10k.csv", 8)
    tiny.grammar(sets / "grammar_dataset/grammar_validation.csv", 3)
    tiny.alpaca(sets / "alpaca_data.json")
    (folder / "samsum.json").write_text(json.dumps([{"dialogue": "Ann: hello", "summary": "Ann says hello"}] * 6))
    toxic = [{"user_input": f"hello {n}", "toxicity": n % 2, "openai_moderation": "[['hate', 0.4]]"} for n in range(6)]
    (folder / "toxicchat.json").write_text(json.dumps(toxic))
    (folder / "examples/foo_dataset.py").write_text(FOO)
    (folder / "getting-started").symlink_to(ROOT / "getting-started")
    return folder


@pytest.fixture
def home(shared: Path, tmp_path: Path) -> Path:
    for entry in shared.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins/wandb.py").write_text(WANDB)
    return tmp_path


def one_rank(home: str, words: list[str], environment: dict[str, str]) -> None:
    """The life of one worker: what torchrun, or a plain shell, would have started."""
    os.environ.update(environment)
    os.chdir(home)
    sys.path.insert(0, f"{home}/stand-ins")
    log = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(log, "w", buffering=1)
    torch.set_num_threads(1)
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__")


def start(command: Command, home: Path) -> tuple[set[int], str]:
    """(exit codes, what was said) of a command's workers; the store is ours, as it is the agent's under torchrun."""
    world = command.machines * command.workers
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    context, processes = forkserver(), []
    for rank in range(world):
        environment: dict[str, str] = {}
        if command.words[0] == "--nnodes":
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank % command.workers),
                "LOCAL_WORLD_SIZE": str(command.workers),
                "GROUP_RANK": str(rank // command.workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        process = context.Process(target=one_rank, args=(str(home), command.entry, environment), daemon=True)
        process.start()
        processes.append(process)
    try:
        multiprocessing.connection.wait([process.sentinel for process in processes], PATIENCE)
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {process.exitcode or 0 for process in processes}, (home / "stderr").read_text()


def torchrun(command: Command, home: Path) -> tuple[int, str]:
    """(exit code, what was said) of a command under the real one, at a port of its choice."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.words],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stderr


def short(line: str) -> str:
    """A command's last words, which tell it from the others."""
    return line.removesuffix(" --dataset grammar_dataset").replace(" --output_dir save/model", "")[-60:]


def refusal(line: str) -> str | None:
    return next((sentence for part, sentence in REFUSED.items() if part in line), None)


@pytest.mark.parametrize("line", [line for line in LINES if not refusal(line) and line not in BY_TORCHRUN], ids=short)
def test_a_command_runs_and_leaves_what_it_promises(line: str, home: Path) -> None:
    command = Command.read(line)
    codes, said = start(command, home)
    assert codes == {0}, said
    check_files(command, home)
    check_words(command, said)


@pytest.mark.parametrize("line", [line for line in LINES if refusal(line)], ids=short)
def test_a_command_is_refused_in_a_sentence(line: str, home: Path) -> None:
    codes, said = start(Command.read(line), home)
    assert codes == {2}
    assert str(refusal(line)) in said
    assert len(said.splitlines()) == 1
    assert {path.name for path in home.glob("save/model/*")} <= {"run"}


@pytest.mark.parametrize("line", BY_TORCHRUN, ids=["lora", "full"])
def test_the_same_under_torchrun(line: str, home: Path) -> None:
    command = Command.read(line)
    code, said = torchrun(command, home)
    assert code == 0, said
    check_files(command, home)
    check_words(command, said)
    assert "Traceback" not in said


def test_every_row_of_refused_is_a_commands() -> None:
    assert [part for part in REFUSED if not any(part in line for line in LINES)] == []


def test_without_a_data_set_the_flag_that_helps_is_named(home: Path) -> None:
    """The guide's first command, word for word but for the model: llama-recipes takes samsum from the hub."""
    codes, said = start(Command.read(LINES[0].removesuffix(" --dataset grammar_dataset")), home)
    assert codes == {2}
    assert "knkarthick/samsum" in said
    assert "--samsum_dataset.train_split" in said


def check_files(command: Command, home: Path) -> None:
    root = home / command.folder()
    result: dict[str, Any] = json.loads((root / "run/result.json").read_text())
    assert (result["status"], result["reason"]) == ("done", None)
    assert len((root / "run/metrics.jsonl").read_text().splitlines()) >= result["step"] > 0
    assert (root / "run/config.yaml").exists()
    adapts = "--use_peft" in command.flags
    names = {"adapter_config.json", "adapter_model.safetensors"} if adapts else {"config.json", "model.safetensors"}
    folders = [root] if command.value("--run_validation") == "False" else [root, root / "best"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= names | {"tokenizer.json", "tokenizer_config.json"}
    assert (root / "best").exists() == (len(folders) == 2)
    steps = root if "--dist_checkpoint_root_folder" in command.flags else root / "checkpoints"
    assert (steps / f"step-{result['step']}" / "DONE").exists()
    assert [flag for flag, files in PROMISED.items() if flag in command.flags and not list(home.glob(files))] == []
    assert result.get("model_tflops", 0) > 0 or "--flop_counter" not in command.flags
    if "--freeze_layers" in command.flags:
        moved = moved_layers(home / "models/8B", root)
        assert moved == {1: True, 0: False}


def moved_layers(before: Path, after: Path) -> dict[int, bool]:
    """Layer -> whether all of its tensors changed; fails where only some did."""
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    found: dict[int, set[bool]] = {0: set(), 1: set()}
    for name in old:
        if ".layers." in name:
            found[int(name.split(".")[2])].add(not torch.equal(old[name], new[name]))
    assert all(len(kinds) == 1 for kinds in found.values())
    return {layer: kinds.pop() for layer, kinds in found.items()}


def check_words(command: Command, said: str) -> None:
    """One rank speaks, once; and what was asked for is what is said."""
    assert said.count("\ntrainable ") == 1
    strategy = "HYBRID_SHARD" if "--hsdp" in command.flags else command.value("--fsdp_config.sharding_strategy")
    if strategy:
        assert f"{command.machines * command.workers} ranks on cpu: {strategy}" in said
    if "--low_cpu_fsdp" in command.flags:
        assert "--low_cpu_fsdp: accepted, does nothing: weights are always streamed" in said
