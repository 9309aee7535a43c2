"""examples/slurm.sbatch on a real Slurm of one machine: started here, as two nodes, for this test alone.

    slurm       munged, slurmctld and two slurmd of a configuration in a temporary folder; ended by their process ids
    the test    the job trains on both nodes, is signalled before its time is up, saves, requeues itself, goes on, ends

Needs Debian's packages slurmctld, slurmd, slurm-client and munge; whose user runs it does not matter. Takes minutes.
Its last output is kept in docs/slurm.md.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
SBIN = "/usr/sbin"
STEPS = 500
PATIENCE = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None for name in PROGRAMS),
        reason="no Slurm here: apt-get install slurmctld slurmd slurm-client munge",
    ),
]

CONFIGURATION = """\
ClusterName=packtrain
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:1 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """The daemons, and what they need to be asked."""

    home: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of everything that talks to them."""
        return os.environ | {
            "SLURM_CONF": str(self.home / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}",
        }

    def start(self, *words: str) -> None:
        """A daemon in the foreground, a child of this process."""
        with (self.home / f"log-{len(self.daemons)}").open("wb") as log:
            self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def ask(self, *words: str, **more: Any) -> str:
        """What a command says."""
        done = subprocess.run(words, env=self.environment | more, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def cancel_all(self) -> None:
        """End every job, and wait until none of its processes is left to the daemons."""
        until = time.monotonic() + 30
        for words in (["scancel", "--user", getuser()], *[["squeue", "--noheader"]] * 60):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
            if time.monotonic() > until or (words[0] == "squeue" and not done.stdout.strip()):
                break
            time.sleep(0.5)

    def logs(self) -> str:
        """The last lines of each daemon."""
        return "\n".join("\n".join(log.read_text().splitlines()[-8:]) for log in sorted(self.home.glob("log-*")))

    def job(self, number: str) -> dict[str, str]:
        """scontrol's view of a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    """Both nodes are idle."""
    home = tmp_path / "slurm"
    home.mkdir(mode=0o755)
    (home / "state").mkdir()
    (home / "key").write_bytes(os.urandom(1024))
    (home / "key").chmod(0o600)
    host = socket.gethostname()
    nodes = (host, f"{host}-b")  # the first in the alphabet is where torchrun's agents meet: its name has to resolve
    gpus = [home / f"gpu-{node}" for node in nodes]
    for gpu in gpus:
        gpu.touch()
    (home / "slurm.conf").write_text(
        CONFIGURATION.format(home=home, ports=free_ports(3), user=getuser(), nodes=nodes), encoding="utf-8"
    )
    lines = [f"NodeName={node} Name=gpu File={gpu}\n" for node, gpu in zip(nodes, gpus, strict=True)]
    (home / "gres.conf").write_text("".join(lines), encoding="utf-8")
    cluster = Slurm(home)
    names = ("key-file", "socket", "pid-file", "seed-file")
    files = ("key", "munge.socket", "munge.pid", "munge.seed")
    munge = [f"--{name}={home / file}" for name, file in zip(names, files, strict=True)]
    try:
        cluster.start("munged", "--foreground", "--force", "--num-threads=1", *munge)
        wait_until((home / "munge.socket").exists, 20, cluster)
        cluster.start("slurmctld", "-D", "-c")
        for node in nodes:
            cluster.start("slurmd", "-D", "-N", node)
        wait_until(lambda: states(cluster) == ["idle", "idle"], 60, cluster)
        yield cluster
    finally:
        cluster.cancel_all()
        for daemon in reversed(cluster.daemons):
            daemon.terminate()
        for daemon in cluster.daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def states(cluster: Slurm) -> list[str]:
    """Of all nodes; none while the controller does not answer."""
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%t"], env=cluster.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def wait_until(true: Any, seconds: float, cluster: Slurm) -> None:
    until = time.monotonic() + seconds
    while not true():
        alive = all(daemon.poll() is None for daemon in cluster.daemons)
        assert (alive, time.monotonic() < until) == (True, True), cluster.logs()
        time.sleep(0.2)


def result(out: Path) -> dict[str, Any]:
    path = out / "run/result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def test_a_job_is_signalled_requeued_and_finished(slurm: Slurm, tmp_path: Path, capsys: Any) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    model = tiny.model(tmp_path / "model")
    began = time.monotonic()
    said: list[str] = []

    def note(text: str) -> None:
        said.append(f"{time.monotonic() - began:6.1f} s  {text}")

    options = f"--parsable --nodes=2 --gpus-per-node=1 --cpus-per-task=1 --time=2 --signal=B:TERM@60 --output={log}"
    flags = f"--num_epochs 100000 --max_train_step {STEPS} --context_length 512 --max_eval_step 1 --save_steps 100000"
    environment = {"MODEL": str(model), "OUT": str(out), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    number = slurm.ask("sbatch", *options.split(), "examples/slurm.sbatch", *flags.split(), **environment)
    note(f"submitted: job {number}, two nodes, two minutes, TERM a minute before the end")
    restarts, saved, last = 0, [], ""
    while (job := slurm.job(number))["JobState"] not in {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}:
        assert time.monotonic() - began < PATIENCE, slurm.logs() + log.read_text()
        state = f"{job['JobState']}, restarts {job['Restarts']}"
        if state != last:
            last = state
            note(state)
        if int(job["Restarts"]) > restarts:
            restarts = int(job["Restarts"])
            stopped = result(out)
            note(f"result.json: {stopped['status']}, {stopped['reason']}")
            assert stopped["status"] == "stopped"
            saved.append(stopped["step"])
            # Slurm would wait two minutes; sooner than this a node still revokes what the last try was allowed
            time.sleep(10)
            slurm.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
        time.sleep(0.5)
    note(f"{job['JobState']}, exit code {job['ExitCode']}, restarts {job['Restarts']}")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), "\n".join([*said, log.read_text()])
    done = result(out)
    note(f"result.json: {done['status']}, step {done['step']}, resumed from {Path(str(done.get('resumed_from'))).name}")
    with capsys.disabled():
        print("", *said, sep="\n")
    assert restarts >= 1
    assert saved == sorted(saved)
    assert 0 < saved[0] < STEPS
    assert (done["status"], done["step"]) == ("done", STEPS)
    assert done["resumed_from"].endswith(f"step-{saved[-1]}")
    lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert f"{restarts + 1} tries" == f"{log.read_text().count('2 ranks on ')} tries", log.read_text()
