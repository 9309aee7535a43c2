"""One safetensors file of a checkpoint: written tensor by tensor, synced, and read back."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from packtrain.checkpoint.dcp_folder import FileFacts, asked_again, facts_of
from packtrain.checkpoint.tensorfile import TensorWriter
from packtrain.errors import Fault

_BLOCK = 2**24
"""Bytes that are hashed, and given to the disk, at a time."""


class PendingTensor(NamedTuple):
    """One tensor of a file to be written; `get` makes it when it is due."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    get: Callable[[], Tensor]


class _Hashing:
    """A file that knows size and SHA-256 of what was written into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), _BLOCK):
            block = whole[start : start + _BLOCK]
            self._digest.update(block)
            self._file.write(block)
            if sys.platform == "linux":  # the disk begins now, not at the end
                self._file.flush()
                os.posix_fadvise(self._file.fileno(), self._size, len(block), os.POSIX_FADV_DONTNEED)
            self._size += len(block)
        return len(whole)

    @property
    def facts(self) -> FileFacts:
        return FileFacts(self._size, self._digest.hexdigest())


def write_file(path: Path, tensors: Sequence[PendingTensor]) -> FileFacts:
    """A synced safetensors file, read back. Raises OSError, or Fault if the disk has other bytes than it was given."""
    with asked_again(lambda: path.open("xb")) as file:
        hashing = _Hashing(file)
        shapes, dtypes = [(t.key, t.shape) for t in tensors], {t.key: t.dtype for t in tensors}
        writer = TensorWriter(cast(BinaryIO, hashing), shapes, dtypes)
        for tensor in tensors:
            writer.add(tensor.key, tensor.get())
        file.flush()
        os.fsync(file.fileno())
    if facts_of(path) != hashing.facts:
        raise Fault(f"{path}: was read back with other bytes than were written; check the disk")
    return hashing.facts
