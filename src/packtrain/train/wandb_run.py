"""`--use_wandb`: a run at Weights & Biases, with llama-recipes' names. Imported, and anything sent, only if asked."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packtrain.errors import UserError
from packtrain.train.metrics import finite_or_none, perplexity

PASSED_ON = ("epoch", "step", "loss", "grad_norm", "lr", "tokens_per_second", "memory_gb")
"""Of a step's line, under train/."""


def problems() -> list[str]:
    """A sentence if wandb is not installed."""
    if importlib.util.find_spec("wandb") is not None:
        return []
    return ["--use_wandb: needs wandb, which is not installed here: pip install wandb"]


class WandbRun:
    """Tells Weights & Biases what a run's metrics.jsonl says. `settings` are wandb_config's, `config` the run's."""

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
        """Raises UserError if the run cannot be opened there (no login, no network)."""
        wandb: Any = importlib.import_module("wandb")
        try:
            # wandb's own files stay in the run's folder, unless its variable says otherwise
            self._run = wandb.init(**settings, config=dict(config), dir=os.environ.get("WANDB_DIR", str(folder)))
        except Exception as error:
            raise UserError(
                f"--use_wandb: wandb.init failed ({type(error).__name__}: {error}); run `wandb login` first, or keep "
                "the run on this machine with --wandb_config.mode offline"
            ) from error

    def step(self, line: Mapping[str, Any]) -> None:
        """A step's figures; what is not finite is left out."""
        self._log(line["step"], {f"train/{name}": line[name] for name in PASSED_ON})

    def evaluation(self, step: int, loss: float, batches: Sequence[float]) -> None:
        """A validation's loss and perplexity."""
        self._log(step, {"eval/loss": finite_or_none(loss), "eval/perplexity": finite_or_none(perplexity(loss))})

    def epoch(self, step: int, train_loss: float, eval_loss: float | None) -> None:
        """Nothing: curves are by step."""

    def rewind(self, step: int) -> None:
        """Nothing: a logged step stays logged there."""

    def close(self, results: Mapping[str, Any] | None) -> None:
        """The results as the run's summary; a run without any has failed or was stopped."""
        if results is not None:
            self._run.summary.update(dict(results))
        self._run.finish(exit_code=0 if results is not None else 1)

    def _log(self, step: int, figures: Mapping[str, float | None]) -> None:
        self._run.log({name: value for name, value in figures.items() if value is not None}, step=step)
