"""The run's own state through torch.distributed.checkpoint: saved by so many ranks, loaded by any other number.

    rows_of         model and optimizer -> what each rank has of every tensor, by Hugging Face's (PEFT's) names
    save, load      rows -> a `step-N` folder, and back; collective over `saving_group`
    saving_group    a gloo group of its own, so that a save never meets training's collectives

A rank's shard of a fused parameter is no shard of q_proj: it is handed over as pieces, each rows of one Hugging Face
tensor, and moments and masters the same way. So neither the number of ranks nor the fusing is in a checkpoint.
There is no random state to keep: order, new weights and dropout are functions of seed, step and row.

`save` touches nothing but its arguments: given rows copied to host memory it may run in a thread beside the training.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from packtrain.checkpoint.dcp_folder import StepFolder, free_bytes
from packtrain.checkpoint.dcp_index import Index
from packtrain.checkpoint.dcp_storage import OPTIMIZER, GatheredWriter, Reader, ShardWriter
from packtrain.checkpoint.folder import count, listed
from packtrain.distributed.parallelize import local_rows, reshard
from packtrain.errors import Fault, PacktrainError, UserError
from packtrain.model.linear import layout
from packtrain.optim import Optimizer
from packtrain.peft import adapter_tensors

Kind = Literal["SHARDED_STATE_DICT", "FULL_STATE_DICT"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

PATIENCE = timedelta(hours=2)
"""How long a rank waits for another one's file: disks may be slow, and a rank that is gone is noticed at once."""


class Rows:
    """What this rank has of a tensor, as torch.distributed.checkpoint asks for it (its checkpointable protocol).

    `boxes` maps the place in the whole, of `shape`, where a part begins to that part. At least one, all of one dtype.
    """

    def __init__(self, shape: tuple[int, ...], boxes: Mapping[tuple[int, ...], Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.boxes = {torch.Size(offset): part for offset, part in boxes.items()}

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self.shape

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, part.size()),
                    properties=TensorProperties(dtype=part.dtype),
                    size=self.shape,
                ),
            )
            for offset, part in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, part.size()) for offset, part in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.boxes[index.offset]


class _Piece(NamedTuple):
    """Rows [start, stop) of our parameter are a Hugging Face tensor, or part `place` of its columns `of` so many."""

    name: str
    parameter: str
    start: int
    stop: int
    place: int = 0
    of: int = 1


def rows_of(model: nn.Module, optimizer: Optimizer | None, *, adapter: bool) -> dict[str, Rows]:
    """This rank's rows of everything that a checkpoint holds, sharing memory with model and optimizer.

    All weights, or with `adapter` those that learn; without an `optimizer` its state is left out. Tensors of which
    this rank has no row are not in it.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    states = {} if optimizer is None else optimizer.state()
    found: dict[str, Rows] = {}
    for piece in _pieces(model, adapter):
        local, first = local_rows(parameters[piece.parameter])
        _add(found, piece.name, _part(piece, local, first))
        for kind, tensor in states.get(piece.parameter, {}).items():
            part = _scalar(piece, tensor) if tensor.ndim == 0 else _part(piece, tensor, first)
            _add(found, f"{OPTIMIZER}{kind}.{piece.name}", part)
    for name, tensor in ({} if optimizer is None else optimizer.scalars()).items():
        found[f"{OPTIMIZER}{name}"] = Rows((1,), {(0,): tensor.view(1)})
    return found


def saving_group() -> ProcessGroup:
    """All ranks, over gloo; every rank calls it once, at the start."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, ProcessGroup)
    return group


def save(
    root: Path,
    step: int,
    rows: Mapping[str, Rows],
    finish: Callable[[StepFolder], None],
    *,
    group: ProcessGroup,
    kind: Kind = "SHARDED_STATE_DICT",
    weights: str = "model",
    done: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write `root/step-N`; every rank of `group` calls it. `finish`, on the leader, adds the small files.

    `done`, on the leader too, is given the folder once it counts and has been read back from the disk. `weights` names
    FULL_STATE_DICT's file. Raises Fault on every rank if any could not write; nothing is then left.
    """
    rank = dist.get_rank(group)
    if kind == "FULL_STATE_DICT":
        writer: ShardWriter = GatheredWriter(root, step, rank, finish, done, group=group, weights=weights)
    else:
        writer = ShardWriter(root, step, rank, finish, done)
    try:
        dcp_save(dict(rows), storage_writer=writer, planner=_SavePlanner(), process_group=group)
    except CheckpointException as error:
        raise _told(error, f"{root}: the checkpoint of step {step} could not be saved", root) from error
    finally:
        writer.abandon()


def load(folder: Path, rows: Mapping[str, Rows], *, group: ProcessGroup) -> None:
    """Fill `rows`, in place, from a verified folder; every rank of `group` calls it.

    Raises Fault on every rank if a tensor is missing, left over, or of another shape or dtype.
    """
    asked: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(asked, list(rows), group=group)
    left_over = sorted(set(Index(folder).tensors).difference(*asked))
    if left_over:
        raise Fault(f"{folder}: {count(left_over, 'not of this run')}: {listed(left_over)}")
    try:
        dcp_load(dict(rows), storage_reader=Reader(folder), planner=_LoadPlanner(), process_group=group)
    except CheckpointException as error:
        raise _told(error, f"{folder}: cannot be loaded") from error


def _pieces(model: nn.Module, adapter: bool) -> Iterator[_Piece]:
    if not adapter:
        for ours, pieces in layout(model).items():
            yield from (_Piece(piece.name, ours, piece.start, piece.stop) for piece in pieces)
        return
    for name, saved in adapter_tensors(model).items():  # a tied weight under both names, as peft reads it
        for place, ours in enumerate(saved.parameters):
            yield _Piece(name, ours, saved.start, saved.stop, place, len(saved.parameters))


def _part(piece: _Piece, local: Tensor, first: int) -> Rows | None:
    """The rows that are both in `local`, a parameter's rows from `first` on, and in the piece."""
    start, stop = max(first, piece.start), min(first + local.shape[0], piece.stop)
    if stop <= start:
        return None
    mine = local[start - first : stop - first]
    offset, shape = [start - piece.start, *[0] * (mine.ndim - 1)], [piece.stop - piece.start, *mine.shape[1:]]
    if piece.of > 1:
        offset[1], shape[1] = piece.place * mine.shape[1], piece.of * mine.shape[1]
    return Rows(tuple(shape), {tuple(offset): mine})


def _scalar(piece: _Piece, tensor: Tensor) -> Rows:
    """A number for each parameter of a tensor; every rank has it."""
    return Rows((piece.of,), {(piece.place,): tensor.view(1)})


def _add(found: dict[str, Rows], name: str, part: Rows | None) -> None:
    if part is not None:
        found.setdefault(name, part).boxes.update(part.boxes)


class _SavePlanner(DefaultSavePlanner):
    """Torch's, for objects that are no tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of a piece."""
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """The same."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Without torch's walk through the tensors, which knows its own kinds only."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of a piece."""
        tensor: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return tensor


def _told(failure: CheckpointException, what: str, written: Path | None = None) -> PacktrainError:
    """One sentence from the first rank's error, and one more where there was no room to write."""
    rank, (error, _) = min(failure.failures.items())
    if isinstance(error, UserError):
        return error
    who = f"rank {rank}: " if len(failure.failures) == 1 and rank else ""
    full = ""
    if written is not None and isinstance(error, OSError) and error.errno in NO_ROOM:
        full = (
            f"; {free_bytes(written) / 1e9:.2f} GB are free there. The checkpoint before it is kept: make room (quotas "
            "and `ulimit -f` count too), and the same command goes on from it"
        )
    return Fault(f"{what} ({who}{error}){full}")
