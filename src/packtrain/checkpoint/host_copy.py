"""What a checkpoint holds, copied to host memory, so that it can be written while training changes the original.

    HostCopy        the buffers, used again by every save; `prepare` makes them, `take` fills them
    Taken           rows of one copy, and when they are all there

On CUDA the copies are queued on a stream of their own into page-locked memory: the host waits for nothing, and the
device only before it changes what is still being copied (`Taken.event`; see Optimizer.hold).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from packtrain import log
from packtrain.checkpoint.dcp import Rows
from packtrain.distributed import host_memory

_ALIGN = 64
_SHARE = 0.9
"""Of the free host memory that copies may take."""

_Key = tuple[str, torch.Size, torch.Size, torch.dtype]
"""Name, place in the whole, shape, dtype."""


class Taken(NamedTuple):
    """A copy, whole once `event` has happened (None: it is whole)."""

    rows: dict[str, Rows]
    event: torch.cuda.Event | None


class HostCopy:
    """One set of buffers for one save at a time; `neighbours` are the ranks that share this machine's memory."""

    def __init__(self, neighbours: int = 1) -> None:
        self._neighbours = neighbours
        self._buffers: dict[_Key, Tensor] = {}
        self._memory: Tensor | None = None
        """What the buffers are views of: it is locked for as long as this very object lives."""
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, rows: Mapping[str, Rows]) -> None:
        """Take the memory for copies of such `rows`, if there is any: page-locking 10 GB takes 5 seconds."""
        parts = dict(_parts(rows))
        need, free = self._needed(parts)
        if need <= free:
            self._make(parts)

    def take(self, rows: Mapping[str, Rows]) -> Taken | None:
        """Copy all of `rows`; None if the host has no memory for it. What an earlier call gave is written over."""
        parts = dict(_parts(rows))
        if parts.keys() != self._buffers.keys():
            self._buffers, self._memory = {}, None
            need, free = self._needed(parts)
            if need > free:
                log.once(
                    f"a checkpoint's copy takes {need / 1e9:.2f} GB of host memory a rank, and {free / 1e9:.2f} GB are "
                    "free for it: checkpoints are written while the training waits"
                )
                return None
            self._make(parts)
        event = self._copy(parts)
        copied = {
            name: Rows(
                tuple(row.shape),
                {tuple(place): self._buffers[_key(name, place, part)] for place, part in row.boxes.items()},
            )
            for name, row in rows.items()
        }
        return Taken(copied, event)

    def _needed(self, parts: Mapping[_Key, Tensor]) -> tuple[int, float]:
        """Bytes that copies take, and may take."""
        return sum(map(_size, parts.values())), host_memory.free() * _SHARE / self._neighbours

    def _make(self, parts: Mapping[_Key, Tensor]) -> None:
        """A buffer for each part, all in one piece of memory: torch's own page-locked tensors take powers of two."""
        whole = torch.empty(sum(map(_size, parts.values())), dtype=torch.uint8)
        if any(part.is_cuda for part in parts.values()):
            _lock(whole)
        found, start = {}, 0
        for key, part in parts.items():
            found[key] = whole[start : start + part.numel() * part.itemsize].view(part.dtype).view(part.shape)
            start += _size(part)
        self._buffers, self._memory = found, whole

    def _copy(self, parts: Mapping[_Key, Tensor]) -> torch.cuda.Event | None:
        """Queue or make the copies; on CUDA the event that ends them."""
        device = next((part.device for part in parts.values() if part.is_cuda), None)
        if device is None:
            for key, part in parts.items():
                self._buffers[key].copy_(part)
            return None
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for key, part in parts.items():
                self._buffers[key].copy_(part, non_blocking=True)
                if part.is_cuda:
                    part.record_stream(self._stream)  # its memory may be given back before the copy has run
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return event


def _key(name: str, place: torch.Size, part: Tensor) -> _Key:
    return name, place, part.shape, part.dtype


def _parts(rows: Mapping[str, Rows]) -> Iterator[tuple[_Key, Tensor]]:
    for name, row in rows.items():
        for place, part in row.boxes.items():
            yield _key(name, place, part), part


def _size(part: Tensor) -> int:
    return -(-part.numel() * part.itemsize // _ALIGN) * _ALIGN


def _lock(memory: Tensor) -> None:
    """Let the device write into it directly, as long as this very tensor lives: views of it do not keep the lock.

    Where the system does not allow that, copies work and are waited for.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) != 0:
        log.once("host memory for checkpoints could not be page-locked (see ulimit -l): copies to it are slower")
        return
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
