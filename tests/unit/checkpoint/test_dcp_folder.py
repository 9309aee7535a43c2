"""`step-N` folders: cut anywhere, damaged anywhere, in the way of one another; and whose a folder with some is."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packtrain.checkpoint import dcp_folder
from packtrain.checkpoint.dcp_folder import (
    DONE,
    MANIFEST,
    STATE,
    StepFolder,
    complete,
    facts_of,
    keep_only,
    newest,
    put_away,
    steps,
    sweep,
    verify,
)
from packtrain.checkpoint.store import Claim, claim
from packtrain.errors import UserError

SETTINGS = {"--lr": 0.1, "--batch_size_training": 4, "--gradient_accumulation_steps": 2}


def save(root: Path, step: int, /, size: int = 5000, **state: Any) -> Path:
    """A checkpoint whose bytes depend on its step."""
    folder = StepFolder(root, step)
    data = folder.path / "rank-00000.safetensors"
    data.write_bytes(random.Random(step).randbytes(size))
    folder.files[data.name] = facts_of(data)
    known = {"step": step, "step_items": 8, "fingerprint": SETTINGS}
    folder.write_json(STATE, known | state)
    return folder.commit()


def test_a_whole_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert folder == tmp_path / "step-12" == newest(tmp_path)
    assert verify(folder) == []
    assert {path.name for path in folder.iterdir()} == {DONE, MANIFEST, STATE, "rank-00000.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["step-12"]


def test_names_are_exact(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in ("step-2.bak", "step-02", "step-", "step-10x", "xstep-9", "step--3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / DONE).write_text("{}")
    (tmp_path / "step-7").write_text("no folder")
    assert steps(tmp_path) == complete(tmp_path) == {2: tmp_path / "step-2"}


def test_steps_are_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert list(steps(tmp_path)) == [9, 10, 100]
    assert newest(tmp_path) == tmp_path / "step-100"


@pytest.mark.parametrize("seed", range(20))
def test_one_wrong_bit_anywhere_is_noticed(seed: int, tmp_path: Path) -> None:
    folder, choose = save(tmp_path, 3), random.Random(seed)
    path = choose.choice(sorted(folder.iterdir()))
    damaged = bytearray(path.read_bytes())
    damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
    path.write_bytes(damaged)
    (problem,) = verify(folder)
    assert folder.name in problem


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / STATE).unlink(), "state.json: missing"),
        (lambda folder: (folder / DONE).unlink(), "DONE: missing"),
        (lambda folder: os.truncate(folder / "rank-00000.safetensors", 4999), "4,999 bytes, and 5,000 were written"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "its SHA-256 is not the one in"),
        (lambda folder: (folder / DONE).write_text("[]"), "its SHA-256 is not the one in DONE"),
    ],
)
def test_what_is_missing_or_cut_is_named(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    damage(folder)
    (problem,) = verify(folder)
    assert said in problem


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    name = "rank-00000.safetensors"
    (second / name).write_bytes((first / name).read_bytes())
    assert "its bytes are not those that were written" in verify(second)[0]
    first.rename(tmp_path / "step-3")
    assert "it was renamed" in verify(tmp_path / "step-3")[0]


def test_links_and_paths_lead_nowhere(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 1)
    outside = tmp_path / "outside"
    outside.write_bytes((folder / STATE).read_bytes())
    (folder / STATE).unlink()
    (folder / STATE).symlink_to(outside)
    assert "it is no plain file of the folder" in verify(folder)[0]


def operations(work: Callable[[], Any], kill_at: int = 0) -> int:
    """How many times `work`, in a process of its own, touches the disk; at touch number `kill_at` it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        touches = 0

        def watch(event: str, _: Any) -> None:
            nonlocal touches
            if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}:
                touches += 1
                if touches == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        work()
        os.write(writer, str(touches).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 100)
    os.close(reader)
    assert os.WIFSIGNALED(status) == bool(kill_at)
    return int(told or 0)


def test_killed_anywhere_the_newest_is_whole(tmp_path: Path) -> None:
    """The second save and the clearing after it, cut before each touch of the disk: what counts is step 1 or step 2."""

    def second(root: Path) -> None:
        save(root, 2)
        keep_only(root, {2})

    save(tmp_path / "count", 1)
    touches = operations(lambda: second(tmp_path / "count"))
    assert touches > 20
    found = set()
    for touch in range(1, touches + 1):
        root = tmp_path / str(touch)
        save(root, 1)
        operations(lambda root=root: second(root), kill_at=touch)
        counts = complete(root)
        assert counts
        assert all(verify(folder) == [] for folder in counts.values())
        found.add(max(counts))
        sweep(root)
        assert [path for path in root.iterdir() if path.name.startswith(".")] == []
        save(root, 2)  # the run comes to step 2 again
        keep_only(root, {2})
        assert list(complete(root)) == [2]
        assert verify(root / "step-2") == []
    assert found == {1, 2}


class Careless(StepFolder):
    """Writes in place, and says that it is done before it is."""

    def __init__(self, root: Path, step: int) -> None:
        super().__init__(root, step)
        self.path = self.path.rename(root / f"step-{step}")
        (self.path / DONE).write_text("{}")

    def commit(self) -> Path:
        (self.path / MANIFEST).write_text("{}")
        return self.path


def test_a_careless_order_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "StepFolder", Careless)
    operations(lambda: save(tmp_path, 2), kill_at=6)
    assert any(verify(folder) for folder in complete(tmp_path).values())


def test_nothing_is_written_into_a_folder_that_is_there(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step-5" / DONE).unlink()
    partial = (tmp_path / "step-5" / MANIFEST).read_bytes()
    save(tmp_path, 5, size=100)
    assert verify(tmp_path / "step-5") == []
    assert (tmp_path / "damaged/step-5" / MANIFEST).read_bytes() == partial


def test_keep_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    keep_only(tmp_path, {2, 4, 9})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4"]


def test_put_away_keeps_one_earlier_run(tmp_path: Path) -> None:
    assert put_away(tmp_path) is None
    for size in (10, 20):
        save(tmp_path, 1, size=size)
        assert put_away(tmp_path) == tmp_path / "old"
    assert (tmp_path / "old/step-1/rank-00000.safetensors").stat().st_size == 20


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A run's folder after a failure, with checkpoints of steps 4 and 8."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps({"status": "failed", "fingerprint": SETTINGS}))
    for step in (4, 8):
        save(tmp_path / "checkpoints", step)
    return tmp_path


def ask(root: Path, *, step_items: int = 8, overwrite: bool = False, **changes: Any) -> Claim:
    asked = SETTINGS | {f"--{name}": value for name, value in changes.items()}
    return claim(root, asked, overwrite=overwrite, checkpoints=root / "checkpoints", step_items=step_items)


def test_the_same_run_goes_on(unfinished: Path) -> None:
    assert ask(unfinished) is Claim.RESUME
    assert newest(unfinished / "checkpoints") == unfinished / "checkpoints/step-8"
    assert (unfinished / "run").is_dir()


def test_a_run_that_ended_without_a_word_goes_on(unfinished: Path) -> None:
    (unfinished / "run/result.json").write_text(json.dumps({"status": "running", "updated_at": 0, "pid": 1}))
    assert ask(unfinished) is Claim.RESUME
    assert json.loads((unfinished / "run/result.json").read_text())["status"] == "failed"


def test_a_checkpoint_counts_without_its_runs_record(unfinished: Path) -> None:
    (unfinished / "run/result.json").unlink()
    assert ask(unfinished) is Claim.RESUME


def test_other_settings_are_listed(unfinished: Path) -> None:
    before = sorted(path for path in unfinished.rglob("*"))
    with pytest.raises(UserError) as error:
        ask(unfinished, lr=0.2, seed=1)
    (said,) = error.value.problems
    assert "--lr: 0.1 then, 0.2 now; --seed: None then, 1 now" in said
    assert "--overwrite_output_dir" in said
    assert sorted(path for path in unfinished.rglob("*")) == before


def test_checkpoints_elsewhere_belong_to_one_run(unfinished: Path) -> None:
    """The dist flags' folder, which runs with other output folders may name as well."""
    elsewhere = unfinished / "dist"
    save(elsewhere, 2, root=str(unfinished / "one"))
    asked: dict[str, Any] = {"overwrite": False, "checkpoints": elsewhere, "step_items": 8}
    assert claim(unfinished / "one", SETTINGS, **asked) is Claim.RESUME
    with pytest.raises(UserError, match=f"holds checkpoints of the run in {unfinished / 'one'}"):
        claim(unfinished / "two", SETTINGS, **asked)
    assert claim(unfinished / "two", SETTINGS, **asked | {"overwrite": True}) is Claim.NEW
    assert list(steps(elsewhere / "old")) == [2]


def test_rows_of_a_step_decide_and_not_how_they_are_split(unfinished: Path) -> None:
    assert ask(unfinished, step_items=16) is Claim.RESUME  # the same command on twice the ranks
    assert ask(unfinished, batch_size_training=2, gradient_accumulation_steps=4) is Claim.RESUME
    with pytest.raises(UserError, match=r"rows of a step: 8 then, 16 now .--batch_size_training: 4 then, 8 now"):
        ask(unfinished, batch_size_training=8, step_items=16)


@pytest.mark.parametrize("damage", ["bit", "DONE"])
def test_a_damaged_one_is_set_aside_and_an_older_one_used(damage: str, unfinished: Path) -> None:
    steps_of = unfinished / "checkpoints"
    if damage == "DONE":
        (steps_of / "step-8/DONE").unlink()
    else:
        data = bytearray((steps_of / "step-8/rank-00000.safetensors").read_bytes())
        data[99] ^= 4
        (steps_of / "step-8/rank-00000.safetensors").write_bytes(data)
    assert ask(unfinished) is Claim.RESUME
    assert newest(steps_of) == steps_of / "step-4"
    assert (steps_of / "damaged/step-8").is_dir()


def test_where_none_is_whole_a_run_begins(unfinished: Path) -> None:
    for step in (4, 8):
        (unfinished / f"checkpoints/step-{step}/manifest.json").unlink()
    assert ask(unfinished) is Claim.NEW
    assert sorted(path.name for path in (unfinished / "checkpoints/damaged").iterdir()) == ["step-4", "step-8"]
    assert (unfinished / "run.old-1").is_dir()


def test_overwriting_begins_again(unfinished: Path) -> None:
    assert ask(unfinished, overwrite=True, lr=9) is Claim.NEW
    assert list(steps(unfinished / "checkpoints")) == []
    assert list(steps(unfinished / "checkpoints/old")) == [4, 8]


def test_a_finished_run_is_finished(unfinished: Path) -> None:
    (unfinished / "run/result.json").write_text(json.dumps({"status": "done", "fingerprint": SETTINGS}))
    assert ask(unfinished) is Claim.FINISHED
    with pytest.raises(UserError, match="a finished run with other settings"):
        ask(unfinished, lr=1)


def test_this_module_needs_no_torch() -> None:
    assert "torch" not in vars(dcp_folder)
