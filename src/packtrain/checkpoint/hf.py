"""A model's weights from a Hugging Face folder and back, under Hugging Face's names.

    load_model        streams into plain parameters or shards: a rank reads its own rows, 256 MiB at a time
    save_model        gathers one parameter at a time; the leader streams them into sharded safetensors
    expected_shapes   the tensors that a model's folder must hold
    copy_side_files   tokenizer and generation settings beside the weights
    mirror            a folder's model files once more, under another folder's name

`model.linear.layout` is the only place that knows which rows of a fused parameter are which Hugging Face tensor.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packtrain.checkpoint.files import copy_file, sync_folder
from packtrain.checkpoint.folder import INDEX, HfFolder, Shape
from packtrain.checkpoint.publish import CONFIG, SHARD_BYTES, Publication, shards_of
from packtrain.checkpoint.tensorfile import DTYPES
from packtrain.distributed.parallelize import gather, largest, local_rows
from packtrain.errors import Fault, UserError, raise_if
from packtrain.model.linear import Piece, base_shapes, layout
from packtrain.model.staging import Target, staged
from packtrain.peft.lora import saved_layout
from packtrain.peft.targets import ties
from packtrain.peft.tensors import LocalRows

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

STREAM_BYTES = 256 * 2**20
"""Rows that are in memory at once while loading."""

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token; they may grow."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
SIDE_FILES = ("generation_config.json", *TOKENIZER_FILES)
"""What belongs to a model besides its weights and config.json."""


def expected_shapes(model: nn.Module) -> dict[str, Shape]:
    """Hugging Face name -> shape of every tensor that the model's weights are (adapters have none)."""
    whole = base_shapes(model)
    return {
        piece.name: (piece.stop - piece.start, *whole[ours][1:])
        for ours, pieces in layout(model).items()
        for piece in pieces
    }


@torch.no_grad()
def load_model(model: nn.Module, folder: HfFolder, local_rows: LocalRows = local_rows) -> list[str]:
    """Fill every base parameter, and copies of base weights in adapters, cast to the parameter's dtype.

    Embedding and head may have more rows than the file: the new ones become the mean of the old. Returns a sentence
    for the log about each table that grew. Raises UserError with everything that is wrong, before anything is read.
    """
    expected = expected_shapes(model)
    grown = _grown(expected, folder)
    raise_if(folder.problems(expected | {name: (old, *expected[name][1:]) for name, old in grown.items()}))
    twins = {own: shared for shared, own in ties(model).items() if shared in folder.slots}
    parameters = dict(model.named_parameters())
    for ours, pieces in (layout(model) | saved_layout(model)).items():
        local, first = local_rows(parameters[ours])
        if local.is_meta:
            raise ValueError(f"{ours} is still on meta: give the model memory before its weights")
        with staged(model, ours, local, local_rows, largest) as target:
            for piece in pieces:
                _fill(target, first, piece, folder)
                if ours in twins:
                    _check_twin(target, first, piece, twins[ours], folder)
    return [
        f"{name} grew from {old:,} to {expected[name][0]:,} rows; each new row is the mean of the old"
        for name, old in grown.items()
    ]


def save_model(
    model: nn.Module,
    out: Path,
    config_json: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    leads: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face folder; collective: every rank calls it, the one that `leads` writes.

    `dtype` is the parameters' own unless given. Raises Fault on the leader, after the last gather, if the disk refuses;
    nothing is then mixed (checkpoint/publish.py).
    """
    parameters = dict(model.named_parameters())
    table = layout(model)
    if len(parameters) != len(table):
        raise ValueError("the model has adapters: they are saved by save_adapter, or merged first")
    shapes = expected_shapes(model)
    dtype = dtype or parameters[next(iter(table))].dtype
    shards = shards_of(list(shapes.items()), dtype, shard_bytes)
    publication = Publication(out, shards, dtype) if leads else None
    failure: OSError | None = None
    for ours, pieces in table.items():
        whole = gather(parameters[ours])
        if publication is None or failure is not None:
            continue  # the other ranks count on this one for the gathers to come
        try:
            for piece in pieces:
                publication.add(piece.name, whole[piece.start : piece.stop])
        except OSError as error:
            failure = error
    if publication is not None:
        _finish(publication, out, failure, config_of(config_json, shapes, dtype))


def copy_side_files(source: Path, out: Path, *, tokenizer: bool = True) -> None:
    """Copy generation settings and `tokenizer` (`SIDE_FILES`), each whole or not at all, where `source` has them."""
    for name in SIDE_FILES:
        if (
            (tokenizer or name not in TOKENIZER_FILES)
            and (source / name).is_file()
            and (source / name).resolve() != (out / name).resolve()
        ):
            copy_file(source / name, out / name)


def mirror(out: Path, best: Path) -> None:
    """Make `best` hold the model or adapter files that `out` holds now: weights hard-linked where the disk can.

    The new folder is complete before it takes the old one's place; the old one goes last.
    """
    old = best.with_name(f".{best.name}.old")
    if old.exists() and not best.exists():
        old.rename(best)  # a kill between the two renames below
    for left in best.parent.glob(f".{best.name}.*"):
        if re.fullmatch(r"old|[0-9a-f]{8}", left.suffix[1:]):
            shutil.rmtree(left)
    new = best.with_name(f".{best.name}.{secrets.token_hex(4)}")
    new.mkdir(parents=True)
    for path in sorted(out.iterdir()):
        if _is_model_file(path):
            _link_or_copy(path, new / path.name)
    sync_folder(new)
    if best.exists():
        best.rename(old)
    new.rename(best)
    sync_folder(best.parent)
    if old.exists():
        shutil.rmtree(old)


def _grown(expected: Mapping[str, Shape], folder: HfFolder) -> dict[str, int]:
    """Tables with fewer rows in the file than in the model -> the file's rows."""
    return {
        name: folder.slots[name].shape[0]
        for name in TABLES
        if name in expected and name in folder.slots and 0 < folder.slots[name].shape[0] < expected[name][0]
    }


def _fill(local: Target, first: int, piece: Piece, folder: HfFolder) -> None:
    """Fill what `local` (our parameter's rows from `first` on) has of a piece; rows beyond the file's get the mean."""
    have = folder.slots[piece.name].shape[0]
    start, stop = _overlap(local, first, piece)
    for a, b in _chunks(folder, piece.name, start - piece.start, min(stop - piece.start, have)):
        at = piece.start + a - first
        local[at : at + b - a] = folder.rows(piece.name, a, b)
    new = max(start, piece.start + have)
    if new < stop:
        local[new - first : stop - first] = _mean_row(folder, piece.name, have)


def _overlap(local: Target, first: int, piece: Piece) -> tuple[int, int]:
    """Rows of our parameter that are both this rank's and the piece's; empty if stop <= start."""
    return max(first, piece.start), min(first + local.shape[0], piece.stop)


def _chunks(folder: HfFolder, name: str, start: int, stop: int, itemsize: int = 0) -> list[tuple[int, int]]:
    """Rows [start, stop) cut into [a, b) of at most STREAM_BYTES at `itemsize` bytes an element, or the file's."""
    slot = folder.slots[name]
    row_bytes = (itemsize or DTYPES[slot.dtype].itemsize) * math.prod(slot.shape[1:])
    rows = max(1, STREAM_BYTES // row_bytes)
    return [(a, min(a + rows, stop)) for a in range(start, stop, rows)]


def _mean_row(folder: HfFolder, name: str, rows: int) -> Tensor:
    """Mean of a table's rows, fp32 [columns]."""
    total = torch.zeros(folder.slots[name].shape[1:], dtype=torch.float64)
    for a, b in _chunks(folder, name, 0, rows, itemsize=8):
        total += folder.rows(name, a, b).double().sum(0)
    return (total / rows).float()


def _check_twin(local: Target, first: int, piece: Piece, twin: str, folder: HfFolder) -> None:
    """A tied model's folder may hold the head as well; then both must be one."""
    start, stop = _overlap(local, first, piece)
    same_shape = folder.slots[twin].shape == folder.slots[piece.name].shape
    last = min(stop - piece.start, folder.slots[piece.name].shape[0])
    chunks = _chunks(folder, piece.name, start - piece.start, last) if same_shape else []
    if not same_shape or any(not torch.equal(folder.rows(piece.name, *c), folder.rows(twin, *c)) for c in chunks):
        raise UserError(
            f"{folder.path}: config.json ties {twin} to {piece.name}, but the two differ in the file; "
            'set "tie_word_embeddings": false in config.json'
        )


def config_of(config_json: Mapping[str, Any], shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model of these tensors in this dtype."""
    name = str(dtype).removeprefix("torch.")
    # transformers 5 reads dtype, 4 and most servers torch_dtype
    return {**config_json, "dtype": name, "torch_dtype": name, "vocab_size": shapes[TABLES[0]][0]}


def _finish(publication: Publication, out: Path, failure: OSError | None, config: Mapping[str, Any]) -> None:
    try:
        if failure is not None:
            raise failure
        publication.commit(config)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (out / name).unlink(missing_ok=True)  # transformers would load an older run's adapter on top
    except OSError as error:
        publication.abandon()
        raise Fault(f"{out}: the model could not be saved ({error}); what was there before was not damaged") from error


def _is_model_file(path: Path) -> bool:
    known = path.name in (CONFIG, INDEX, ADAPTER_CONFIG, ADAPTER_WEIGHTS, *SIDE_FILES)
    return path.is_file() and (known or (path.name.startswith("model") and path.suffix == ".safetensors"))


def _link_or_copy(path: Path, target: Path) -> None:
    if path.suffix == ".safetensors":
        try:
            os.link(path, target)
            return
        except OSError:
            pass  # another disk, or one without links
    copy_file(path, target)
