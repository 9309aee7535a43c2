"""One rank of `packtrain verify`: both proofs, and the table."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from packtrain import log
from packtrain.building import Inputs
from packtrain.checkpoint.places import output_root
from packtrain.commands import verify_numbers, verify_resume
from packtrain.commands.verify_numbers import Row
from packtrain.configs.run import RunConfig
from packtrain.distributed.place import Place
from packtrain.train.interrupt import Interrupt


def run(cfg: RunConfig, place: Place, inputs: Inputs, interrupt: Interrupt) -> dict[str, Any]:
    """`ok`, the same on every rank; rank 0 prints the table. Leaves no file."""
    root = output_root(cfg)
    if place.rank == 0:
        shutil.rmtree(root, ignore_errors=True)
    interrupt.last_word = lambda text: shutil.rmtree(root, ignore_errors=True)
    try:
        numbers = verify_numbers.rows(cfg, place, inputs)
        resume = verify_resume.rows(cfg, place, inputs)
        ok = place.agree("verify/ok", lambda: all(row.ok for row in (*numbers, *resume)))
    finally:
        if place.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
    if place.rank == 0:
        precision = verify_numbers.precision(cfg, place)
        print(table(f"one step on {place.world_size} ranks ({precision}) against plain fp32 on one", numbers))
        print(table("a run that was stopped and went on, against one that was not", resume))
    log.say("verify: everything is within its bound" if ok else "verify: NOT everything is within its bound")
    return {"ok": ok}


def table(title: str, rows: Sequence[Row]) -> str:
    """For people: a line a comparison."""
    width = max(len(row.name) for row in rows)
    lines = [f"{title}:", f"  {'':<{width}}  {'ours':>14}  {'reference':>14}  {'difference':>10}  {'bound':>8}"]
    for row in rows:
        figures = f"{row.ours:>14.8g}  {row.reference:>14.8g}  {row.difference:>10.2e}  {row.bound:>8.1e}"
        lines.append(f"  {row.name:<{width}}  {figures}  {'ok' if row.ok else 'NOT OK'}")
    return "\n".join(lines)
