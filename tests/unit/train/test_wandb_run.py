"""--use_wandb beside a stand-in for wandb, and in whole runs: what is told, and nothing without the flag."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import packtrain
import tiny
from packtrain.configs.parse import build
from packtrain.errors import UserError
from packtrain.preflight import examine
from packtrain.train.wandb_run import PASSED_ON, problems


class Run:
    """wandb.Run's part that is used."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, figures: dict[str, float], *, step: int) -> None:
        assert self.exit_code is None
        self.logged.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class Wandb(ModuleType):
    """wandb's part that is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: list[tuple[Run, dict[str, Any]]] = []
        self.error: Exception | None = None

    def init(self, **settings: Any) -> Run:
        if self.error is not None:
            raise self.error
        self.runs.append((Run(), settings))
        return self.runs[-1][0]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    made = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wandb")
    tiny.model(made / "base")
    tiny.grammar(made / "rows.csv", 4)
    return made


def settings(root: Path, out: str, **flags: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    given = {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "max_train_step": 2,
        "output_dir": str(root / out),
        "use_peft": True,
    }
    return given | flags


def test_a_run_tells_what_its_metrics_say(root: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    asked = {"use_wandb": True, "wandb_config.project": "p", "tags": ["a", "b"], "wandb_config.mode": "offline"}
    result = packtrain.finetune(**settings(root, "told", **asked))
    ((run, init),) = wandb.runs
    assert {name: init[name] for name in ("project", "entity", "job_type", "tags", "group", "notes", "mode")} == {
        "project": "p",
        "entity": None,
        "job_type": None,
        "tags": ["a", "b"],
        "group": None,
        "notes": None,
        "mode": "offline",
    }
    assert init["dir"] == str(root / "told/run")
    assert init["config"]["train_config"]["max_train_step"] == 2
    assert {"lora_config", "grammar_dataset"} <= init["config"].keys()
    assert not {"alpaca_dataset", "prefix_config", "wandb_config"} & init["config"].keys()
    lines = [json.loads(line) for line in (root / "told/run/metrics.jsonl").read_text().splitlines()]
    assert run.logged == [
        (
            line["step"],
            {"eval/loss": line["eval_loss"], "eval/perplexity": line["eval_perplexity"]}
            if "event" in line
            else {f"train/{name}": line[name] for name in PASSED_ON},
        )
        for line in lines
    ]
    assert len(run.logged) == 4  # 4 rows, 4 a step: each step ends an epoch
    assert run.exit_code == 0
    assert run.summary["avg_train_loss"] == result["avg_train_loss"]


def test_nothing_is_told_without_the_flag(root: Path, wandb: Wandb) -> None:
    packtrain.finetune(**settings(root, "untold"))
    assert wandb.runs == []


def test_a_run_that_fails_says_so(root: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(loop: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("packtrain.train.loop.Loop.run", fail)
    with pytest.raises(RuntimeError, match="no"):
        packtrain.finetune(**settings(root, "failed", use_wandb=True))
    assert wandb.runs[0][0].exit_code == 1


def test_no_login_is_a_sentence(root: Path, wandb: Wandb) -> None:
    wandb.error = RuntimeError("api_key not configured")
    with pytest.raises(UserError, match=r"api_key not configured.*wandb login.*--wandb_config.mode offline"):
        packtrain.finetune(**settings(root, "no login", use_wandb=True))


def test_without_wandb_preflight_names_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems()
    with pytest.raises(UserError) as error:
        examine(build(**settings(root, "no wandb", use_wandb=True)))
    assert error.value.problems == [problem]
    assert "pip install wandb" in problem
