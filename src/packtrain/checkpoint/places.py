"""Where a run puts what it makes.

output_root       --output_dir, else the dist flags' folder, else ./packtrain-out
checkpoint_root   what `step-N` folders are in
"""

from __future__ import annotations

from pathlib import Path

from packtrain.configs.run import RunConfig


def output_root(cfg: RunConfig) -> Path:
    """Where results go: --output_dir, else the dist flags' folder, else ./packtrain-out."""
    if cfg.train_config.output_dir is not None:
        return Path(cfg.train_config.output_dir)
    return _dist_folder(cfg) or Path("packtrain-out")


def checkpoint_root(cfg: RunConfig) -> Path:
    """Where `step-N` folders go: the dist flags' folder, else `checkpoints/` beside the results."""
    return _dist_folder(cfg) or output_root(cfg) / "checkpoints"


def _dist_folder(cfg: RunConfig) -> Path | None:
    """llama-recipes' ROOT/FOLDER-MODEL, the model's name without folders in it."""
    train = cfg.train_config
    if train.dist_checkpoint_root_folder is None:
        return None
    name = str(train.model_name or "random").lstrip("/").replace("/", "--")
    return Path(train.dist_checkpoint_root_folder) / f"{train.dist_checkpoint_folder}-{name}"
