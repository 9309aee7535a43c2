"""--allow_change: a run goes on although what it names is another, and although nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from packtrain.checkpoint.dcp_folder import STATE, StepFolder
from packtrain.checkpoint.dcp_run import Resumed
from packtrain.checkpoint.store import Claim, claim
from packtrain.errors import UserError

THEN = {
    "--lr": 0.1,
    "--seed": 1,
    "--r": 8,
    "--grammar_dataset.train_split": "a.csv",
    "--batch_size_training": 4,
    "--gradient_accumulation_steps": 2,
    "train data": "abc",
    "weights": "w",
}


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint after step 4."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps({"status": "failed", "fingerprint": THEN}))
    folder = StepFolder(tmp_path / "checkpoints", 4)
    folder.write_json(STATE, {"step": 4, "step_items": 8, "fingerprint": THEN, "optimizer": True})
    folder.commit()
    return tmp_path


def ask(root: Path, now: dict[str, Any], *allowed: str, items: int = 8) -> Claim:
    known = {"checkpoints": root / "checkpoints", "step_items": items}
    return claim(root, THEN | now, overwrite=False, allow_change=allowed, **known)


@pytest.mark.parametrize(
    ("now", "name"),
    [
        ({"--lr": 0.2}, "lr"),
        ({"--lr": 0.2}, "--lr"),
        ({"--lr": 0.2}, "train_config.lr"),
        ({"--r": 16}, "lora_config.r"),
        ({"--grammar_dataset.train_split": "b.csv"}, "train_split"),
        ({"--grammar_dataset.train_split": "b.csv"}, "--grammar_dataset.train_split"),
        ({"train data": "abd"}, "train_data"),
        ({"train data": "abd"}, "train data"),
        ({"weights": "v"}, "weights"),
    ],
)
def test_what_is_named_may_differ(now: dict[str, Any], name: str, unfinished: Path) -> None:
    with pytest.raises(UserError, match="unfinished run with other settings"):
        ask(unfinished, now)
    assert ask(unfinished, now, name) is Claim.RESUME


def test_nothing_else_may(unfinished: Path) -> None:
    before = sorted(path for path in unfinished.rglob("*"))
    with pytest.raises(UserError) as error:
        ask(unfinished, {"--lr": 0.2, "--seed": 2, "train data": "abd"}, "lr")
    (said,) = error.value.problems
    assert "(--seed: 1 then, 2 now; train data: abc then, abd now)" in said
    assert "pass --allow_change seed,train_data to go on all the same" in said
    assert sorted(path for path in unfinished.rglob("*")) == before


def test_a_name_that_is_none_is_refused_before_anything(unfinished: Path) -> None:
    with pytest.raises(UserError) as error:
        ask(unfinished, {"--lr": 0.2}, "lrr", "weigths", "nothing_like_it", "lr")
    assert error.value.problems[:2] == [
        "--allow_change lrr: is nothing that makes a run this run; did you mean lr?",
        "--allow_change weigths: is nothing that makes a run this run; did you mean weights?",
    ]
    assert "there are lr, seed, r, grammar_dataset.train_split, " in error.value.problems[2]
    with pytest.raises(UserError, match="did you mean seed"):
        claim(unfinished / "new", THEN, overwrite=False, allow_change=("sed",))


def test_the_rows_of_a_step_never_change(unfinished: Path) -> None:
    with pytest.raises(UserError) as error:
        ask(unfinished, {"--batch_size_training": 8}, "batch_size_training", items=16)
    assert "rows of a step: 8 then, 16 now (--batch_size_training: 4 then, 8 now)" in str(error.value)
    assert "--allow_change" not in str(error.value)


def test_a_finished_run_goes_on_with_what_is_named(unfinished: Path) -> None:
    (unfinished / "run/result.json").write_text(json.dumps({"status": "done", "fingerprint": THEN}))
    assert ask(unfinished, {}, "lr") is Claim.FINISHED
    with pytest.raises(UserError, match="a finished run with other settings"):
        ask(unfinished, {"--lr": 0.2}, "seed")
    assert ask(unfinished, {"--lr": 0.2}, "lr") is Claim.RESUME


def test_changes_are_kept_from_one_to_the_next(tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 4, "fingerprint": THEN}
    first = Resumed(folder=tmp_path, state=state).changed(THEN | {"--lr": 0.2})
    assert first == [{"after_step": 4, "name": "--lr", "was": 0.1, "now": 0.2}]
    state = {"step": 7, "fingerprint": THEN | {"--lr": 0.2}, "changed": first}
    assert Resumed(folder=tmp_path, state=state).changed(THEN | {"--lr": 0.2}) == first
    assert [c["after_step"] for c in Resumed(folder=tmp_path, state=state).changed(THEN)] == [4, 7]
