"""`index.json`: which boxes of which tensors lie in which files of a checkpoint. It stands for DCP's pickled metadata.

    write_index     torch's metadata and where each box was written -> the JSON object
    Index           a checked folder's index: names, dtypes, shapes; rows and boxes; torch's metadata again

A box is a part of a tensor: where it begins and how many elements it has along each axis. It is a whole tensor of a
safetensors file, under a `key`. Boxes of a tensor tile it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from packtrain.checkpoint.dcp_folder import INDEX, asked_again, read_object
from packtrain.checkpoint.folder import link_problem
from packtrain.checkpoint.tensorfile import NAMES, STORED, BadFile, TensorFile
from packtrain.errors import UserError

Size = tuple[int, ...]


class Box(NamedTuple):
    """Elements [offset, offset + size) of a tensor, and where they lie."""

    offset: Size
    size: Size
    file: str
    key: str


class Entry(NamedTuple):
    """One tensor."""

    dtype: torch.dtype
    shape: Size
    boxes: tuple[Box, ...]


def write_index(metadata: Metadata, stored: Mapping[MetadataIndex, tuple[str, str]]) -> dict[str, Any]:
    """`stored` says (file, key) of each box in `metadata`."""
    tensors: dict[str, Any] = {}
    for name, found in sorted(metadata.state_dict_metadata.items()):
        assert isinstance(found, TensorStorageMetadata)
        boxes = []
        for chunk in found.chunks:
            file, key = stored[MetadataIndex(name, chunk.offsets)]
            boxes.append({"offset": list(chunk.offsets), "size": list(chunk.sizes), "file": file, "key": key})
        tensors[name] = {"dtype": NAMES[found.properties.dtype], "shape": list(found.size), "boxes": boxes}
    return {"tensors": tensors}


class Index:
    """The index of one folder. Raises UserError, with every problem, if it does not fit the files beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TensorFile] = {}
        try:
            found = read_object(folder / INDEX)
            self.tensors = {name: _entry(entry) for name, entry in found["tensors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: is not one of packtrain ({error!r})") from None
        if problems := list(self._problems()):
            raise UserError(problems)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU, in its stored dtype."""
        entry = self.tensors[name]
        rows = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        for box in entry.boxes:
            a, b = max(start, box.offset[0]), min(stop, box.offset[0] + box.size[0])
            if a < b:
                inside = self._file(box.file).rows(box.key, a - box.offset[0], b - box.offset[0])
                across = (slice(o, o + n) for o, n in zip(box.offset[1:], box.size[1:], strict=True))
                rows[(slice(a - start, b - start), *across)] = inside
        return rows

    def within(self, box: MetadataIndex, offset: Size, size: Size) -> Tensor:
        """`size` elements from `offset` on of one box, both counted in it."""
        place = next(b for b in self.tensors[box.fqn].boxes if b.offset == tuple(box.offset or ()))
        rows = self._file(place.file).rows(place.key, offset[0], offset[0] + size[0])
        return rows[(slice(None), *(slice(a, a + n) for a, n in zip(offset[1:], size[1:], strict=True)))]

    def metadata(self) -> Metadata:
        """What torch.distributed.checkpoint plans a load from."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=entry.dtype),
                    size=torch.Size(entry.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.size)) for b in entry.boxes],
                )
                for name, entry in self.tensors.items()
            }
        )

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = asked_again(lambda: TensorFile(self._folder / name))
        return self._files[name]

    def _problems(self) -> Iterator[str]:
        files = dict.fromkeys(box.file for entry in self.tensors.values() for box in entry.boxes)
        bad = {name: problem for name in files if (problem := self._file_problem(name))}
        yield from bad.values()
        for name, entry in self.tensors.items():
            if math.prod(entry.shape) != sum(math.prod(box.size) for box in entry.boxes):
                yield f"{self._folder / INDEX}: the boxes of {name} do not tile its shape {list(entry.shape)}"
            for box in entry.boxes:
                if box.file in bad:
                    continue
                slot = self._file(box.file).slots.get(box.key)
                if slot is None or (slot.dtype, slot.shape) != (NAMES[entry.dtype], box.size):
                    yield f"{self._folder / box.file}: {box.key} is not there as {INDEX} says"

    def _file_problem(self, name: str) -> str | None:
        path = self._folder / name
        if Path(name).name != name:
            return f"{self._folder / INDEX}: names {name}, which is no file of the folder"
        try:
            if leads_out := link_problem(path, self._folder):
                raise BadFile(leads_out)
            self._file(name)
        except (BadFile, OSError) as error:
            return f"{path}: {error}"
        return None


def _entry(found: Any) -> Entry:
    boxes = tuple(Box(_size(b["offset"]), _size(b["size"]), str(b["file"]), str(b["key"])) for b in found["boxes"])
    entry = Entry(STORED[found["dtype"]], _size(found["shape"]), boxes)
    for box in boxes:
        if not len(box.offset) == len(box.size) == len(entry.shape) > 0 or any(
            start + count > whole for start, count, whole in zip(box.offset, box.size, entry.shape, strict=True)
        ):
            raise ValueError(f"a box at {list(box.offset)} is outside of its tensor")
    return entry


def _size(numbers: Any) -> Size:
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"expected sizes, found {numbers}")
    return tuple(numbers)
