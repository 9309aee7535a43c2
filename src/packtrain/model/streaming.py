"""Frozen decoder layers that live in the host's memory, and are copied to the device ahead of their use.

    streamable      the layers that can, in the fused form
    layer_bytes     what one takes on the device, pinned_bytes on the host
    spread          which of them, if so many have to
    install         gives those their memory on the host; before the others get theirs, on meta
    Conveyor        a few places on the device, what is in them, and what comes next

On the host a layer's four weights are one run of bytes, laid out as products want them (kernels/lowrank.py: with room
for the adapters' columns), so that one copy brings a layer, and the products run as they do over weights that stay:
with the same bits. While a layer is at work the next ones come, on a stream of their own: upwards in a forward,
downwards in a backward. A place is written only after all work that was asked for before the present layer, and a
layer's work waits for its copy; the host waits for neither. What the forward used last is still there when the backward
begins, and the first layers are when the next forward does, so that a step copies every streamed layer but SLOTS twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from packtrain.kernels import float8
from packtrain.kernels.lowrank import stored
from packtrain.kernels.rows import Form
from packtrain.model.fast import plan_of
from packtrain.model.fast_layer import FastLayer
from packtrain.model.quantised import QuantisedLinear
from packtrain.model.shared import linears

SLOTS = 3
"""Layers that have a place on the device: one at work, and two ahead, since the time between two of them varies."""


def streamable(model: nn.Module) -> list[int]:
    """Numbers of the layers whose four products are frozen, and not quantised."""
    return [
        number
        for number, layer in enumerate(cast(Any, model).model.layers)
        if not any(isinstance(each, QuantisedLinear) or each.weight.requires_grad for each in linears(layer))
    ]


def layer_bytes(layer: Any, form: Form) -> int:
    """Of a layer's four weights with room for their adapters' columns."""
    elements = sum(rows * width for rows, width in (stored(plan_of(linear), form) for linear in linears(layer)))
    return elements * _dtype(form).itemsize


def pinned_bytes(size: int) -> int:
    """What torch takes of the host for so many pinned bytes: a power of two."""
    return 1 << (size - 1).bit_length()


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """`count` of the numbers, the first and the last among them, evenly: each copy has the same time to come in."""
    if count <= 1:
        return list(numbers[:count])
    return [numbers[round(place * (len(numbers) - 1) / (count - 1))] for place in range(count)]


def install(model: nn.Module, numbers: Sequence[int], device: torch.device) -> None:
    """Let these layers, on meta and in the fused form, live on the host, without values, and work on `device`.

    The memory is pinned if the device is a GPU.
    """
    layers, homes = cast(Any, model).model.layers, []
    for number in numbers:
        layer = layers[number]
        size = layer_bytes(layer, layer.fast.shared.form)
        homes.append(torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda"))
        for linear, weight in zip(linears(layer), _weights(homes[-1], layer.fast), strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
    conveyor = Conveyor(homes, device)
    for place, number in enumerate(numbers):
        layers[number].fast.weights = partial(_brought, conveyor, place)


def _brought(conveyor: Conveyor, place: int, layer: Any) -> list[Tensor]:
    return _weights(conveyor.take(place, returns=layer.training), layer.fast)


def _weights(whole: Tensor, fast: FastLayer) -> list[Tensor]:
    """The four weights that a layer's bytes are, views."""
    form, made, start = fast.shared.form, [], 0
    for plan in fast.plans:
        rows, width = stored(plan, form)
        stop = start + rows * width * _dtype(form).itemsize
        made.append(whole[start:stop].view(_dtype(form)).view(rows, width)[: plan.n, : plan.k])
        start = stop
    return made


def _dtype(form: Form) -> torch.dtype:
    return float8.E4M3 if form.float8 else form.dtype


class Conveyor:
    """Brings one of `homes`, uint8 on the host, to the device, and those that will follow it."""

    def __init__(self, homes: Sequence[Tensor], device: torch.device) -> None:
        self._homes = homes
        most = max(map(len, homes))
        self._slots = [torch.zeros(most, dtype=torch.uint8, device=device) for _ in homes[:SLOTS]]
        self._held: list[int | None] = [None] * len(self._slots)
        self._last = -1
        self._lane = _Lane(device)

    def take(self, number: int, returns: bool) -> Tensor:
        """The bytes of `number` on the device, for what is asked of it until another one is taken.

        `returns`: a backward will go the same way down; else the next one after the last is the first.
        """
        coming = self._coming(number, returns)
        self._lane.begin()
        slot = self._bring(number, coming)
        self._lane.wait(slot)
        for other in coming:
            self._bring(other, [number, *coming])
        self._last = number
        return self._slots[slot]

    def _coming(self, number: int, returns: bool) -> list[int]:
        """What will be taken next, as far as there are places: on the way that was gone so far, and then back."""
        above, below = range(number + 1, len(self._homes)), range(number - 1, -1, -1)
        turns = number == self._last == len(self._homes) - 1
        if turns or number == self._last - 1:
            return list(islice(chain(below, above), SLOTS - 1))
        return list(islice(chain(above, below if returns else range(number)), SLOTS - 1))

    def _bring(self, number: int, keep: Sequence[int]) -> int:
        """The slot of `number`, copied if it is in none, over one that need not be kept."""
        if number not in self._held:
            slot = next(slot for slot, held in enumerate(self._held) if held not in keep)
            home = self._homes[number]
            self._lane.copy(slot, self._slots[slot][: len(home)], home)
            self._held[slot] = number
        return self._held.index(number)


class _Lane:
    """Copies on a stream of their own; on a CPU they are made at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._arrived: dict[int, torch.cuda.Event] = {}

    def begin(self) -> None:
        """Copies to come are made after all that was asked of the device before."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, slot: int, to: Tensor, home: Tensor) -> None:
        if self._stream is None:
            to.copy_(home)
            return
        with torch.cuda.stream(self._stream):
            to.copy_(home, non_blocking=True)
            self._arrived[slot] = self._stream.record_event()

    def wait(self, slot: int) -> None:
        """What is asked of the device from now on finds the slot's last copy made."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])
