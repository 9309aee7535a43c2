"""The parts of `python -m bench.multi_gpu`: which runs are made, what is read from them, and the table of it.

    right, scaling, large, saving       a Part each, of a Plan: what to run on, and in which size
    same                                whether two runs took the same steps

All of part 1 are steps of the same packs of documents; documents are of 64 different ids, so that every loss is below
the one before, and a run that lost its place, its rows or its optimizer's state would be seen.
"""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.multi_gpu_plan import RANK, Part, Plan, Tolerance
from bench.overlap import overlap
from bench.runs import GIB, Job, Outcome, Train, checkpoints, kill_a_worker
from bench.shapes import checkpoint

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
LORA = f"--use_peft --lora_config.r {RANK} --lora_config.lora_alpha 32 --target_modules all-linear".split()
FLOAT8 = [*LORA, "--quantization", "fp8"]
FULL = ["--fsdp_config.pure_bf16", "--optimizer", "anyprecision", "--activation_checkpointing", "selective"]
SPEED = ["--lora_dropout", "0", "--activation_checkpointing", "none"]
KINDS = {"LoRA": LORA, "LoRA, float8 base": FLOAT8, "LoRA, 4-bit base": [*LORA, "--quantization", "4bit"], "full": []}
SCALED = {"LoRA": [*LORA, *SPEED], "LoRA, float8 base": [*FLOAT8, *SPEED], "full": FULL}
"""Recomputation is fixed: what `auto` chooses depends on the memory that is left, so on the number of GPUs."""

BARS = {"LoRA": 0.95, "LoRA, float8 base": 0.95, "full": 0.90}
"""Of one GPU's tokens/s, wanted of each of eight."""

CURVE, PER_PACK = 24, 4
"""Steps of a run of part 1, and documents of a pack."""

SAVE_STEPS, KILL_STEP = 6, 14
"""Of part 1's run whose worker is killed."""

FIRST_TIMED = 8
"""Steps of part 2 that are not counted: six are the profiler's, and what it writes delays the next ones."""

LARGE_STEPS, WARM_UP = 10, 3
"""Of part 3."""

SAVE_AT = 10
"""Of part 4: the step whose checkpoint is timed. The next one, as many steps later, waits for it."""

CHECKPOINT_SECONDS = 150
"""Part 3 writes for no longer."""


def same(ours: Outcome, theirs: Outcome, tolerance: Tolerance, since: int = 0) -> tuple[dict[str, float], str]:
    """(relative differences: first loss, first norm, any loss, and that of a curve one step off; the verdict).

    What a curve one step off would show is looked for behind step `since`, where the run went on.
    """
    if ours.failed is not None:
        return {}, ours.failed
    if theirs.failed is not None:
        return {}, f"nothing to compare with: {theirs.failed}"
    if not ours.steps or [line["step"] for line in ours.steps] != [line["step"] for line in theirs.steps]:
        return {}, f"differs: {len(ours.steps)} steps, {len(theirs.steps)} wanted"
    losses, wanted = ([line["loss"] for line in one.steps] for one in (ours, theirs))
    differences = {
        "loss": _apart(losses[0], wanted[0]),
        "norm": _apart(ours.steps[0]["grad_norm"], theirs.steps[0]["grad_norm"]),
        "curve": max(map(_apart, losses, wanted)),
        "one step off": max(map(_apart, wanted[since + 1 :], wanted[since:]), default=0.0),
    }
    wrong = [name for name in ("loss", "norm", "curve") if differences[name] > getattr(tolerance, name)]
    if wrong:
        return differences, f"differs: {', '.join(wrong)}"
    flat = differences["one step off"] < 2 * tolerance.curve
    return differences, "proves nothing: the curve is too flat" if flat else "same"


def _resumed_at(outcome: Outcome) -> int:
    """The step of the checkpoint that a run went on from; 0 if it began at its beginning."""
    found = re.search(r"goes on from .*, after step (\d+)", outcome.said)
    return int(found[1]) if found else 0


def _apart(one: float | None, other: float | None) -> float:
    if one is None or other is None:  # was not finite
        return float("inf")
    return abs(one - other) / max(abs(other), 1e-30)


def right(plan: Plan) -> Part:
    """Part 1."""
    packs, limit = max(4, plan.most), plan.size.tolerance
    singles = [_small(plan, f"1-{number}-one", flags, 1, packs) for number, flags in enumerate(KINDS.values())]
    alone = dict(zip(KINDS, plan.machine.beside(singles, 1), strict=True))
    found: list[tuple[str, int, Outcome, Outcome]] = []
    for workers, strategies in ((2, STRATEGIES[:3]), (4, STRATEGIES[3:])):
        if workers <= plan.most:
            pairs = [(kind, how) for kind in KINDS for how in strategies if _wanted(plan, kind, how)]
            jobs = [_pair(plan, kind, how, workers, packs) for kind, how in pairs]
            for (kind, how), outcome in zip(pairs, plan.machine.beside(jobs, workers), strict=True):
                found.append((f"{kind}, {how}", workers, outcome, alone[kind]))
    if plan.most > 1:
        found.append(_broken(plan, packs))
    rows, verdicts = [], []
    for label, workers, ours, theirs in found:
        differences, verdict = same(ours, theirs, limit, _resumed_at(ours))
        verdicts.append("refused" if ours.refused else verdict)
        rows.append(f"| {label} | {workers} | {_shown(ours, differences)} | {verdict} |")
    counts = {name: verdicts.count(name) for name in ("same", "refused")}
    wrong = len(verdicts) - sum(counts.values())
    return Part(
        f"1: right? Against one GPU, {packs} packs a step. Same: apart by no more than {limit.loss:g} (first loss), "
        f"{limit.norm:g} (first norm), {limit.curve:g} (any loss), where a curve one step off is twice that apart",
        "| GPUs | first loss | apart | first norm | apart | any loss, apart | one step off | verdict",
        rows,
        f"{counts['same']} of {len(verdicts)} the same, {counts['refused']} refused, {wrong} not right",
        good=wrong == 0 and bool(verdicts),
    )


def _wanted(plan: Plan, kind: str, how: str) -> bool:
    return plan.size.whole or kind == "LoRA" or how == "FULL_SHARD"


def _pair(plan: Plan, kind: str, how: str, workers: int, packs: int) -> Job:
    flags = [*KINDS[kind], "--sharding_strategy", how]
    if how == "HYBRID_SHARD":
        flags += ["--sharding_group_size", str(workers // 2)]
    return _small(plan, f"1-{list(KINDS).index(kind)}-{how}", flags, workers, packs)


def _small(plan: Plan, name: str, flags: Sequence[str], workers: int, packs: int, **more: Any) -> Job:
    """A run of part 1: the same packs in each of its steps on any number of workers."""
    length, rows = plan.size.document, CURVE * packs * PER_PACK
    words = plan.words(plan.size.small, rows=rows, length=length, context=PER_PACK * length, batch=1)
    rate = plan.size.rates["--use_peft" not in flags]
    words += ["--synthetic_dataset.vocab_size", "64", "--lr", str(rate)]
    words += ["--gradient_accumulation_steps", str(packs // workers)]
    return Job(name, [*words, *flags], plan.size.limits[0], **more)


def _broken(plan: Plan, packs: int) -> tuple[str, int, Outcome, Outcome]:
    """(what it is, GPUs it ended on, that run, the one that nothing happened to)."""
    most, half, saves = plan.most, plan.most // 2, ["--save_steps", str(SAVE_STEPS)]
    whole = plan.machine.run(_small(plan, "1-whole", [], most, packs), most)
    watch = kill_a_worker(KILL_STEP)
    broken = plan.machine.run(_small(plan, "1-broken", saves, most, packs, watch=watch), most)
    label = f"full, kill -9 on {most}"
    if broken.failed is None or not checkpoints(plan.machine.folder / "1-broken"):
        return label, most, replace(broken, failed="it was not killed, or had not saved"), whole
    found = plan.machine.run(_small(plan, "1-broken", saves, half, packs), half)
    if found.failed is None and _resumed_at(found) == 0:
        found = replace(found, failed="it did not go on from a checkpoint")
    return f"{label}, on from step {_resumed_at(found)}", half, found, whole


def _shown(found: Outcome, differences: dict[str, float]) -> str:
    """Part 1's cells between GPUs and verdict."""
    if not differences:
        return " | " * 5
    first, apart = found.steps[0], [f"{value:.1e}" for value in differences.values()]
    norm = f"{first['grad_norm'] or float('nan'):.5f}"
    return f"{first['loss'] or float('nan'):.5f} | {apart[0]} | {norm} | {apart[1]} | {apart[2]} | {apart[3]}"


def scaling(plan: Plan) -> Part:
    """Part 2."""
    kinds = [kind for kind in SCALED if plan.size.whole or "float8" not in kind]
    found: dict[tuple[str, int], Outcome] = {}
    # where time is short, the numbers in between are what is left out
    for workers in sorted(plan.counts, key=lambda n: (n not in (plan.counts[0], plan.most), n)):
        jobs = [_scaled(plan, kind, workers) for kind in kinds]
        for kind, outcome in zip(kinds, plan.machine.beside(jobs, workers), strict=True):
            found[kind, workers] = outcome
    rows, sums, good = [], [], True
    for kind in kinds:
        base: tuple[int, float] | None = None
        for workers in plan.counts:
            outcome = found[kind, workers]
            if (rate := _rate(outcome, workers, FIRST_TIMED)) is None:
                rows.append(f"| {kind} | {workers} | {outcome.failed or 'too few steps'} | | | | |")
                good &= outcome.refused or workers < plan.most
                continue
            base = base or (workers, rate)
            share = rate / base[1]
            shares = _shares(plan.machine.folder / _scaled(plan, kind, workers).name / "run/profile")
            mfu = plan.mfu(plan.size.middle, SCALED[kind], rate)
            figures = f"{rate:,.0f} | {share:.1%} of {base[0]} | {mfu} | {outcome.steps[-1]['memory_gb']:.1f}"
            rows.append(f"| {kind} | {workers} | {figures} | {shares} |")
            if workers == plan.most > base[0]:
                sums.append(f"{kind} {share:.1%} at {workers}{_bar(plan, kind, share)}")
    return Part(
        f"2: scaling of 8B's shape, FULL_SHARD, 2 x {plan.size.length} tokens a GPU and step; "
        "runs of fewer GPUs were side by side",
        "| GPUs | tokens/s/GPU | efficiency | MFU | peak GiB | exposed, all communication, idle",
        rows,
        "; ".join(sums) or "nothing to compare",
        good=good,
    )


def _scaled(plan: Plan, kind: str, workers: int) -> Job:
    """All are profiled, one GPU's too: what the profiler leaves behind should slow all alike."""
    length, rows = plan.size.length, 2 * workers * plan.size.steps
    words = plan.words(plan.size.middle, rows=rows, length=length, context=length, batch=2)
    flags = [*words, *SCALED[kind], "--use_profiler"]
    return Job(f"2-{list(SCALED).index(kind)}-{workers}", flags, plan.size.limits[1])


def _shares(profile: Path) -> str:
    try:
        return ", ".join(f"{share:.1%}" for share in overlap(profile))
    except (OSError, ValueError) as error:
        return f"no trace: {error}"


def _bar(plan: Plan, kind: str, share: float) -> str:
    if not plan.gpu or plan.most < 8:
        return ""
    return f" ({BARS[kind]:.0%} wanted: {'met' if share >= BARS[kind] else 'missed'})"


def _rate(outcome: Outcome, workers: int, first: int) -> float | None:
    """Tokens a second of one GPU: the median of steps that are timed alone, which the last two are not."""
    if outcome.failed is not None or len(outcome.steps) < first + 3:
        return None
    return float(statistics.median(line["tokens_per_second"] for line in outcome.steps[first:-2])) / workers


def large(plan: Plan) -> Part:
    """Part 3."""
    length, workers, shape = plan.size.length, plan.most, plan.size.large
    folder = plan.machine.folder / "large"
    layers, size = checkpoint(folder, shape, min(CHECKPOINT_SECONDS, plan.machine.left() / 2))
    whole = layers == shape["num_hidden_layers"]
    drawn = plan.words(shape, rows=workers * LARGE_STEPS, length=length, context=length, batch=1)
    loaded = ["--model_name", str(folder), *drawn[2:]]
    model = loaded if whole else drawn
    jobs = {"LoRA": [*model, *LORA], "LoRA, float8 base": [*model, *FLOAT8]}
    if not whole:
        jobs[f"LoRA of the {layers} layers on the disk"] = [*loaded, *LORA]
    rows, sums, good = [], [], True
    for number, (kind, flags) in enumerate(jobs.items()):
        outcome = plan.machine.run(Job(f"3-{number}", flags, plan.size.limits[2]), workers)
        if (rate := _rate(outcome, workers, WARM_UP)) is None or outcome.first_step is None:
            rows.append(f"| {kind} | {outcome.failed or 'too few steps'} | | | | | |")
            good &= outcome.refused
            continue
        mfu = plan.mfu(shape | {"num_hidden_layers": shape["num_hidden_layers"] if number < 2 else layers}, flags, rate)
        private, resident = outcome.memory.private / GIB, outcome.memory.resident / GIB
        figures = f"{rate:,.0f} | {mfu} | {outcome.steps[-1]['memory_gb']:.1f} | {outcome.first_step:.1f}"
        rows.append(f"| {kind} | {figures} | {private:.1f} | {resident:.1f} |")
        sums.append(f"{kind} {rate:,.0f} tokens/s/GPU, {private:.1f} GiB of host memory")
    shutil.rmtree(folder)
    kept = "loaded by both" if whole else f"loaded by the last run ({layers} layers); the others drew their weights"
    return Part(
        f"3: 70B's shape on {workers}, 1 x {length} tokens a GPU and step; "
        f"a checkpoint of {size / GIB:.3g} GiB, {kept}",
        "| tokens/s/GPU | MFU | peak GiB | first step after, s | host GiB until then, private | with mapped files",
        rows,
        "; ".join(sums) or "no run",
        good=good,
    )


def saving(plan: Plan) -> Part:
    """Part 4."""
    rows, sums, good = [], [], True
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        found = _saved(plan, kind)
        if isinstance(found, str):
            rows.append(f"| {kind} | {found} | | | | | |")
            good = False
            continue
        stall, again = found[1], found[4]
        rows.append(f"| {kind} | {' | '.join(found)} |")
        sums.append(f"{kind}: stands still for {stall} s, {again} s to go on")
    return Part(
        f"4: a checkpoint of 8B's shape on {plan.most}, every weight trained (bf16 weights and moments)",
        "| GB | stall, s | on the disk after, s | steps meanwhile | going on, to its first step, s | a fresh start, s",
        rows,
        "; ".join(sums) or "none",
        good=good,
    )


def _saved(plan: Plan, kind: str) -> list[str] | str:
    """A row's cells, or what went wrong: a run that is killed once its checkpoint counts, and the same one again."""
    length, clock, limit, folder = plan.size.length, Clock(), plan.size.limits[3], plan.machine.folder / f"4-{kind}"
    rows = 2 * plan.most * plan.size.saving_steps
    words = plan.words(plan.size.middle, rows=rows, length=length, context=length, batch=2)
    flags = [*words, *FULL, "--save_steps", str(SAVE_AT), "--checkpoint_type", kind]
    saved = plan.machine.run(Job(folder.name, flags, limit, clock.saved), plan.most)
    if saved.failed is not None or clock.done is None:
        return saved.failed or "no checkpoint was written"
    size = sum(file.stat().st_size for file in checkpoints(folder)[-1].iterdir())
    again = plan.machine.run(Job(folder.name, flags, limit, Train.stepped), plan.most)
    shutil.rmtree(folder)
    if again.failed is not None or _resumed_at(again) == 0:
        return f"not gone on with: {again.failed or 'it began at its beginning'}"
    usual, busy = ([line["step_time"] for line in saved.steps[a:b]] for a, b in ((3, SAVE_AT), (SAVE_AT + 1, None)))
    slower = f"{statistics.median(busy) / statistics.median(usual) - 1:+.0%}" if busy else "none ended"
    times = [f"{seconds or 0.0:.1f}" for seconds in (clock.done, again.first_step, saved.first_step)]
    return [f"{size / 1e9:.3g}", f"{clock.stall(saved):.2f}", times[0], slower, *times[1:]]


class Clock:
    """How long the checkpoint of step SAVE_AT takes, seen from outside, to about 0.02 s."""

    def __init__(self) -> None:
        self._saves: float | None = None
        self._goes_on: float | None = None
        self.done: float | None = None
        """Seconds from the step to the whole checkpoint on the disk."""

    def saved(self, run: Train) -> bool:
        """A `watch`: whether the checkpoint is there, and a step after it."""
        step, now = run.step(), time.monotonic()
        if step >= SAVE_AT:
            self._saves = self._saves or now
        if step > SAVE_AT:
            self._goes_on = self._goes_on or now
        if self._saves is not None and self.done is None and checkpoints(run.out):
            self.done = now - self._saves
        return self.done is not None and self._goes_on is not None

    def stall(self, saved: Outcome) -> float:
        """Seconds between the line of the step that saves and the begin of the next one, whose line has its time."""
        following = next(float(line["step_time"]) for line in saved.steps if line["step"] == SAVE_AT + 1)
        return max(0.0, (self._goes_on or 0.0) - (self._saves or 0.0) - following)


PARTS: dict[int, Callable[[Plan], Part]] = {1: right, 2: scaling, 3: large, 4: saving}
