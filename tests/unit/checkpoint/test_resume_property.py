"""Any number of ranks, batch, accumulation and lengths, cut anywhere: no row lost, none doubled, the same curve.

All ranks of a run are in one process: the loop, the step and the optimizer are the real ones, and take the
micro-batches of every rank's own loader one after another. tests/distributed has whole runs on real ranks.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from packtrain import log
from packtrain.batch import Batch
from packtrain.checkpoint.dcp import Rows
from packtrain.checkpoint.host_copy import HostCopy
from packtrain.data.loader import Loader, Strategy
from packtrain.data.tokens import Tokens
from packtrain.distributed.place import Place
from packtrain.errors import Stopped
from packtrain.optim import Optimizer
from packtrain.train.interrupt import Interrupt
from packtrain.train.loop import Loop
from packtrain.train.plan import Plan, Sinks

VOCABULARY = 17
CLOCK = ("step_time", "tokens_per_second", "memory_gb")


@dataclass(frozen=True)
class Split:
    """How a step's rows go over ranks."""

    world: int
    batch: int
    accumulation: int


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    strategy: Strategy
    seed: int
    epochs: int
    first: Split
    second: Split
    save_steps: int
    cut: int
    """The step in which the run ends, of `place` in it."""
    place: str


splits = st.builds(Split, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
cases = st.builds(
    Case,
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=24).map(tuple),
    strategy=st.sampled_from(["padding", "packing"]),
    seed=st.integers(0, 1000),
    epochs=st.integers(1, 3),
    first=splits,
    second=splits,
    save_steps=st.integers(1, 4),
    cut=st.integers(1, 12),
    place=st.sampled_from(["before", "signal", "backward", "update"]),
)


def tokens(case: Case) -> Tokens:
    """Rows whose ids follow from their number; the second half of each is trained."""
    draw = np.random.default_rng(case.seed)
    ids = [draw.integers(0, VOCABULARY, length, dtype=np.int32) for length in case.lengths]
    labels = [np.where(np.arange(len(row)) * 2 >= len(row), row, -100).astype(np.int32) for row in ids]
    offsets = np.concatenate([[0], np.cumsum(case.lengths)]).astype(np.int64)
    numbers = np.arange(1, len(ids) + 1, dtype=np.int64)
    return Tokens(np.concatenate(ids), np.concatenate(labels), offsets, numbers, "rows")


class AllRanks:
    """The loaders of all ranks of a run; a step's micro-batches are those of rank 0, then those of rank 1, ..."""

    def __init__(self, case: Case, split: Split, step_items: int | None = None) -> None:
        self.ranks = [
            Loader(
                tokens(case),
                strategy=case.strategy,
                context_length=16,
                batch_size=split.batch,
                accumulation=split.accumulation,
                rank=rank,
                world_size=split.world,
                seed=case.seed,
                shuffle=True,
                pad_id=0,
                step_items=step_items,
            )
            for rank in range(split.world)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranks[0], name)

    def step(self, index: int, pieces: int = 1) -> list[Batch]:
        return [batch for rank in self.ranks for batch in rank.step(index, pieces)]

    def micro_batches(self, index: int) -> int:
        return sum(rank.micro_batches(index) for rank in self.ranks)

    def rows_taken(self, index: int) -> Counter[int]:
        return Counter(row for batch in self.step(index) for row in batch.rows)


@settings(max_examples=300, deadline=None)
@given(cases)
def test_no_row_is_lost_or_doubled(case: Case) -> None:
    """A run that is cut after any step, and goes on with another split, takes what the unbroken one takes."""
    whole = AllRanks(case, case.first)
    rest = AllRanks(case, case.second, whole.step_items)
    assert rest.steps_per_epoch == whole.steps_per_epoch
    steps = range(case.epochs * whole.steps_per_epoch)
    cut = min(case.cut, len(steps))
    taken = [(whole if step < cut else rest).rows_taken(step) for step in steps]
    assert taken == [whole.rows_taken(step) for step in steps]
    for epoch in range(case.epochs):
        mine = taken[epoch * whole.steps_per_epoch : (epoch + 1) * whole.steps_per_epoch]
        assert sum(mine, Counter()) == Counter(range(len(case.lengths)))
    assert rest.seen(cut) == whole.seen(cut)


class Toy(nn.Module):
    """The next token from this one alone, by a table."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, 6, generator=draw))
        self.head = nn.Parameter(torch.randn(VOCABULARY, 6, generator=draw))

    def forward(self, batch: Batch) -> Tensor:
        seen = batch.ids.flatten()[batch.index]
        return F.cross_entropy(F.embedding(seen, self.table) @ self.head.T, batch.targets, reduction="sum")


class Disk:
    """Checkpoints in memory, as JSON and host copies; and metrics, a line a step. Outlives the runs that write it."""

    failed = False

    def __init__(self) -> None:
        self.kept: dict[int, tuple[str, dict[str, Rows]]] = {}
        self.lines: list[dict[str, Any]] = []

    def use(self, model: nn.Module, optimizer: Optimizer) -> None:
        """The next run's."""
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for name, state in optimizer.state().items():
            tensors |= {f"{kind}.{name}": tensor.view(-1) for kind, tensor in state.items()}
        self.live = {name: Rows(tuple(t.shape), {(0,) * t.ndim: t}) for name, t in tensors.items()}

    def save(self, state: dict[str, Any], *, goes_on: bool, wait: bool) -> float:
        taken = HostCopy().take(self.live)
        assert taken is not None
        self.kept[state["step"]] = json.dumps(state), taken.rows
        return 0.0

    def settle(self) -> None:
        """Nothing fails here."""

    def restore(self, loop: Loop) -> None:
        if self.kept:
            state, rows = self.kept[max(self.kept)]
            loop.restore(json.loads(state))
            for name, row in self.live.items():
                for place, part in row.boxes.items():
                    part.copy_(rows[name].boxes[place])
        self.lines = [line for line in self.lines if line["step"] <= loop.step]

    def write(self, **values: Any) -> None:
        self.lines.append({key: value for key, value in values.items() if key not in CLOCK})

    def epoch(self, *_: Any) -> None:
        """It has no line."""


class Killed(BaseException):
    """Nothing on the way takes it for an error."""


class Cut(Interrupt):
    """While step `step` is made ready: a signal, after which a run saves; or the end, after which it does not."""

    def __init__(self, step: int, place: str) -> None:
        super().__init__()
        self._left, self._place = step, place

    @property
    def asked(self) -> bool:
        self._left -= 1
        if self._left == 0 and self._place == "before":
            raise Killed
        return self._left == 0 and self._place == "signal"


def run(case: Case, split: Split, disk: Disk, step_items: int | None = None, cut: int = 0) -> dict[str, Tensor]:
    """From the newest checkpoint to the end, or into step `cut`; the weights then."""
    log.quiet()
    model, data = Toy(), AllRanks(case, split, step_items)
    optimizer = Optimizer(dict(model.named_parameters()), lr=0.05)
    disk.use(model, optimizer)
    here = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "machine": 0}
    plan = Plan(
        total_steps=case.epochs * data.steps_per_epoch,
        eval_steps=0,
        eval_first=False,
        max_eval_batches=0,
        clip=1.0,
        prefetch=0,
        lr=lambda step: 0.05 / step,
        save_steps=case.save_steps,
    )
    loop = Loop(
        model,
        optimizer,
        data,  # type: ignore[arg-type]
        None,
        place=Place(device=torch.device("cpu"), store=dist.HashStore(), **here),
        plan=plan,
        sinks=Sinks(metrics=disk, save=None, note=lambda **_: None, checkpoints=disk),  # type: ignore[arg-type]
        interrupt=Cut(cut, case.place),
    )
    disk.restore(loop)
    if cut and case.place in ("backward", "update"):
        break_in(loop, cut, case.place)
    loop.run()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def break_in(loop: Loop, at: int, place: str) -> None:
    """Step `at` ends after its first backward, or in the middle of its update."""
    forward, update, forwards, updates = loop.model.forward, loop.optimizer.step, [0], [0]

    def half_a_backward(batch: Batch) -> Tensor:
        forwards[0] += loop.step == at - 1
        if forwards[0] == 2:
            raise Killed
        return forward(batch)  # type: ignore[no-any-return]

    def half_an_update(*args: Any, **more: Any) -> None:
        updates[0] += 1
        if updates[0] == at:
            next(iter(loop.model.parameters())).data.fill_(0)
            raise Killed
        update(*args, **more)

    if place == "update":
        loop.optimizer.step = half_an_update  # type: ignore[method-assign]
    else:
        loop.model.forward = half_a_backward  # type: ignore[method-assign]


def cut_and_on(case: Case, second: Split) -> tuple[Disk, dict[str, Tensor]]:
    """A run that ends in step `case.cut`, if it comes so far, and one that goes on from what was kept."""
    disk, first = Disk(), AllRanks(case, case.first)
    with contextlib.suppress(Killed, Stopped):
        run(case, case.first, disk, cut=min(case.cut, case.epochs * first.steps_per_epoch))
    return disk, run(case, second, disk, first.step_items)


@settings(max_examples=100, deadline=None)
@given(cases)
def test_the_same_split_goes_on_bit_for_bit(case: Case) -> None:
    whole = Disk()
    weights = run(case, case.first, whole)
    disk, ours = cut_and_on(case, case.first)
    assert disk.lines == whole.lines
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights.items())
    assert json.loads(disk.kept[max(disk.kept)][0])["tokens_total"] == whole.lines[-1]["tokens_total"]


@settings(max_examples=100, deadline=None)
@given(cases)
def test_another_split_goes_on_along_the_same_curve(case: Case) -> None:
    whole = Disk()
    run(case, case.first, whole)
    disk, _ = cut_and_on(case, case.second)
    for key in ("step", "epoch", "lr", "tokens", "tokens_total"):
        assert [line[key] for line in disk.lines] == [line[key] for line in whole.lines]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in disk.lines] == pytest.approx([line[key] for line in whole.lines], rel=1e-4)


def test_a_run_that_begins_its_data_anew_would_be_noticed() -> None:
    """The commonest mistake: weights and optimizer are back, and the rows are those of the first epoch's beginning."""
    split = Split(2, 1, 1)
    case = Case(tuple(range(2, 10)), "padding", 3, 2, split, split, 1, 3, "before")
    whole = Disk()
    run(case, split, whole)
    with pytest.MonkeyPatch.context() as patch:
        restore = Disk.restore

        def forgets(self: Disk, loop: Loop) -> None:
            restore(self, loop)
            order, done = loop.train.step, loop.step
            loop.train.step = lambda index, pieces=1: order(index - done, pieces)  # type: ignore[method-assign]

        patch.setattr(Disk, "restore", forgets)
        disk, _ = cut_and_on(case, split)
    assert [line["step"] for line in disk.lines] == [line["step"] for line in whole.lines]
    assert disk.lines != whole.lines
