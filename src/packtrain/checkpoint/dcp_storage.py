"""What torch.distributed.checkpoint writes and reads here: safetensors and one JSON index, nothing pickled.

ShardWriter     every rank writes its rows into a file of its own
GatheredWriter  rows travel to the leader, which writes whole tensors under their plain names
Reader          the rows that a rank asks for, from whatever files have them
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from packtrain.checkpoint.dcp_file import PendingTensor, write_file
from packtrain.checkpoint.dcp_folder import (
    INDEX,
    FileFacts,
    StepFolder,
    check_room,
    confirm,
    set_aside,
    wait_until_seen,
)
from packtrain.checkpoint.dcp_index import Index, write_index
from packtrain.checkpoint.folder import INDEX as HF_INDEX
from packtrain.checkpoint.publish import SHARD_BYTES
from packtrain.errors import Fault

OPTIMIZER = "optimizer."
"""What the names of optimizer state begin with."""

SPARE = 2**26
"""Bytes beyond the tensors that a save wants free: headers and small files."""

AT_A_TIME = 8
"""Files that a rank writes at a time."""

MOST_PARTS, PART_BYTES = 64, 2**28
"""Files that a rank writes in all, and how large one is before there is another: while some are read back, others are
written, and many a disk does both at once."""

Finish = Callable[[StepFolder], None]
Done = Callable[[Path], None]


class Stored(NamedTuple):
    """Where a box of a tensor lies, and the facts of that file."""

    file: str
    key: str
    facts: FileFacts


class ShardWriter(StorageWriter):
    """Writes `rank-00000.safetensors` and so on, each from its rank; the leader makes the folder and commits it.

    A rank with much to write has several files, `rank-00000-0.safetensors` and so on, at work on them side by side: one
    thread's SHA-256 is slower than many a disk.
    `finish` is called on the leader with the folder, all tensors in it, before the commit; `done` with the finished one
    once it has been read back.
    """

    def __init__(self, root: Path, step: int, rank: int, finish: Finish, done: Done) -> None:
        self._root, self._step, self._rank, self._finish, self._done = root, step, rank, finish, done
        self._folder: StepFolder | None = None
        self.path: Path | None = None
        """The finished folder, on the leader."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves: a writer serves one."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the folder is made once it is known what goes into it."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the leader: room on the disk, the folder, and its name for every rank."""
        self._root.mkdir(parents=True, exist_ok=True)
        check_room(self._root, sum(_bytes(item) for plan in plans for item in plan.items) + SPARE)
        self._folder = StepFolder(self._root, self._step)
        return [SavePlan(plan.items, storage_data=(str(self._folder.path), self._all(plans))) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's part."""
        folder, everything = plan.storage_data
        wait_until_seen(Path(folder))
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(self._write(Path(folder), plan.items, everything, planner)))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the leader: the index, what the caller adds, the commit."""
        folder = self._folder
        assert folder is not None
        stored = {result.index: result.storage_data for part in results for result in part}
        folder.files |= {place.file: place.facts for place in stored.values()}
        folder.write_json(INDEX, write_index(metadata, {index: place[:2] for index, place in stored.items()}))
        self._finish(folder)
        self.path = folder.commit()
        # Each rank has read back its own file, so that no byte is read twice: a checkpoint may be 100 GB.
        if problems := confirm(self.path, {place.file for place in stored.values()}):
            raise Fault(f"{problems[0]}; it is now in {set_aside(self.path)}")
        self._done(self.path)

    def abandon(self) -> None:
        """Remove what a failed save left."""
        if self._folder is not None and self.path is None:
            self._folder.abandon()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path."""
        return False

    def _all(self, plans: list[SavePlan]) -> list[_Owned]:
        """What each rank must know of the others: nothing."""
        return []

    def _write(
        self, folder: Path, items: Sequence[WriteItem], everything: list[_Owned], planner: SavePlanner
    ) -> Iterator[WriteResult]:
        if not items:
            return
        parts = _balanced(items)
        with ThreadPoolExecutor(min(AT_A_TIME, len(parts)), thread_name_prefix="checkpoint") as pool:
            written = pool.map(partial(self._write_part, folder, planner), self._names(len(parts)), parts)
            yield from chain.from_iterable(written)

    def _names(self, parts: int) -> list[str]:
        stem = f"rank-{self._rank:05d}"
        return [f"{stem}.safetensors"] if parts == 1 else [f"{stem}-{part}.safetensors" for part in range(parts)]

    def _write_part(
        self, folder: Path, planner: SavePlanner, name: str, items: Sequence[WriteItem]
    ) -> list[WriteResult]:
        boxes = {_key(item): item for item in items}
        facts = write_file(
            folder / name,
            [
                PendingTensor(key, tuple(_box(i).sizes), _dtype(i), partial(_get, planner, i))
                for key, i in boxes.items()
            ],
        )
        return [WriteResult(item.index, _bytes(item), Stored(name, key, facts)) for key, item in boxes.items()]


class _Owned(NamedTuple):
    """A box of a tensor and the rank that has it."""

    rank: int
    item: WriteItem


class GatheredWriter(ShardWriter):
    """Writes one set of whole tensors, the leader's: weights under their plain names, so that others can read them.

    `weights` is their file's usual name: `model`, cut into several files of `shard_bytes` as Hugging Face does, or
    `adapter_model`, which is never cut. Boxes come over `group`; no more than one whole tensor is in memory.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        rank: int,
        finish: Finish,
        done: Done,
        *,
        group: ProcessGroup,
        weights: str,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        super().__init__(root, step, rank, finish, done)
        self._group, self._weights, self._shard_bytes = group, weights, shard_bytes
        self._coming: deque[_Owned] = deque()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the leader: every tensor is one box; Hugging Face's index too, where the weights are in several files."""
        assert self._folder is not None
        tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        whole = {
            name: TensorStorageMetadata(t.properties, t.size, [ChunkStorageMetadata(_origin(t.size), t.size)])
            for name, t in tensors.items()
        }
        found = (result for part in results for result in part if result.storage_data.file.startswith("model-"))
        if places := {result.index.fqn: result.storage_data.file for result in found}:
            self._folder.write_json(HF_INDEX, {"metadata": {}, "weight_map": places})
        super().finish(Metadata(dict(whole)), results)

    def _all(self, plans: list[SavePlan]) -> list[_Owned]:
        """Every rank's boxes, tensor by tensor: in this order they are sent and received."""
        found = [_Owned(rank, item) for rank, plan in enumerate(plans) for item in plan.items]
        return sorted(found, key=lambda box: (_is_state(box.item), box.item.index.fqn, _box(box.item).offsets))

    def _write(
        self, folder: Path, items: Sequence[WriteItem], everything: list[_Owned], planner: SavePlanner
    ) -> Iterator[WriteResult]:
        if self._rank != 0:
            for box in everything:
                if box.rank == self._rank:
                    dist.send(_raw(_get(planner, box.item)), 0, group=self._group)
            return
        self._coming = deque(box for box in everything if box.rank != 0)
        try:
            for name, tensors in self._files(everything).items():
                facts = write_file(folder / name, [self._entry(boxes, planner) for boxes in tensors])
                for item in (boxes[0].item for boxes in tensors):
                    fqn, size = item.index.fqn, _data(item).size
                    nbytes = size.numel() * _dtype(item).itemsize
                    yield WriteResult(MetadataIndex(fqn, _origin(size)), nbytes, Stored(name, fqn, facts))
        finally:
            while self._coming:  # after an error: the others count on this rank to take what they send
                self._receive()

    def _files(self, everything: list[_Owned]) -> dict[str, list[list[_Owned]]]:
        """File -> the boxes of each of its tensors."""
        tensors: dict[str, list[_Owned]] = {}
        for box in everything:
            tensors.setdefault(box.item.index.fqn, []).append(box)
        files: dict[str, list[list[_Owned]]] = {}
        for stem, is_state in ((self._weights, False), ("optimizer", True)):
            mine = [boxes for boxes in tensors.values() if _is_state(boxes[0].item) == is_state]
            parts = list(_cut(mine, self._shard_bytes)) if stem != "adapter_model" else [mine]
            for number, part in enumerate(parts, 1):
                numbered = f"{stem}-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else stem
                files |= {f"{numbered}.safetensors": part} if part else {}
        return files

    def _entry(self, boxes: list[_Owned], planner: SavePlanner) -> PendingTensor:
        item = boxes[0].item
        return PendingTensor(
            item.index.fqn, tuple(_data(item).size), _dtype(item), partial(self._whole, boxes, planner)
        )

    def _whole(self, boxes: list[_Owned], planner: SavePlanner) -> Tensor:
        whole = torch.empty(_data(boxes[0].item).size, dtype=_dtype(boxes[0].item))
        for box in boxes:
            chunk = _box(box.item)
            place = tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = _get(planner, box.item) if box.rank == 0 else self._receive()
        return whole

    def _receive(self) -> Tensor:
        """The next box from another rank."""
        box = self._coming.popleft()
        tensor = torch.empty(_box(box.item).sizes, dtype=_dtype(box.item))
        dist.recv(_raw(tensor), box.rank, group=self._group)
        return tensor


class Reader(StorageReader):
    """Rows from a verified `step-N` folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = Index(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads: a reader serves one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as torch plans with it."""
        return self._index.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the index knows where boxes lie."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan lists, box by box, into this rank's tensors. Raises Fault where a dtype differs."""
        for item in plan.items:
            target = planner.resolve_tensor(item)
            rows = self._index.within(item.storage_index, tuple(item.storage_offsets), tuple(item.lengths))
            if rows.dtype != target.dtype:
                raise Fault(
                    f"{self._folder}: {item.dest_index.fqn} is {rows.dtype} there and {target.dtype} here; go on where "
                    "the run began, on a device of the same kind"
                )
            target.copy_(rows)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path."""
        return False


def _balanced(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """The items in at most MOST_PARTS parts of about PART_BYTES, nearly equal, each in the items' order."""
    whole = sum(map(_bytes, items))
    count = max(1, min(MOST_PARTS, len(items), -(-whole // PART_BYTES)))
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    before = 0
    for item in items:
        parts[min(count - 1, before * count // max(1, whole))].append(item)
        before += _bytes(item)
    return [part for part in parts if part]


def _cut(tensors: Sequence[list[_Owned]], limit: int) -> Iterator[list[list[_Owned]]]:
    """Tensors, in order, in parts of at most `limit` bytes; a larger one by itself."""
    part: list[list[_Owned]] = []
    room = limit
    for boxes in tensors:
        size = sum(_bytes(box.item) for box in boxes)
        if part and size > room:
            yield part
            part, room = [], limit
        part.append(boxes)
        room -= size
    yield part


def _key(item: WriteItem) -> str:
    """The box's name in a rank's file: the tensor's, and where the box begins if it is not the whole."""
    box, name = _box(item), item.index.fqn
    return name if box.sizes == _data(item).size else f"{name}@{','.join(map(str, box.offsets))}"


def _origin(size: torch.Size) -> torch.Size:
    return torch.Size([0] * len(size))


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _box(item: WriteItem) -> ChunkStorageMetadata:
    return _data(item).chunk


def _dtype(item: WriteItem) -> torch.dtype:
    return _data(item).properties.dtype


def _bytes(item: WriteItem) -> int:
    return _box(item).sizes.numel() * _dtype(item).itemsize


def _is_state(item: WriteItem) -> bool:
    return item.index.fqn.startswith(OPTIMIZER)


def _get(planner: SavePlanner, item: WriteItem) -> Tensor:
    """This rank's box, whole and on the host."""
    return cast(Tensor, planner.resolve_data(item)).detach().cpu().contiguous()


def _raw(tensor: Tensor) -> Tensor:
    """Its bytes, sharing memory: gloo need not know the dtype."""
    return tensor.view(-1).view(torch.uint8)
