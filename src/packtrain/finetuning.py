"""The story of one run, top to bottom; with building.py, the only file that knows all the rooms.

run             claim the folder, train, save, and what the run leaves behind
Saver           the model as others read it
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from packtrain import log, peft
from packtrain.building import Inputs, build, loaders, optimizer_of, total_steps
from packtrain.checkpoint import adapter as adapter_files
from packtrain.checkpoint.dcp import saving_group
from packtrain.checkpoint.dcp_folder import newest
from packtrain.checkpoint.dcp_run import Checkpoints, Resumed
from packtrain.checkpoint.hf import config_of, copy_side_files, expected_shapes, mirror, save_model
from packtrain.checkpoint.owner import Owner
from packtrain.checkpoint.places import checkpoint_root, output_root
from packtrain.checkpoint.store import Claim, begun, claim, read_json
from packtrain.configs.run import RunConfig
from packtrain.data.loader import Loader
from packtrain.distributed import parent
from packtrain.distributed.place import Place
from packtrain.errors import Stopped, UserError
from packtrain.model.llama import LlamaForCausalLM
from packtrain.optim import Optimizer
from packtrain.peft.trainable import count_line, trainable
from packtrain.precision import precision_line, weight_dtype
from packtrain.train.health import Policy
from packtrain.train.interrupt import Interrupt, StoppedEarly
from packtrain.train.invariants import FirstSteps, same_start
from packtrain.train.listeners import listeners_of, recipes_file
from packtrain.train.loop import Loop
from packtrain.train.measure import watch_of
from packtrain.train.metrics import MetricsFile, cut
from packtrain.train.plan import Plan, Sinks
from packtrain.train.recipes_metrics import JOURNAL
from packtrain.train.record import Record
from packtrain.train.shortage import Shortage
from packtrain.train.words import batch_line, sharding_line


def run(cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt) -> dict[str, Any]:
    """Train, save, and say how it went: returns what result.json holds (the same on every rank).

    Raises Stopped when a signal ended the run after saving, UserError when the folder is not this run's to use.
    """
    with Owner(output_root(cfg)) as owner:
        return _run(cfg, place, inputs, interrupt, owner)


def _run(cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt, owner: Owner) -> dict[str, Any]:
    root = output_root(cfg)
    claimed, folder = place.agree("claim", lambda: _claim(cfg, place, inputs, owner))
    if claimed == Claim.FINISHED.value:
        log.say(f"{root} holds this very run, finished; nothing to do (--overwrite_output_dir trains again)")
        return read_json(root / "run" / "result.json") or {}
    resumed = None if folder is None else Resumed.read(Path(folder))
    if resumed is not None and not resumed.state["optimizer"]:
        _nothing_to_come(cfg, place, inputs, resumed)
    tries = {"launch": parent.launch_id(), "restarts": parent.attempt()}
    record = Record(cfg, root, leads=place.rank == 0, fingerprint=inputs.fingerprint, skipped=inputs.skipped, **tries)
    interrupt.last_word = partial(record.finish, "failed")
    try:
        results = _train(cfg, place, inputs, interrupt, record, resumed)
    except (Stopped, StoppedEarly) as end:
        record.finish("stopped", str(end) if isinstance(end, Stopped) else "stopped by a signal before the first step")
        raise
    except BaseException as error:
        record.finish("failed", place.first_cause(error) or f"{type(error).__name__}: {error}")
        raise
    return record.finish("done", None, **results)


def _claim(cfg: RunConfig, place: Place, inputs: Inputs, owner: Owner) -> tuple[str, str | None]:
    """(what the folder means for this run, the checkpoint to go on from)."""
    train, steps = cfg.train_config, checkpoint_root(cfg)
    owner.take()
    claimed = claim(
        output_root(cfg),
        inputs.fingerprint,
        overwrite=train.overwrite_output_dir and not begun(output_root(cfg), parent.launch_id()),
        checkpoints=steps,
        step_items=train.batch_size_training * train.gradient_accumulation_steps * place.world_size,
        allow_change=train.allow_change,
    )
    return claimed.value, str(newest(steps)) if claimed is Claim.RESUME else None


def _train(
    cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt, record: Record, resumed: Resumed | None
) -> dict[str, Any]:
    train = cfg.train_config
    training, validation = loaders(cfg, inputs, place, resumed.step_items if resumed else None)
    steps = total_steps(cfg, training.steps_per_epoch)
    log.say(batch_line(cfg, place, training, steps))
    log.say(sharding_line(cfg, place))
    model = build(cfg, inputs, place, weights=resumed is None or inputs.adapter is not None)
    log.say(count_line(model))
    dtypes = {parameter.dtype for parameter in trainable(model).values()}
    log.say(precision_line(cfg, weight_dtype(cfg, place.device), dtypes))
    optimizer, lr = optimizer_of(cfg, model, training.steps_per_epoch, steps)
    changed = resumed.changed(inputs.fingerprint) if resumed else []
    checkpoints = _checkpoints(cfg, inputs, place, model, optimizer, training, record, changed)
    metrics_file = recipes_file(cfg, place, record.root, record.run)
    if resumed is not None:
        checkpoints.restore(resumed)
        for change in changed:
            log.say("after step {after_step} {name} was changed from {was} to {now}".format(**change))
        record.note(resumed_from=str(resumed.folder), last_checkpoint=str(resumed.folder), step=resumed.step)
        record.note(changed=changed)
        if place.rank == 0:
            for name in ("metrics.jsonl", *([JOURNAL] if metrics_file is not None else [])):
                cut(record.run / name, resumed.step, evaluated=not resumed.state["owed"])
    listeners = listeners_of(cfg, record.run, metrics_file) if place.rank == 0 else []
    metrics = MetricsFile(record.run / "metrics.jsonl" if place.rank == 0 else None, listeners)
    saver = Saver(cfg, model, inputs, record.root, place)
    sinks = Sinks(
        metrics=metrics,
        save=saver.save if train.save_model else None,
        note=record.note,
        suspects=record.run / "suspects.jsonl" if place.rank == 0 else None,
        shortage=Shortage(cfg, model, optimizer, place).fault,
        checkpoints=checkpoints if train.save_model or train.save_steps or train.save_minutes else None,
    )
    watch = watch_of(cfg, model, place, record.run, steps)
    same_start(place, inputs.fingerprint, training, model)
    loop = Loop(
        model,
        optimizer,
        training,
        validation,
        place=place,
        plan=_plan(cfg, steps, lr),
        sinks=sinks,
        interrupt=interrupt,
        watch=watch,
        first_steps=FirstSteps(model, optimizer, place),
    )
    if resumed is not None:
        loop.restore(resumed.state)
    interrupt.begin()
    if train.save_steps or train.save_minutes:
        checkpoints.prepare()
    results: dict[str, Any] | None = None
    try:
        loop.run()
        results = _results(cfg, loop, record.root) | watch.finish()
        if metrics_file is not None:
            results["metrics_filename"] = str(metrics_file)
    except Exception as error:
        if not isinstance(error, Stopped):
            place.report(error)  # before a checkpoint is waited for
        raise
    finally:
        checkpoints.close()
        metrics.close(results)
    return results


def _plan(cfg: RunConfig, steps: int, lr: Callable[[int], float]) -> Plan:
    train = cfg.train_config
    return Plan(
        total_steps=steps,
        eval_steps=train.eval_steps,
        eval_first=train.eval_first,
        max_eval_batches=train.max_eval_step,
        clip=train.gradient_clipping_threshold if train.gradient_clipping else None,
        prefetch=1 if train.num_workers_dataloader else 0,
        lr=lr,
        save_steps=train.save_steps,
        save_seconds=60 * train.save_minutes,
        policy=Policy(
            on_nonfinite=train.on_nonfinite,
            on_spike=train.on_spike,
            most_skips=train.max_skipped_steps,
            rollback_steps=train.rollback_steps,
        ),
        splits=train.on_oom == "split",
    )


def _checkpoints(
    cfg: RunConfig,
    inputs: Inputs,
    place: Place,
    model: LlamaForCausalLM,
    optimizer: Optimizer,
    training: Loader,
    record: Record,
    changed: list[dict[str, Any]],
) -> Checkpoints:
    train, adapter = cfg.train_config, inputs.adapter
    if adapter is not None:
        config = peft.method_of(adapter).config_dict(adapter, str(train.model_name))
    else:
        config = config_of(inputs.config_json, expected_shapes(model), weight_dtype(cfg, place.device))
    return Checkpoints(
        checkpoint_root(cfg),
        model,
        optimizer,
        place=place,
        group=saving_group(),
        adapter=adapter is not None,
        config=config,
        facts={
            "root": str(output_root(cfg).resolve()),
            "seed": train.seed,
            "step_items": training.step_items,
            "model_name": train.model_name,
            "tokenizer_name": train.tokenizer_name or train.model_name,
            "fingerprint": inputs.fingerprint,
            "changed": changed,
        },
        kind=cfg.fsdp_config.checkpoint_type,
        keep=train.keep_checkpoints,
        keep_optimizer=train.save_optimizer,
        note=record.note,
    )


def _nothing_to_come(cfg: RunConfig, place: Place, inputs: Inputs, resumed: Resumed) -> None:
    """Raise UserError if steps are to follow on a checkpoint that has no optimizer's state."""
    training, _ = loaders(cfg, inputs, place, resumed.step_items)
    if resumed.step < (steps := total_steps(cfg, training.steps_per_epoch)):
        raise UserError(
            f"{resumed.folder}: is the end of a run of {resumed.step} steps and was saved without the optimizer's "
            f"state, so that it cannot go on to step {steps}; --save_optimizer keeps that, from a run's start"
        )


def _results(cfg: RunConfig, loop: Loop, root: Path) -> dict[str, Any]:
    saves = cfg.train_config.save_model
    return loop.averages.results() | {
        "best_eval_loss": loop.best_loss if loop.best_step else None,
        "best_step": loop.best_step or None,
        "last": str(root) if saves else None,
        "best": str(root / "best") if saves and loop.best_step else None,
        "tokens_total": loop.tokens_total,
        "tokens_per_second": loop.inputs_total / loop.step_seconds,
    }


class Saver:
    """Writes the last state to the root, and mirrors it to best/ when it is the best; every rank calls it."""

    def __init__(self, cfg: RunConfig, model: LlamaForCausalLM, inputs: Inputs, root: Path, place: Place) -> None:
        self._cfg, self._model, self._inputs, self._root, self._place = cfg, model, inputs, root, place
        self._saves = 0

    def save(self, best: bool) -> float:
        """Seconds it took. Every rank stays until the files are there: none may end while the leader still writes."""
        began = time.monotonic()
        self._saves += 1
        leads = self._place.rank == 0
        adapter = self._inputs.adapter
        if adapter is not None:
            config = peft.method_of(adapter).config_dict(adapter, str(self._cfg.train_config.model_name))
            adapter_files.save_adapter(self._model, self._root, config, leads=leads)
        else:
            save_model(self._model, self._root, self._inputs.config_json, leads=leads)
        if leads:
            self._write_side_files(best)
            self._place.tell(f"saved/{self._saves}", True)
        self._place.wait_for(f"saved/{self._saves}")
        if adapter is not None:
            adapter_files.compare(self._model, self._root)
        return time.monotonic() - began

    def _write_side_files(self, best: bool) -> None:
        inputs = self._inputs
        if inputs.weights is not None and inputs.adapter is None:
            # a tokenizer that is saved by itself may be another, with other files
            copy_side_files(inputs.weights.path, self._root, tokenizer=inputs.tokenizer is None)
        if inputs.tokenizer is not None:
            inputs.tokenizer.save_pretrained(self._root)
        if best:
            mirror(self._root, self._root / "best")


if __name__ == "__main__":  # llama-recipes' python -m llama_cookbook.finetuning: here too, upward just this once
    from packtrain.cli import train

    sys.exit(train(sys.argv[1:]))
