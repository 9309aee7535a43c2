"""Layers' inputs on the host between the forward and the backward, for rows or budgets that leave them no room.

    install         lets the inputs of recomputed layers wait there
    Away            copies them out behind the forward, and back ahead of the backward

A layer that is recomputed whole keeps one tensor, its input. Here that goes to pinned memory on a stream of its own
while the layer computes, and comes back while the layer after it goes back. On the device are then two or three of them
at a time. Nothing waits on the host but for memory, which is made when it is first needed and used by every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packtrain.errors import Fault

PART = 2**27
"""Bytes of host memory taken at a time: torch rounds what it pins up to a power of two, a last part by little."""


def install(layers: Sequence[Any], device: torch.device) -> Away:
    """Inputs of these layers, which compute on `device` and are recomputed whole, wait on the host."""
    away = Away(len(layers), device)
    for place, layer in enumerate(layers):
        layer.away = partial(away.watching, place)
    return away


class _Waits(NamedTuple):
    """A layer's input, in autograd's hands while it is on the host."""

    place: int
    shape: torch.Size
    dtype: torch.dtype


class _Moving(NamedTuple):
    """A tensor on the device, and when its copy is done."""

    tensor: Tensor
    done: Any


class Away:
    """Inputs of all layers of a model. One forward with its backward at a time."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._host: list[list[Tensor]] = [[] for _ in range(layers)]
        self._device, self._pins = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pins else None  # type: ignore[no-untyped-call]
        self._waiting: dict[int, _Waits] = {}
        self._going: dict[int, _Moving] = {}
        self._coming: dict[int, _Moving] = {}

    @property
    def host_bytes(self) -> int:
        """Host memory it has taken so far."""
        return sum(part.nbytes for parts in self._host for part in parts)

    def watching(self, place: int, stream: Any) -> AbstractContextManager[None]:
        """While a layer runs: what autograd keeps of the shape of its residual `stream` [T, D] goes to the host."""
        first = stream[0] if isinstance(stream, tuple) else stream
        shape, dtype = first.shape, first.dtype  # autograd keeps the hooks: the tensor itself must not be in them

        def pack(tensor: Tensor) -> Any:
            like = tensor.shape == shape and tensor.dtype == dtype
            return self._leave(place, tensor.detach()) if like else tensor

        def unpack(kept: Any) -> Tensor:
            return self._back(kept) if isinstance(kept, _Waits) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _leave(self, place: int, tensor: Tensor) -> _Waits:
        if place == 0:
            self._forget()
        self._drop_gone()
        room = self._room(place, tensor)
        done = self._queue(lambda: _copy(tensor, room, out=True))
        self._going[place] = _Moving(tensor, done)  # its memory is not free before the copy is done
        self._waiting[place] = _Waits(place, tensor.shape, tensor.dtype)
        return self._waiting[place]

    def _back(self, kept: _Waits) -> Tensor:
        """The input of a layer, and the one that is needed next on its way."""
        going = self._going.pop(kept.place, None)
        self._drop_gone()
        coming = None if going is not None else self._coming.pop(kept.place, None) or self._fetch(kept)
        if coming is not None:
            self._wait(coming.done)
        following = self._waiting.get(kept.place - 1)
        if following is not None and following.place not in self._coming:
            self._coming[following.place] = self._fetch(following)
        found = going or coming
        assert found is not None
        return found.tensor

    def _fetch(self, kept: _Waits) -> _Moving:
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        room = self._room(kept.place, tensor)
        return _Moving(tensor, self._queue(lambda: _copy(tensor, room, out=False)))

    def _queue(self, copy: Any) -> Any:
        """Run copies on the side, after all that is queued by now; gives the event of their end."""
        if self._stream is None:
            return copy()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
        return self._stream.record_event()

    def _wait(self, done: Any) -> None:
        """The device's own stream goes on after that."""
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)

    def _drop_gone(self) -> None:
        """Give back the memory of what has been copied out: at the next layer the copy is long done."""
        while self._going:
            self._wait(self._going.popitem()[1].done)

    def _forget(self) -> None:
        """What a forward without its backward has left."""
        self._drop_gone()
        while self._coming:
            self._wait(self._coming.popitem()[1].done)
        self._waiting.clear()

    def _room(self, place: int, like: Tensor) -> list[Tensor]:
        """Host memory for a layer's input, part by part."""
        have, rows = self._host[place], max(1, PART // (like.shape[1] * like.itemsize))
        sizes = [min(rows, like.shape[0] - start) for start in range(0, like.shape[0], rows)]
        for i, size in enumerate(sizes):
            if i == len(have):
                have.append(self._pinned(size, like))
            elif len(have[i]) < size:
                have[i] = self._pinned(size, like)
        return [part[:size] for part, size in zip(have, sizes, strict=False)]

    def _pinned(self, rows: int, like: Tensor) -> Tensor:
        try:
            return torch.empty(rows, like.shape[1], dtype=like.dtype, pin_memory=self._pins)
        except RuntimeError as error:
            raise Fault(
                f"--activation_checkpointing offload: the host gave no more pinned memory for layers' inputs after "
                f"{self.host_bytes / 2**30:.1f} GiB ({str(error).splitlines()[0]}); a shorter --context_length or a "
                "smaller --batch_size_training needs less"
            ) from None


def _copy(tensor: Tensor, room: list[Tensor], *, out: bool) -> None:
    """Between a tensor and its parts on the host."""
    for part, mine in zip(room, torch.split(tensor, [len(part) for part in room]), strict=True):
        source, target = (mine, part) if out else (part, mine)
        target.copy_(source, non_blocking=True)
