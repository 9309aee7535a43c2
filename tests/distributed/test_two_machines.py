"""Two machines: two agents of torchrun that meet at an address, and what examples/ has for Slurm and Kubernetes.

Slurm itself is in tests/slow/test_slurm.py; here srun and scontrol are stand-ins that do what its manual says of them,
one machine a job.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import column, lines

import packtrain
import tiny
from packtrain.configs.parse import parse

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "getting-started/finetuning/finetuning.py"
SLURM = ROOT / "examples/slurm.sbatch"
TRAIN_JOB = yaml.safe_load((ROOT / "examples/kubernetes.yaml").read_text(encoding="utf-8"))
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as on machines: the agents' store is not the workers'
}
PATIENCE = 120

SRUN = """\
#!{python}
import os, signal, subprocess, sys
from pathlib import Path

words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
task = subprocess.Popen(words)

def processes(parent):
    for child in Path(f"/proc/{{parent}}/task/{{parent}}/children").read_text().split():
        yield int(child)
        yield from processes(child)

def pass_on(number, frame):
    for process in list(processes(os.getpid())):
        os.kill(process, number)

signal.signal(signal.SIGUSR1, pass_on)
sys.exit(task.wait())
"""
SCONTROL = """\
#!/bin/bash
echo "$@" >> scontrol.said
if [ "$1" = show ]; then echo localhost; fi
"""
TORCHRUN = """\
#!/bin/bash
exec {python} -m torch.distributed.run "$@"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory with the repository's entry point and examples, a tiny model, and rows."""
    for name in ("examples", "getting-started"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny.model(tmp_path / "model")
    tiny.grammar(tmp_path / "rows.csv", 8)
    return tmp_path


def settings(home: Path, out: str, batch: int) -> dict[str, Any]:
    return {
        "model_name": str(home / "model"),
        "use_peft": True,
        "dataset": "grammar_dataset",
        "train_split": str(home / "rows.csv"),
        "test_split": str(home / "rows.csv"),
        "batching_strategy": "padding",
        "batch_size_training": batch,
        "num_epochs": 2,
        "lr": 0.01,
        "output_dir": str(home / out),
    }


def results(home: Path, out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / out / "run/result.json").read_text(encoding="utf-8"))
    return found


def test_two_agents_run_one_run(home: Path) -> None:
    """One worker each, another machine's as far as they know; the same numbers as one process with that batch."""
    words = tiny.flags(**settings(home, "two", 2), enable_fsdp=True)
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "7"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    agents = [
        subprocess.Popen([*torchrun, "--node_rank", rank, ENTRY, *words], cwd=home, env=ENVIRONMENT, stderr=log)
        for rank, log in (("0", (home / "agent-0").open("w")), ("1", (home / "agent-1").open("w")))
    ]
    codes = ended(agents)
    said = (home / "agent-0").read_text() + (home / "agent-1").read_text()
    assert codes == [0, 0], said
    assert said.count("2 ranks on cpu: FULL_SHARD") == 1
    packtrain.finetune(**settings(home, "one", 4))
    one, two = lines(home / "one"), lines(home / "two")
    for key in ("loss", "grad_norm", "eval_loss", "tokens"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-5)
    assert results(home, "two")["status"] == "done"
    assert (home / "two/adapter_model.safetensors").exists()


def ended(processes: Sequence[subprocess.Popen[Any]]) -> list[int]:
    """Exit codes; nobody is left, whatever happens."""
    try:
        return [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


# examples/slurm.sbatch


def test_slurms_script_is_one(tmp_path: Path) -> None:
    text = SLURM.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", SLURM], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.MULTILINE)
    assert dict(options).items() >= {"nodes": "2", "ntasks-per-node": "1", "signal": "B:TERM@120"}.items()
    assert text.index("\n#SBATCH") < text.index("\nMODEL="), "after a command Slurm reads no more of them"
    command = re.search(r"^srun (.*?) &$", text.replace("\\\n", ""), flags=re.MULTILINE)
    assert command
    check_command(shlex.split(command[1]))


def check_command(words: list[str]) -> None:
    """torchrun is told where to meet, and packtrain nothing that it does not know."""
    at, entry = words.index("torchrun") + 1, words.index(ENTRY)
    options = dict(zip(words[at:entry:2], words[at + 1 : entry : 2], strict=True))
    assert options.keys() >= {"--nnodes", "--nproc_per_node", "--rdzv_endpoint", "--rdzv_id"}
    assert (options["--rdzv_backend"], options["--max_restarts"]) == ("c10d", "0")
    cfg = parse([word for word in words[entry + 1 :] if word != "$@"])
    assert (cfg.train_config.enable_fsdp, cfg.fsdp_config.sharding_strategy) == (True, "HYBRID_SHARD")


def job(home: Path, try_: int) -> subprocess.Popen[bytes]:
    """The script as slurmd starts it, with rows and length of our own."""
    programs = home / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text.format(python=sys.executable) if name != "scontrol" else text)
        (programs / name).chmod(0o755)
    told = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    more = {"SLURM_GPUS_ON_NODE": "1", "SLURM_RESTART_COUNT": str(try_), "MODEL": str(home / "model"), "OUT": "out"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    flags = ["--max_train_step", "120", "--max_eval_step", "1", "--save_steps", "1000"]
    with (home / f"log-{try_}").open("w") as log:
        return subprocess.Popen(
            ["bash", "examples/slurm.sbatch", *flags], cwd=home, env=ENVIRONMENT | told | more | path, stderr=log
        )


def test_slurms_script_saves_requeues_and_goes_on(home: Path) -> None:
    first = job(home, 0)
    try:
        until = time.monotonic() + PATIENCE
        metrics = home / "out/run/metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert first.poll() is None, (home / "log-0").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert ended([first]) == [0], (home / "log-0").read_text()
    finally:
        first.kill()
    stopped = results(home, "out")
    assert (stopped["status"], "SIGUSR1" in stopped["reason"]) == ("stopped", True)
    assert (home / "scontrol.said").read_text().splitlines()[-1].startswith("requeue ")
    assert ended([job(home, 1)]) == [0], (home / "log-1").read_text()
    done = results(home, "out")
    assert (done["status"], done["step"]) == ("done", len(column(lines(home / "out"), "loss")))
    assert done["step"] > stopped["step"]
    assert done["resumed_from"].endswith(f"step-{stopped['step']}")
    assert sum("requeue" in line for line in (home / "scontrol.said").read_text().splitlines()) == 1


# examples/kubernetes.yaml


def test_the_train_job_is_one() -> None:
    assert (TRAIN_JOB["apiVersion"], TRAIN_JOB["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = TRAIN_JOB["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    (script,) = trainer["args"]
    subprocess.run([*trainer["command"][:1], "-n", "-c", script], check=True)
    check_command(shlex.split(script))


def test_the_train_job_is_what_kubeflows_own_types_hold() -> None:
    """Each field has a place there, and none is lost on the way."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    assert models.TrainerV1alpha1TrainJob.from_dict(TRAIN_JOB).to_dict() == TRAIN_JOB


def test_the_pods_command_says_who_is_the_host() -> None:
    (script,) = TRAIN_JOB["spec"]["trainer"]["args"]
    pods = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "29500"}
    for rank, host in (("0", "is_host=1"), ("1", "is_host=0")):
        printed = script.replace("cd /packtrain && exec", "printf '%s\\n'")
        done = subprocess.run(
            ["bash", "-c", printed], env=pods | {"PET_NODE_RANK": rank}, capture_output=True, text=True, check=True
        )
        assert {host, "a:29500", "2", "8"} <= set(done.stdout.splitlines())
