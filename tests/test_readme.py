"""README.md and examples/ are true: everything in them is run, in their order, with a tiny model for the big one.

Adapted are the model's name, the number of steps and evaluation batches, and torchrun's port; nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from packtrain import cli
from packtrain.configs.export import ExportConfig
from packtrain.configs.generation import GenerationConfig
from packtrain.configs.parse import parse
from packtrain.configs.run import FIELDS
from packtrain.configs.support import LATER, remarks, status

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
YAML = [
    file
    for file in sorted((ROOT / "examples").glob("*.yaml"))
    if "\napiVersion:" not in file.read_text(encoding="utf-8")
]
"""Files of settings; kubernetes has YAML of its own."""
BIG = "meta-llama/Llama-3.2-1B"
SMALL = ["--max_train_step", "2", "--max_eval_step", "1"]
SHORT = {"train": SMALL, "verify": ["--verify_steps", "1"]}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block that names its language."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def section(title: str) -> str:
    """The text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's examples and entry point, and a tiny model."""
    for name in ("examples", "getting-started"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny.model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_block(language: str, block: str) -> None:
    """Run a block in the working directory. Fails if anything in it does, or cannot be run here."""
    if language == "python":
        exec(compile(block.replace(BIG, "tiny"), "README.md", "exec"), {})
        return
    assert language == "bash", f"a block of {language}: expected bash or python"
    for words in commands(block):
        code = run(words)
        assert code == 0, f"{shlex.join(words)}: exit code {code}"


def run(words: list[str]) -> int:
    """The exit code of a command of the README."""
    program, *rest = (word.replace(BIG, "tiny") for word in words)
    if program == "packtrain":
        return cli.main([*rest, *sizes(rest)])
    if program == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port()), *rest, *SMALL]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, env=environment, check=False).returncode
    if program == "make":  # its targets install and train for minutes: what they would do is looked at
        return subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if words == ["source", ".venv/bin/activate"]:
        return 0 if "VENV := .venv\n" in (ROOT / "Makefile").read_text() else 1
    raise AssertionError(f"{shlex.join(words)}: no way to run it here")


def sizes(words: list[str]) -> list[str]:
    """Further flags that make a run short, and give a YAML file's run the tiny model."""
    from_file = any(word.endswith(".yaml") for word in words)
    return (["--model_name", "tiny"] if from_file else []) + SHORT.get(words[0], [])


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_everything_runs_in_order(home: Path) -> None:
    found = blocks(README)
    assert {"bash", "python"} == {language for language, _ in found}
    for language, block in found:
        run_block(language, block)
    results = {file.parent.parent.name: json.loads(file.read_text()) for file in home.glob("out/*/run/result.json")}
    named = re.findall(r"\bout/(\w+)", README + "".join(file.read_text(encoding="utf-8") for file in YAML))
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys({*named} - {"merged"}, "done")
    check_the_tree(home)


def check_the_tree(home: Path) -> None:
    """The folder looks as "What comes out" draws it."""
    root, *lines = section("What comes out").split("```")[1].strip().splitlines()
    names = [name for line in lines for name in re.split(r" {3,}", line.strip())[0].split()]
    assert {"adapter_config.json", "best/", "checkpoints/", "run/metrics.jsonl"} <= set(names)
    assert [name for name in names if not (home / root / name).exists()] == []
    folders = [{file.name for file in (home / root / part).iterdir() if file.is_file()} for part in (".", "best")]
    assert folders[0] == folders[1] >= {"tokenizer.json"}
    assert (home / "out" / "full_finetune" / "best" / "model.safetensors").exists()


def test_the_same_command_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(
        words for _, block in blocks(README) for words in commands(block) if words[:2] == ["packtrain", "train"]
    )
    assert run(first) == 0
    before = Path("out/grammar/run/metrics.jsonl").read_text()
    capsys.readouterr()
    assert run(first) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert Path("out/grammar/run/metrics.jsonl").read_text() == before


def test_every_flag_named_is_one_and_works() -> None:
    other = GenerationConfig.__dataclass_fields__.keys() | ExportConfig.__dataclass_fields__.keys()
    ours = FIELDS.keys() | {dotted.partition(".")[2] for dotted in FIELDS} | other
    named = set(re.findall(r"--(\w[\w.]*)", README))
    assert named - ours == {"nnodes", "help"}
    later = [name for name in named for dotted in FIELDS if dotted.endswith(f".{name}") and status(dotted) == "later"]
    assert later == []


def test_what_is_not_built_yet() -> None:
    not_yet = section("What it is not, and not yet")
    named = set(re.findall(r"`packtrain (\w+)`", not_yet))
    assert named == set(cli.LATER)
    *_, settings = re.findall(r"^- (.*)$", not_yet, flags=re.MULTILINE)
    assert settings.split("; ") == [row.what for row in LATER]


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.stem)
def test_examples_say_nothing_in_vain(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cfg = parse([str(file)])
    assert remarks(cfg) == []
    paths = [str(value) for dotted in FIELDS if str(value := cfg.get(dotted)).startswith("examples/")]
    assert paths
    assert all(Path(path).exists() for path in paths)
    assert f"packtrain train examples/{file.name}" in README, "the README's commands run every example"


def test_figures_are_those_of_the_notes() -> None:
    measured = section("What is measured")
    notes = "".join((ROOT / "docs" / name).read_text() for name in ("against_peft.md", "LOG.md"))
    figures = re.findall(r"\d+\.\d+", measured)
    assert len(figures) >= 4
    assert [figure for figure in figures if figure not in notes] == []


def test_a_wrong_command_would_be_noticed(home: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 2"):
        run_block("bash", "packtrain train --model_name tiny \\\n    --datset grammar_dataset  # misspelt\n")
    with pytest.raises(AssertionError, match="no way to run it"):
        run_block("bash", "pip install packtrain\n")
    assert blocks("text\n```bash\nmake demo\n```\n") == [("bash", "make demo\n")]
