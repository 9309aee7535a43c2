"""One safetensors file: its header read with suspicion, a new one written as a stream.

    read_header     path -> {tensor: Slot}; raises BadFile with a sentence about what is wrong
    TensorFile      rows of its tensors, read into memory of one's own
    TensorWriter    writes tensors one by one into a file whose header is known beforehand

Format (github.com/huggingface/safetensors): 8 bytes length of the header, little-endian; the header, JSON; the
tensors' bytes, which `data_offsets` tile without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_HEADER = 100_000_000
"""Bytes; the library's own limit."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored as."""

STORED = DTYPES | {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}
"""What an optimizer's state may be stored as besides."""

NAMES = {dtype: name for name, dtype in STORED.items()}
"""torch's dtype -> safetensors' word for it."""

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class BadFile(Exception):
    """The file cannot be read; the text says what is wrong with it and what to do, without naming it."""


class Slot(NamedTuple):
    """A tensor of a file: its dtype in safetensors' words, its shape, its bytes [start, stop) behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Slot]:
    """Every tensor of the file, after checking that the header is sound and that the file is as long as it says."""
    if not path.is_file():
        raise BadFile("no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if is_lfs_pointer(path):
            raise BadFile(f"is a Git LFS pointer ({size} bytes), not weights; run `git lfs pull` in its folder")
        if len(head) < 8:
            raise BadFile(f"{size} bytes on disk, too short for a safetensors header; copy or download it again")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER:
            raise BadFile(
                f"says that its header has {length:,} bytes, and {MAX_HEADER:,} is the limit: it is no safetensors "
                "file, or damaged; copy or download it again"
            )
        if 8 + length > size:
            raise BadFile(f"{size:,} bytes on disk, its header alone says {8 + length:,}; copy or download it again")
        text = file.read(length)
    slots = _parse(text)
    _check_tiles(slots, size - 8 - length, 8 + length)
    return slots


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is the short text that Git LFS leaves in place of a large file."""
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: raises ValueError where JSON would quietly keep the last of two."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _parse(text: bytes) -> dict[str, Slot]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"its header cannot be read ({error}); copy or download it again") from None
    if not isinstance(header, dict):
        raise BadFile("its header is no JSON object; copy or download it again")
    header.pop("__metadata__", None)
    return {name: _slot(name, entry) for name, entry in header.items()}


def _slot(name: str, entry: Any) -> Slot:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise BadFile(
            f"its header has no dtype, shape and data_offsets for {name}; copy or download it again"
        ) from None
    numbers = (*shape, start, stop)
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise BadFile(f"its header's entry for {name} is not one of safetensors; copy or download it again")
    if dtype in _BYTES and stop - start != math.prod(shape) * _BYTES[dtype]:
        raise BadFile(
            f"its header gives {name} {stop - start:,} bytes, and {dtype} {list(shape)} takes "
            f"{math.prod(shape) * _BYTES[dtype]:,}; copy or download it again"
        )
    return Slot(dtype, shape, start, stop)


def _check_tiles(slots: dict[str, Slot], available: int, before: int) -> None:
    """Bytes of tensors must follow one another without gap or overlap, up to the end of the file."""
    end = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != end or slot.stop < slot.start:
            raise BadFile(f"the bytes of {name} overlap another tensor's or leave a gap; copy or download it again")
        end = slot.stop
    if end != available:
        raise BadFile(
            f"{before + available:,} bytes on disk, its header says {before + end:,}; copy or download it again"
        )


class TensorFile:
    """Tensors of one file by rows. Bytes are read, not mapped: what is in memory is what was asked for."""

    def __init__(self, path: Path) -> None:
        """Raises BadFile, or OSError."""
        self.slots = read_header(path)
        self._file = path.open("rb", buffering=0)
        self._data = 8 + int.from_bytes(self._file.read(8), "little")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor (the number itself of a 0-dim one), on the CPU, in the file's dtype."""
        slot = self.slots[name]
        shape = (stop - start, *slot.shape[1:]) if slot.shape else ()
        rows = torch.empty(shape, dtype=STORED[slot.dtype])
        row_bytes = math.prod(shape[1:]) * rows.element_size()
        into = rows.view(-1).view(torch.uint8).numpy().data
        self._file.seek(self._data + slot.start + start * row_bytes)
        while into.nbytes:
            count = self._file.readinto(into)
            if not count:
                raise OSError(f"{self._file.name}: ends within {name}; copy it again")
            into = into[count:]
        return rows


class TensorWriter:
    """A safetensors file written front to back: one tensor in memory at a time, whatever the file's size."""

    def __init__(
        self,
        file: BinaryIO,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        dtype: torch.dtype | Mapping[str, torch.dtype],
    ) -> None:
        """`dtype`: of all tensors, or of each by name."""
        self._file = file
        self._left = list(tensors)
        self._dtypes = {name: dtype if isinstance(dtype, torch.dtype) else dtype[name] for name, _ in tensors}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors:
            kind = self._dtypes[name]
            start, end = end, end + math.prod(shape) * kind.itemsize
            header[name] = {"dtype": NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor (any device and dtype); it must be the one that the header has next."""
        self.add_rows(name, tuple(tensor.shape), [tensor])

    def add_rows(self, name: str, shape: tuple[int, ...], blocks: Iterable[Tensor]) -> None:
        """Write the next tensor in blocks of rows: no more than one of them need be in memory."""
        if (name, shape) != self._left[0]:
            raise ValueError(f"got {name} {list(shape)}, the file's next tensor is {self._left[0]}")
        del self._left[0]
        count = 0
        for block in blocks:
            plain = block.detach().to(device="cpu", dtype=self._dtypes[name]).contiguous()
            self._file.write(plain.view(-1).view(torch.uint8).numpy().data)
            count += plain.numel()
        if count != math.prod(shape):
            raise ValueError(f"{name}: {count} elements were given, its shape {list(shape)} has {math.prod(shape)}")

    @property
    def full(self) -> bool:
        """Whether every tensor has been written."""
        return not self._left
