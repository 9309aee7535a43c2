"""Who is told what happens besides run/metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from packtrain.configs.run import RunConfig, to_yaml_dict
from packtrain.distributed.place import Place
from packtrain.train.metrics import Listener
from packtrain.train.recipes_metrics import JOURNAL, RecipesMetrics, metrics_path
from packtrain.train.wandb_run import WandbRun


def recipes_file(cfg: RunConfig, place: Place, root: Path, run_folder: Path) -> Path | None:
    """Where --save_metrics writes, by rank 0's clock, or where it wrote before."""
    if not cfg.train_config.save_metrics:
        return None
    return Path(place.agree("metrics file", lambda: str(metrics_path(root, run_folder / JOURNAL))))


def listeners_of(cfg: RunConfig, run_folder: Path, metrics_file: Path | None) -> list[Listener]:
    """Who else is told what metrics.jsonl says."""
    listeners: list[Listener] = []
    if metrics_file is not None:
        listeners.append(RecipesMetrics(metrics_file, run_folder / JOURNAL))
    if cfg.train_config.use_wandb:
        settings = {section: values for section, values in to_yaml_dict(cfg).items() if cfg.active(section)}
        listeners.append(WandbRun(settings.pop("wandb_config"), settings, run_folder))
    return listeners
