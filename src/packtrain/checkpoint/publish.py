"""A model's weights replaced in a folder: whoever loads it at any moment, or after a kill, gets the old or the new.

    Publication     shards written under names of their own, then made the folder's model in a few renames
    shards_of       which tensors go into which file

The folder's model is what its entry names: `model.safetensors`, or else `model.safetensors.index.json`. Shards that
the entry does not name yet are invisible, so the order is: all bytes on the disk, the entry renamed over the old one,
and only then the old shards gone. Shards get their usual names by hard links and a second change of entry.
A config.json that differs from the old one cannot change together with the weights; then the old entry goes first,
and the folder holds no model until the new one is complete.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from packtrain.checkpoint.files import sweep, sync_folder, write_text
from packtrain.checkpoint.folder import INDEX, SINGLE
from packtrain.checkpoint.tensorfile import TensorWriter

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000

Tensors = Sequence[tuple[str, tuple[int, ...]]]

_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}(-[0-9a-f]{8})?\.safetensors")


def shards_of(tensors: Tensors, dtype: torch.dtype, limit: int = SHARD_BYTES) -> list[Tensors]:
    """Cut tensors, in order, into files of at most `limit` bytes (a larger tensor has a file to itself)."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = limit
    for name, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((name, shape))
        room -= size
    return list(shards)


class Publication:
    """One new state of the model in `out`: `add` every tensor in order, then `commit`; `abandon` after an error."""

    def __init__(self, out: Path, shards: Sequence[Tensors], dtype: torch.dtype) -> None:
        self._out, self._shards, self._dtype = out, shards, dtype
        count = len(shards)
        self._names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        mark = secrets.token_hex(4)
        self._staged = [name.replace(".safetensors", f"-{mark}.safetensors") for name in self._names]
        self._opened = 0
        self._file: BinaryIO | None = None
        self._writer: TensorWriter | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        self._open().add(name, tensor)

    def add_rows(self, name: str, shape: tuple[int, ...], blocks: Iterable[Tensor]) -> None:
        """Write the next tensor in blocks of rows."""
        self._open().add_rows(name, shape, blocks)

    def commit(self, config: Mapping[str, Any]) -> None:
        """Make what was added the folder's model, with `config` as its config.json."""
        if self._opened != len(self._shards) or self._writer is None or not self._writer.full:
            raise ValueError("not every tensor was written")
        self._close_file()
        self._write_config(config)
        if len(self._shards) == 1:
            os.replace(self._out / self._staged[0], self._out / SINGLE)
            sync_folder(self._out)
            (self._out / INDEX).unlink(missing_ok=True)
            self._remove_shards(keep=())
        else:
            self._commit_shards()
        sync_folder(self._out)

    def abandon(self) -> None:
        """Remove what was written, unless it is the folder's model already."""
        if self._file is not None:
            self._file.close()
        index = self._out / INDEX
        text = index.read_text(encoding="utf-8") if index.is_file() else ""
        for name in self._staged:
            if name not in text:
                (self._out / name).unlink(missing_ok=True)

    def _open(self) -> TensorWriter:
        """The file that the next tensor goes into."""
        if self._writer is None or self._writer.full:
            self._writer = self._next_file()
        return self._writer

    def _next_file(self) -> TensorWriter:
        if self._file is None:
            self._out.mkdir(parents=True, exist_ok=True)
            sweep(self._out)
        self._close_file()
        self._file = (self._out / self._staged[self._opened]).open("wb")
        self._opened += 1
        return TensorWriter(self._file, self._shards[self._opened - 1], self._dtype)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _write_config(self, config: Mapping[str, Any]) -> None:
        path = self._out / CONFIG
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        (self._out / SINGLE).unlink(missing_ok=True)
        (self._out / INDEX).unlink(missing_ok=True)
        sync_folder(self._out)
        write_text(path, text)

    def _commit_shards(self) -> None:
        self._point_to(self._staged)
        (self._out / SINGLE).unlink(missing_ok=True)
        self._remove_shards(keep=self._staged)
        try:
            for staged, name in zip(self._staged, self._names, strict=True):
                os.link(self._out / staged, self._out / name)
        except OSError:
            self._remove_shards(keep=self._staged)  # no hard links here: the marked names are as good
            return
        self._point_to(self._names)
        self._remove_shards(keep=self._names)

    def _point_to(self, names: Sequence[str]) -> None:
        weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor, _ in shard}
        total = sum(math.prod(shape) * self._dtype.itemsize for shard in self._shards for _, shape in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        sync_folder(self._out)
        write_text(self._out / INDEX, json.dumps(index, indent=2) + "\n")

    def _remove_shards(self, keep: Sequence[str]) -> None:
        for path in self._out.iterdir():
            if _SHARD_NAME.fullmatch(path.name) and path.name not in keep:
                path.unlink()
