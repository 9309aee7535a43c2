"""`packtrain export`: a run's checkpoint, or a base model and its LoRA, as a folder that everybody can load.

    run               the command
    export_model      a checkpoint of full fine-tuning -> a Hugging Face folder
    export_adapter    a checkpoint of an adapter -> a folder in PEFT's format
    export_merged     base and adapter -> a Hugging Face folder

Tensors go through block by block: however large the model, a few hundred MiB are in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packtrain import log
from packtrain.checkpoint.adapter import read_adapter_config
from packtrain.checkpoint.dcp_folder import newest, read_state, steps, verify
from packtrain.checkpoint.dcp_index import Index
from packtrain.checkpoint.dcp_storage import OPTIMIZER
from packtrain.checkpoint.files import replacing, write_text
from packtrain.checkpoint.hf import ADAPTER_CONFIG, ADAPTER_WEIGHTS, config_of, copy_side_files
from packtrain.checkpoint.hub import resolve
from packtrain.checkpoint.merge import Merge, blocks
from packtrain.checkpoint.publish import CONFIG, Publication, shards_of
from packtrain.checkpoint.store import read_json
from packtrain.checkpoint.tensorfile import TensorWriter
from packtrain.checkpoint.tokenizer import has_tokenizer
from packtrain.configs.export import ExportConfig
from packtrain.configs.flat import flat_help, parse_flat
from packtrain.errors import EXIT_DONE, Fault, UserError, raise_if


def run(argv: Sequence[str]) -> int:
    """Write the folder that `argv` asks for."""
    if {"--help", "-h"} & set(argv):
        print(flat_help("export", ExportConfig))
        return EXIT_DONE
    cfg = parse_flat(argv, ExportConfig)
    raise_if(_problems(cfg))
    out = Path(str(cfg.output_dir))
    try:
        _export(cfg, out)
    except OSError as error:
        raise Fault(f"--output_dir {out}: could not be written ({error})") from error
    log.say(f"saved: {out}")
    return EXIT_DONE


def _export(cfg: ExportConfig, out: Path) -> None:
    if cfg.checkpoint is None:
        adapter = resolve(str(cfg.peft_model), "--peft_model")
        base = cfg.model_name or str(read_adapter_config(adapter).get("base_model_name_or_path"))
        export_merged(resolve(base, "--model_name"), adapter, out, _dtype(cfg), cfg.shard_bytes)
        return
    folder = checkpoint_folder(Path(cfg.checkpoint))
    state, beside = read_state(folder), (folder.parent, folder.parent.parent)  # a run's root may be either
    if not (folder / ADAPTER_CONFIG).is_file():
        export_model(folder, out, _dtype(cfg), cfg.shard_bytes)
        _copy_beside([*beside, cfg.model_name, state["tokenizer_name"], state["model_name"]], out)
    elif cfg.model_name is None:
        export_adapter(folder, out)
        _copy_beside([*beside, state["tokenizer_name"]], out)
    else:
        with tempfile.TemporaryDirectory(prefix="packtrain-") as name:
            export_adapter(folder, Path(name))
            _copy_beside([*beside, state["tokenizer_name"]], Path(name))
            export_merged(resolve(cfg.model_name, "--model_name"), Path(name), out, _dtype(cfg), cfg.shard_bytes)


def checkpoint_folder(path: Path) -> Path:
    """The verified `step-N` that `path` is, or has the newest of. Raises UserError with all that is wrong with it."""
    found = path if path.name in {step.name for step in steps(path.parent).values()} else None
    found = found or newest(path) or newest(path / "checkpoints")
    if found is None:
        raise UserError(
            f"--checkpoint {path}: no checkpoint there; expected a step-N folder with a file DONE, or what holds some"
        )
    if problems := verify(found):
        raise UserError([f"--checkpoint {found}: damaged, or not complete: {problem}" for problem in problems])
    return found


def export_model(folder: Path, out: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """A checkpoint's weights as a Hugging Face folder, in `dtype` or their own."""
    index = Index(folder)
    shapes = {name: entry.shape for name, entry in index.tensors.items() if not name.startswith(OPTIMIZER)}
    dtype = dtype or index.tensors[next(iter(shapes))].dtype
    config = config_of(read_json(folder / CONFIG, "copy the checkpoint again") or {}, shapes, dtype)

    def rows(name: str) -> Iterator[Tensor]:
        return (index.rows(name, a, b) for a, b in blocks(shapes[name]))

    _publish(out, shapes, dtype, shard_bytes, config, rows)


def export_adapter(folder: Path, out: Path) -> None:
    """An adapter's checkpoint as PEFT's two files."""
    index, config = Index(folder), read_json(folder / ADAPTER_CONFIG, "copy the checkpoint again")
    entries = {name: entry for name, entry in index.tensors.items() if not name.startswith(OPTIMIZER)}
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / ADAPTER_WEIGHTS) as file:
        shapes, dtypes = [(n, e.shape) for n, e in entries.items()], {n: e.dtype for n, e in entries.items()}
        writer = TensorWriter(file, shapes, dtypes)
        for name, shape in shapes:
            writer.add_rows(name, shape, (index.rows(name, a, b) for a, b in blocks(shape)))
    write_text(out / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def export_merged(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """The model that base and adapter are together, as a Hugging Face folder, in `dtype` or the base's."""
    config = read_json(base / CONFIG, "copy or download it again")
    if config is None:
        raise UserError(f"--model_name {base}: no {CONFIG} there; expected a Hugging Face folder of a Llama model")
    merge = Merge(base, config, adapter)
    dtype = dtype or merge.dtype
    config = config_of(config, merge.shapes, dtype) | ({"tie_word_embeddings": False} if merge.untied else {})
    _publish(out, merge.shapes, dtype, shard_bytes, config, merge.rows)
    copy_side_files(base, out)
    _copy_beside([adapter, base], out)


def _publish(out: Path, shapes: Any, dtype: torch.dtype, shard_bytes: int, config: Any, rows: Any) -> None:
    publication = Publication(out, shards_of(list(shapes.items()), dtype, shard_bytes), dtype)
    try:
        for name, shape in shapes.items():
            publication.add_rows(name, shape, rows(name))
        publication.commit(config)
    except BaseException:
        publication.abandon()
        raise


def _copy_beside(sources: Iterable[Path | str | None], out: Path) -> None:
    """Tokenizer and generation settings from the first place that has them."""
    for source in sources:
        folder = _local(source) if isinstance(source, str) else source
        if folder is not None and has_tokenizer(folder):
            copy_side_files(folder, out)
            return
    log.say(f"no tokenizer was found beside what was read; copy the model's into {out}")


def _local(name: str) -> Path | None:
    """The folder of a name that a run wrote down, if it can still be had."""
    try:
        return resolve(name, "--model_name")
    except UserError as error:
        log.say(str(error))
        return None


def _dtype(cfg: ExportConfig) -> torch.dtype | None:
    return None if cfg.dtype == "auto" else getattr(torch, cfg.dtype)


def _problems(cfg: ExportConfig) -> Iterator[str]:
    if cfg.output_dir is None:
        yield "--output_dir: missing; expected a new folder for what is exported"
    elif Path(cfg.output_dir).exists() and (not Path(cfg.output_dir).is_dir() or any(Path(cfg.output_dir).iterdir())):
        yield f"--output_dir {cfg.output_dir}: is there already; expected a new or empty folder"
    if (cfg.checkpoint is None) == (cfg.peft_model is None):
        found = "found neither" if cfg.checkpoint is None else "found both"
        yield f"--checkpoint, --peft_model: expected one of the two (a run's checkpoint, an adapter to merge), {found}"
    if cfg.shard_bytes < 1:
        yield f"--shard_bytes: expected 1 or more, found {cfg.shard_bytes}"
