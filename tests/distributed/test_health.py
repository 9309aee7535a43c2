"""Numbers that are sick: agreed on before the update, the rows named, and what each policy makes of it.

The sickness is put into the model's loss where a batch holds a chosen row, so it comes with the row and on one rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import apart, lines, train
from safetensors.torch import load_file
from torch import Tensor

import tiny
from packtrain import building, log, preflight
from packtrain.batch import Batch
from packtrain.checkpoint.dcp_folder import complete, read_state
from packtrain.configs.parse import build
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place
from packtrain.errors import Fault
from packtrain.model.llama import LlamaForCausalLM
from packtrain.train import health, loop
from packtrain.train import step as steps_of_training
from packtrain.train.health import Health, Policy, Spikes
from packtrain.train.step import NO_LABELS, NOT_FINITE, SPIKE, Guard, step_vector, train_step

ROWS, STEPS, ROW = 8, 4, 5
"""2 rows a step, one epoch; the row that is sick, from 0."""
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "initializer_range": 0.3}
STRATEGIES: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"sharding_strategy": "FULL_SHARD"}, {"sharding_strategy": "NO_SHARD"}],
    4: [{"hsdp": True, "sharding_group_size": 2}],
}
RULES: list[dict[str, Any]] = [
    {},
    {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision"},
    {"fsdp_config.pure_bf16": True},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    tiny.model(folder / "base", **SIZES)
    tiny.grammar(folder / "rows.csv", ROWS)
    return folder


def flags_of(root: Path, out: str, world: int, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "run_validation": False,
        "batching_strategy": "padding",
        "batch_size_training": max(1, 2 // world),
        "num_epochs": 1,
        "lr": 0.01,
        "seed": 5,
        "output_dir": str(root / out),
        **changes,
    }


@contextmanager
def sickened(row: int, how: str) -> Iterator[None]:
    """The model's loss of a batch that holds this row becomes sick, or only its gradient."""
    whole = LlamaForCausalLM.forward

    def forward(self: LlamaForCausalLM, batch: Batch, logits: bool = False) -> Tensor:
        loss = whole(self, batch, logits)
        if row not in batch.rows:
            return loss
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss
        return loss * {"nan": math.nan, "inf": math.inf, "spike": 1e4}[how]

    LlamaForCausalLM.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlamaForCausalLM.forward = whole  # type: ignore[method-assign]


# the device: before the update, on every rank


class Steps:
    """The second step of an epoch, taken again and again by a model of its own."""

    def __init__(self, place: Place, flags: dict[str, Any]) -> None:
        cfg = build(**flags)
        inputs = preflight.inputs(cfg, place)
        self.place = place
        self.model = building.build(cfg, inputs, place)
        self.loader, _ = building.loaders(cfg, inputs, place)
        self.optimizer, _ = building.optimizer_of(cfg, self.model, self.loader.steps_per_epoch, STEPS)
        self.sick = self.loader.rows_of(1)[place.world_size - 1][0][0]  # the last rank's alone

    def take(self, guard: Guard, how: str = "") -> int:
        """The verdict."""
        batches = self.loader.step(1)
        agreed = step_vector(batches, False, self.place.device)
        with sickened(self.sick if how else -1, how):
            report = train_step(
                *(self.model, batches, agreed, self.optimizer, self.place), clip=None, memory=lambda: 0.0, guard=guard
            )
        return int(report.verdict)

    def bits(self) -> list[bytes]:
        """All weights, all of the optimizer's state, its count too."""
        states = [tensor for state in self.optimizer.state().values() for tensor in state.values()]
        weights = [building.local_rows(parameter)[0] for parameter in self.model.parameters()]
        return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in (*weights, *states)]


def refusals(place: Place, root: Path, strategy: dict[str, Any]) -> list[str]:
    """What steps that must change nothing did."""
    log.quiet()
    wrong: list[str] = []
    for number, rule in enumerate(RULES):
        flags = flags_of(root, "none", place.world_size, batch_size_training=1, **strategy, **rule)
        steps = Steps(apart(place, str(number)), flags)
        wrong += [f"{number}: the first"] * (steps.take(Guard()) != 0)  # moments and count are no longer zeros
        before = steps.bits()
        tries = [(Guard(latches=False), how, NOT_FINITE) for how in ("nan", "inf", "gradient")]
        tries += [(Guard(limits=torch.zeros(2, dtype=torch.float64), refuses_spikes=True), "", SPIKE)]
        for guard, how, expected in tries:
            found = steps.take(guard, how)
            wrong += [f"{number} {how}: {found}"] * (found != expected or steps.bits() != before)
        wrong += [f"{number}: not taken"] * (steps.take(Guard()) != 0 or steps.bits() == before)
        before = steps.bits()
        found = steps.take(Guard(), "nan"), steps.take(Guard())
        wrong += [f"{number}: no latch {found}"] * (found != (NOT_FINITE, 0) or steps.bits() != before)
        steps.optimizer.clear()
        steps.loader.leave_out(range(ROWS))
        found = steps.take(Guard()), 0
        wrong += [f"{number}: no labels {found}"] * (found[0] != NO_LABELS or steps.bits() != before)
    return wrong


def unguarded(place: Place, root: Path) -> list[str]:
    steps_of_training.not_finite = torch.zeros_like
    return refusals(place, root, {})


def poisoned(place: Place, root: Path) -> tuple[int, int]:
    """Weights that are not finite after a step of one rank's NaN, with the guard and without."""
    log.quiet()
    found = []
    for number, not_finite in enumerate((steps_of_training.not_finite, torch.zeros_like)):
        steps_of_training.not_finite = not_finite
        flags = flags_of(root, "none", place.world_size, batch_size_training=1)
        steps = Steps(apart(place, str(number)), flags)
        steps.take(Guard(), "nan")
        weights = [building.local_rows(parameter)[0] for parameter in steps.model.parameters()]
        found.append(sum(int((~weight.isfinite()).sum()) for weight in weights))
    return found[0], found[1]


def test_without_the_guard_one_ranks_nan_is_in_every_ranks_weights(root: Path) -> None:
    for guarded, unguarded in run_ranks(poisoned, 2, root):
        assert guarded == 0
        assert unguarded > 0


def test_without_the_guard_it_would_be_seen(root: Path) -> None:
    (wrong,) = run_ranks(unguarded, 1, root)
    assert [text.partition(":")[0] for text in wrong][:3] == ["0 nan", "0 inf", "0 gradient"]


@pytest.mark.parametrize("world", STRATEGIES)
def test_a_sick_step_changes_nothing_on_any_rank(world: int, root: Path) -> None:
    for strategy in STRATEGIES[world]:
        assert run_ranks(refusals, world, root, strategy, timeout=120) == [[]] * world


# the policies


def run_sick(place: Place, root: Path, name: str, flags: dict[str, Any], row: int, how: str, behind: int = 0) -> str:
    """What a run said at its end, nothing if it came to it. With `behind` 1 reports are read late, as of a GPU."""
    loop.BEHIND = {"cpu": behind}
    with sickened(row, how):
        try:
            train(place, name, flags)
        except Fault as fault:
            return str(fault)
    return ""


def suspects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/suspects.jsonl").read_text().splitlines()]


def saved(folder: Path) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in load_file(folder / "model.safetensors").items()}


def taken(place: Place, root: Path) -> list[list[list[list[int]]]]:
    """Rows by step, rank, micro-batch."""
    cfg = build(**flags_of(root, "none", place.world_size))
    loader, _ = building.loaders(cfg, preflight.examine(cfg, writes=False).inputs, place)
    return [loader.rows_of(step) for step in range(STEPS)]


def place_of(root: Path, world: int) -> tuple[int, int, list[int]]:
    """(step from 1, rank, rows beside it) of ROW."""
    steps = run_ranks(taken, world, root)[0]
    found = [(s + 1, r, rows) for s, ranks in enumerate(steps) for r, (rows,) in enumerate(ranks) if ROW in rows]
    assert sorted(row for ranks in steps for (rows,) in ranks for row in rows) == list(range(ROWS))
    return found[0]


def short(place: Place, root: Path, steps: int) -> None:
    out = f"short-{place.world_size}"
    train(place, "short", flags_of(root, out, place.world_size, max_train_step=steps, lr_scheduler="constant"))


@pytest.mark.parametrize("world", [1, 2])
def test_stop_names_the_row_and_saves_what_was_before(
    world: int, root: Path, record_property: Callable[[str, object], None]
) -> None:
    sick, rank, rows = place_of(root, world)
    flags = flags_of(root, f"stop-{world}", world, lr_scheduler="constant")
    for said in run_ranks(run_sick, world, root, "stop", flags, ROW, "nan", 2 - world):
        record_property("said", said)
        record_property("M8", f"{int(said.startswith(f'step {sick}: the loss (nan)'))} of 1")
        assert said.startswith(f"step {sick}: the loss (nan) or the gradient norm (nan) is not finite. Suspected: ")
        named = ", ".join(str(row + 1) for row in rows)
        assert f"rows.csv row {named} (rank {rank}, micro-batch 1). That update" in said
        assert said.endswith("--on_nonfinite skip or rollback. The weights without it are saved")
    (found,) = suspects(root / f"stop-{world}")
    assert (found["step"], found["rank"], found["micro_batch"], found["action"]) == (sick, rank, 1, "stop")
    assert found["rows"] == [{"file": str(root / "rows.csv"), "row": row + 1} for row in rows]
    assert (found["reason"], found["loss"], found["step_loss"]) == ("loss not finite", None, None)
    assert lines(root / f"stop-{world}")[-1]["event"] == "not_finite"
    assert sick > 1
    run_ranks(short, world, root, sick - 1)
    assert saved(root / f"stop-{world}") == saved(root / f"short-{world}")


def test_a_gradient_alone_suspects_all_rows_of_the_step(root: Path) -> None:
    (said,) = run_ranks(run_sick, 1, root, "gradient", flags_of(root, "gradient", 1), ROW, "gradient")
    assert "or the gradient norm (" in said
    (found,) = suspects(root / "gradient")
    assert found["reason"] == "gradient not finite"
    assert found["loss"] > 0
    assert len(found["rows"]) == 2


@pytest.mark.parametrize("world", [1, 2])
def test_skip_goes_on(world: int, root: Path) -> None:
    sick, _, _ = place_of(root, world)
    flags = flags_of(root, f"skip-{world}", world, on_nonfinite="skip")
    assert run_ranks(run_sick, world, root, "skip", flags, ROW, "inf", 2 - world) == [""] * world
    found = lines(root / f"skip-{world}")
    steps = [line for line in found if "event" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in steps if line["loss"] is None] == [sick]
    assert [(e["event"], e["step"], e["action"]) for e in found if "event" in e] == [("not_finite", sick, "skip")]
    assert json.loads((root / f"skip-{world}/run/result.json").read_text())["status"] == "done"


def test_too_many_skips_are_a_fault(root: Path) -> None:
    flags = flags_of(root, "cap", 1, on_nonfinite="skip", max_skipped_steps=0)
    (said,) = run_ranks(run_sick, 1, root, "cap", flags, ROW, "nan")
    assert "0 steps were skipped or rolled back before (--max_skipped_steps)" in said
    seen = Health(Policy(on_nonfinite="skip"), None, None)  # type: ignore[arg-type]
    assert [bool(seen._spent(step)) for step in (3, 9, 10, 11, 12, 13)] == [False] * 6
    assert "so were the 5 before it" in seen._spent(14)


def without_rows(place: Place, root: Path, left: list[int]) -> None:
    """A run whose data never had these rows, in the order of those that have."""
    Loader._left_out = property(  # type: ignore[assignment]
        lambda self: torch.tensor(sorted(left)).numpy(), lambda self, value: None
    )
    train(place, "without", flags_of(root, f"without-{place.world_size}", place.world_size))


@pytest.mark.parametrize("world", [1, 2])
def test_rollback_goes_on_from_the_held_state_without_the_row(world: int, root: Path) -> None:
    """The same bits as a run that never had the row."""
    sick, _, rows = place_of(root, world)
    flags = flags_of(root, f"rolled-{world}", world, on_nonfinite="rollback")
    assert run_ranks(run_sick, world, root, "rolled", flags, ROW, "nan", 2 - world) == [""] * world
    run_ranks(without_rows, world, root, rows)
    assert saved(root / f"rolled-{world}") == saved(root / f"without-{world}")
    ours, theirs = (
        [(x["step"], x["loss"], x["grad_norm"], x["tokens_total"]) for x in lines(root / name) if "loss" in x]
        for name in (f"rolled-{world}", f"without-{world}")
    )
    assert ours == theirs
    assert [x[0] for x in ours] == list(range(1, STEPS + 1))
    events = [line for line in lines(root / f"rolled-{world}") if "event" in line]
    assert [e["event"] for e in events] == ["rollback"] + ["no_labels"] * (world == 1)
    assert (events[0]["step"], events[0]["sick_step"], events[0]["left_out"]) == (0, sick, len(rows))
    state = read_state(complete(root / f"rolled-{world}/checkpoints")[STEPS])["health"]
    assert (state["left_out"], state["treated"]) == (sorted(rows), [sick])  # a run that goes on from there knows


# spikes


def test_the_estimate_is_robust_and_lags() -> None:
    spikes = Spikes()
    for step in range(1, 20):
        spikes.add(step, 2.0 + 0.01 * (step % 3), 1.0 + 0.1 * (step % 5))
    assert spikes.limits(100) == (math.inf, math.inf)  # 19 are too few
    for step in range(20, 40):
        spikes.add(step, 2.0 + 0.01 * (step % 3), 1.0 + 0.1 * (step % 5))
    before = spikes.limits(100)
    assert before[0] == pytest.approx(2.01 * 2)  # nearly constant: twice the median
    assert 2.3 <= before[1] < 8
    known = spikes.limits(41)
    spikes.add(40, 50.0, 1e6)
    assert spikes.limits(41) == known  # the host of a GPU has not read it by then
    assert spikes.limits(100)[1] == pytest.approx(before[1], rel=0.3)  # one outlier moves no median far
    again = Spikes()
    again.restore(json.loads(json.dumps(spikes.state())))
    assert again.limits(100) == spikes.limits(100)


def spiky(place: Place, root: Path, policy: str, row: int, behind: int) -> str:
    health.FEWEST = 1
    flags = flags_of(root, f"spike-{policy}", 1, on_spike=policy, rollback_steps=2, overwrite_output_dir=True)
    return run_sick(place, root, policy, flags, row, "spike", behind)


@pytest.mark.parametrize("behind", [0, 1])
def test_a_spike_is_treated_as_asked(behind: int, root: Path) -> None:
    row = run_ranks(taken, 1, root)[0][3][0][0][0]  # of the fourth step
    said = {
        policy: run_ranks(spiky, 1, root, policy, row, behind)[0]
        for policy in ("ignore", "warn", "stop", "skip", "rollback")
    }
    steps = {policy: [line for line in lines(root / f"spike-{policy}") if "event" not in line] for policy in said}
    events = {
        policy: [(line["event"], line["step"]) for line in lines(root / f"spike-{policy}") if "event" in line]
        for policy in said
    }
    assert [policy for policy, text in said.items() if text] == ["stop"]
    assert "step 4: a spike: loss" in said["stop"]
    assert "--on_spike skip or rollback" in said["stop"]
    assert all([line["step"] for line in steps[policy]] == [1, 2, 3, 4] for policy in said)
    assert events == {
        "ignore": [],
        "warn": [("spike", 4)],
        "stop": [("spike", 4)],
        "skip": [("spike", 4)],
        "rollback": [("rollback", 2), ("no_labels", 4)],
    }
    assert not (root / "spike-ignore/run/suspects.jsonl").exists()
    for policy in ("warn", "stop", "skip", "rollback"):
        (found,) = suspects(root / f"spike-{policy}")
        assert (found["step"], found["reason"], found["action"]) == (4, "loss spike", policy)
        assert {"file": str(root / "rows.csv"), "row": row + 1} in found["rows"]
        assert (saved(root / f"spike-{policy}") == saved(root / "spike-ignore")) == (policy == "warn"), policy
    assert saved(root / "spike-stop") == saved(root / "spike-skip") == saved(root / "spike-rollback")
