"""Checkpoints written beside the training: the same bytes, no error lost, no rank left waiting.

Whole runs on two ranks, whose writing is slowed, broken or killed on purpose.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import ranks
from ranks import run_ranks
from runs import apart, column, lines, train

import tiny
from packtrain import finetuning, log, preflight
from packtrain.checkpoint import dcp_file, dcp_folder, dcp_run, dcp_storage
from packtrain.checkpoint.dcp_folder import DONE, complete, read_state, verify
from packtrain.checkpoint.host_copy import HostCopy, Taken
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.errors import Fault, Stopped, UserError
from packtrain.optim import Optimizer
from packtrain.train import loop
from packtrain.train.interrupt import Interrupt
from packtrain.train.loop import Loop
from packtrain.train.record import Record

WORLD, STEPS, PATIENCE = 2, 6, 100.0
CLOCK = ("step_time", "tokens_per_second", "memory_gb")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    tiny.model(folder / "base", vocab_size=391, hidden_size=32, intermediate_size=44, initializer_range=0.3)
    tiny.grammar(folder / "rows.csv", 12)
    return folder


def flags_of(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 2,
        "num_epochs": 2,
        "run_validation": False,
        "lr": 0.02,
        "save_steps": 1,
        "keep_checkpoints": 0,
        "output_dir": str(root / out),
        **changes,
    }


class SignalAt(Interrupt):
    """A signal, or an error, while the last rank makes a step ready."""

    def __init__(self, step: int, place: Place, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self._left, self._error = step if place.rank == WORLD - 1 else -1, error

    @property
    def asked(self) -> bool:
        self._left -= 1
        if self._left == 0 and self._error is not None:
            raise self._error("on purpose")
        return self._left == 0


def ended(place: Place, name: str, flags: dict[str, Any], interrupt: Interrupt | None = None) -> str:
    """What a run that does not come to its end says, and how long that took."""
    log.quiet()
    cfg, own = build(**flags), apart(place, name)
    with pytest.raises((Stopped, Fault, UserError, RuntimeError)) as said:
        finetuning.run(cfg, own, preflight.inputs(cfg, own), interrupt or Interrupt())
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-")]
    return f"{said.type.__name__}: {said.value}"


def in_background() -> bool:
    return threading.current_thread().name.startswith("checkpoint-")


@contextmanager
def writing(before: Callable[[int], None]) -> Iterator[None]:
    """`before(step)` comes before anything of a checkpoint is written by a background thread."""
    with pytest.MonkeyPatch.context() as patch:
        save = dcp_run.dcp.save

        def saves(root: Path, step: int, *args: Any, **more: Any) -> None:
            if in_background():
                before(step)
            save(root, step, *args, **more)

        patch.setattr(dcp_run.dcp, "save", saves)
        yield


@contextmanager
def after_the_next_update() -> Iterator[None]:
    """Background threads begin to write when the optimizer has changed everything once more."""
    updates = threading.Semaphore(0)
    with pytest.MonkeyPatch.context() as patch:
        step = Optimizer.step

        def steps(self: Optimizer, *args: Any, **more: Any) -> None:
            step(self, *args, **more)
            updates.release()

        patch.setattr(Optimizer, "step", steps)
        with writing(lambda step: [updates.acquire(timeout=30) for _ in range(step + 1 if step == 1 else 1)] and None):
            yield


def same_bytes(place: Place, root: Path) -> None:
    """Written while training waits; beside it; and beside it without a copy."""
    for case in ({}, {"fsdp_config.pure_bf16": True, "checkpoint_type": "StateDictType.FULL_STATE_DICT"}):
        name = "bf16" if case else "fp32"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostCopy, "take", lambda self, rows: None)
            train(place, f"{name} waits", flags_of(root, f"{name} waits", max_train_step=4, **case))
        with after_the_next_update():
            train(place, f"{name} beside", flags_of(root, f"{name} beside", max_train_step=4, **case))
    with after_the_next_update(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "take", lambda self, rows: Taken(dict(rows), None))
        train(place, "live", flags_of(root, "live", max_train_step=3))


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_what_is_written_later_is_what_was(root: Path) -> None:
    run_ranks(same_bytes, WORLD, root, timeout=PATIENCE)
    for case in ("fp32", "bf16"):
        waits, beside = (complete(root / f"{case} {how}/checkpoints") for how in ("waits", "beside"))
        assert list(waits) == list(beside) == [1, 2, 3, 4]
        for step, folder in waits.items():
            assert verify(beside[step]) == []
            assert tensors(folder) == tensors(beside[step]), (case, step)
    live = complete(root / "live/checkpoints")
    assert tensors(live[1]) != tensors(complete(root / "fp32 waits/checkpoints")[1]), "a copy is needed, and tested for"


def breaks(place: Place, root: Path) -> str:
    """Step 4's cannot be written, which a rank finds out; the step after it is told on all."""
    wishes = Loop._wishes

    def when_it_is_known(self: Loop, batches: Any) -> Any:
        assert self.sinks.checkpoints is not None
        while self.sinks.checkpoints._background.busy:
            time.sleep(0.001)
        return wishes(self, batches)

    def no_space(step: int) -> None:
        if step == 4 and place.rank == 1:
            patch.setattr(dcp_file._Hashing, "write", fails)

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, writing(no_space):
        patch.setattr(Loop, "_wishes", when_it_is_known)
        return ended(place, "breaks", flags_of(root, "breaks", save_steps=2))


def test_an_error_is_raised_on_all_ranks_at_the_next_step(root: Path) -> None:
    said = run_ranks(breaks, WORLD, root, timeout=PATIENCE)
    assert said[0] == said[1]
    assert "the checkpoint of step 4 could not be saved (rank 1: [Errno 28] No space left on device)" in said[0]
    assert "The checkpoint before it is kept: make room" in said[0]
    folder = root / "breaks"
    assert len(column(lines(folder), "loss")) == 5
    assert list(complete(folder / "checkpoints")) == [2]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    result = json.loads((folder / "run/result.json").read_text())
    assert (result["status"], result["last_checkpoint"]) == ("failed", str(folder / "checkpoints/step-2"))
    assert "No space left" in result["reason"]


def slowly(step: int) -> None:
    time.sleep(0.4)


def ends_in_flight(place: Place, root: Path) -> list[str]:
    """A stop, and a stop whose last save makes up for one that failed, while step 2's is being written."""

    def fails(step: int) -> None:
        slowly(step)
        raise Fault("no disk at all")

    said = []
    for name, work in (("stop", slowly), ("makes up", fails)):
        with writing(work):
            said.append(ended(place, name, flags_of(root, name, save_steps=2), SignalAt(3, place)))
    return said


def test_a_stop_waits_and_saves_once_more(root: Path) -> None:
    for said in run_ranks(ends_in_flight, WORLD, root, timeout=PATIENCE):
        assert all(text.startswith("Stopped: stopped by a signal on another rank after step 3") for text in said)
    for name, kept in (("stop", [2, 3]), ("makes up", [3])):
        assert list(complete(root / name / "checkpoints")) == kept
        assert json.loads((root / name / "run/result.json").read_text())["last_checkpoint"].endswith("step-3")


def raises(place: Place, root: Path) -> tuple[str, float]:
    with writing(slowly):
        began = time.monotonic()
        said = ended(place, "raises", flags_of(root, "raises", save_steps=2), SignalAt(3, place, RuntimeError))
        return said, time.monotonic() - began


def test_an_error_of_one_rank_waits_for_what_is_being_written(root: Path) -> None:
    first, last = run_ranks(raises, WORLD, root, timeout=PATIENCE)
    assert last[0] == "RuntimeError: on purpose"
    assert max(first[1], last[1]) < 20, "no rank waits for one that is gone"
    assert list(complete(root / "raises/checkpoints")) == [2]
    reason = json.loads((root / "raises/run/result.json").read_text())["reason"]
    assert reason == "RuntimeError: on purpose"


def killed(place: Place, root: Path, victim: int, operation: str) -> str:
    """kill -9 from within the background's writing of step 4."""

    def dies(step: int) -> None:
        if step == 4 and place.rank == victim:
            target = dcp_storage if operation == "confirm" else dcp_folder.StepFolder
            patch.setattr(target, operation, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            if victim == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch, writing(dies):
        return ended(place, "killed", flags_of(root, f"killed-{victim}-{operation}", save_steps=2))


def whole_run(place: Place, root: Path, out: str) -> dict[str, Any]:
    return train(place, out, flags_of(root, out, save_steps=2))


def without_clock(folder: Path) -> list[str]:
    return [json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in lines(folder)]


@pytest.mark.parametrize(("victim", "operation", "kept"), [(0, "confirm", 4), (1, "commit", 2)])
def test_killed_while_writing_it_goes_on_bit_for_bit(
    victim: int, operation: str, kept: int, root: Path, tmp_path: Path
) -> None:
    """The other rank is ended, as the launcher does; the same command goes on from what counts."""
    if not (root / "unbroken").exists():
        run_ranks(whole_run, WORLD, root, "unbroken", timeout=PATIENCE)
    out, context = f"killed-{victim}-{operation}", ranks.forkserver()
    processes: list[BaseProcess] = []
    for rank in range(WORLD):
        _, theirs = context.Pipe(duplex=False)
        work = pickle.dumps((killed, (root, victim, operation)))
        processes.append(
            context.Process(target=ranks._run, args=(theirs, tmp_path, (rank, WORLD), PATIENCE, work), daemon=True)
        )
        processes[-1].start()
    processes[victim].join(40)
    for process in processes:
        process.kill()
        process.join()
    assert processes[victim].exitcode == -signal.SIGKILL
    assert max(complete(root / out / "checkpoints")) == kept
    result = run_ranks(whole_run, WORLD, root, out, timeout=PATIENCE)[0]
    assert result["resumed_from"].endswith(f"step-{kept}")
    assert without_clock(root / out) == without_clock(root / "unbroken")
    for name in ("model.safetensors", f"checkpoints/step-{STEPS}/rank-00000.safetensors"):
        assert (root / out / name).read_bytes() == (root / "unbroken" / name).read_bytes()


def by_time(place: Place, root: Path) -> None:
    """One rank's clock runs: 31 s a step. Rank 0's decides, on all."""
    wishes = Loop._wishes
    for fast in range(WORLD):
        clock = Clock()

        def later(self: Loop, batches: Any, clock: Clock = clock, fast: int = fast) -> Any:
            clock.ahead += 31.0 if place.rank == fast else 0.0
            return wishes(self, batches)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "time", clock)
            patch.setattr(Loop, "_wishes", later)
            often = {"run_validation": True, "eval_steps": 1, "max_eval_step": 1, "max_train_step": 5}
            train(place, f"clock-{fast}", flags_of(root, f"clock-{fast}", save_steps=0, save_minutes=1, **often))


class Clock:
    """Runs as the other one does, `ahead` of it."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_the_clock_of_rank_0_decides_for_all(root: Path) -> None:
    run_ranks(by_time, WORLD, root, timeout=PATIENCE)
    assert list(complete(root / "clock-0/checkpoints")) == [2, 4, 5]
    assert list(complete(root / "clock-1/checkpoints")) == [5]


def policies(place: Place, root: Path) -> dict[str, Any]:
    """Slow disks, how many are kept, what result.json says when, and changed settings."""
    found: dict[str, Any] = {"said": [], "early": []}
    with pytest.MonkeyPatch.context() as patch:
        note = Record.note

        def notes(self: Record, **facts: Any) -> None:
            if last := facts.get("last_checkpoint"):
                found["early"].append(not (Path(last) / DONE).is_file())
            note(self, **facts)

        patch.setattr(Record, "note", notes)
        patch.setattr(dcp_run.log, "once", found["said"].append)
        with writing(slowly):
            train(place, "slow", flags_of(root, "slow", max_train_step=3))
    train(place, "two", flags_of(root, "two", keep_checkpoints=2))
    train(place, "best", flags_of(root, "best", keep_checkpoints=1, run_validation=True, eval_steps=1, lr=1.0))
    ended(place, "began", flags_of(root, "changed"), SignalAt(3, place))
    found["refused"] = ended(place, "refused", flags_of(root, "changed", lr=0.03, num_epochs=3))
    changes = {"lr": 0.03, "num_epochs": 3, "allow_change": ["lr", "num_epochs"]}
    found["changed"] = train(place, "changed", flags_of(root, "changed", **changes))
    changes |= {"num_epochs": 4}
    found["finished"] = ended(place, "finished", flags_of(root, "changed", **changes))
    return found


def test_policies(root: Path) -> None:
    found, other = run_ranks(policies, WORLD, root, timeout=PATIENCE)
    assert list(complete(root / "slow/checkpoints")) == [1, 2, 3], "none is left out"
    assert [text.split(" waited ")[0] for text in found["said"]] == ["the checkpoint of step 2"]
    assert found["early"] == [False] * 3
    assert list(complete(root / "two/checkpoints")) == [5, 6]
    best = json.loads((root / "best/run/result.json").read_text())["best_step"]
    assert best < STEPS
    assert list(complete(root / "best/checkpoints")) == [best, STEPS]
    assert "pass --allow_change num_epochs,lr to go on all the same" in found["refused"]
    expected = [
        {"after_step": 3, "name": name, "was": was, "now": now}
        for name, was, now in (("--num_epochs", 2, 3), ("--lr", 0.02, 0.03))
    ]
    assert found["changed"]["changed"] == other["changed"]["changed"] == expected
    assert json.loads((root / "changed/run/result.json").read_text())["changed"] == expected
    assert read_state(complete(root / "changed/checkpoints")[9])["changed"] == expected
    assert column(lines(root / "changed"), "lr")[:4] == pytest.approx([0.02, 0.02, 0.02, 0.03 * 0.85])
    assert len(column(lines(root / "changed"), "loss")) == 9
    assert "was saved without the optimizer's state, so that it cannot go on to step 12" in found["finished"]
    assert json.loads((root / "changed/run/result.json").read_text())["status"] == "done", "and is what it was"
