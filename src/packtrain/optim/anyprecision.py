"""AdamW without anything in fp32: bf16 moments, and bf16 weights that still add up small updates.

A bf16 weight near 1 moves by 1/128 or not at all, so that updates of 1e-5 are all lost; and moments rounded to nearest
stop following the gradient (1 - beta2 is less than half of bf16's last place: exp_avg_sq would never fall again).
Three things keep that from happening, at 8 bytes an element where fp32 masters take 14:

    remainder   int16 beside each bf16 weight: the low half of an fp32 sum whose high half is the weight. Kahan's
                compensation, exact: what rounding takes from a weight is there in the next step, to the last bit
    rounding    moments are rounded up or down by chance, so that they are right in the mean. The chance is a function
                of the element and the step: the same on any number of ranks, and after a resume
    fp32        all arithmetic: in registers by a Triton kernel on GPUs, else some 2**25 elements at a time

After AnyPrecisionAdamW of PyTorch's torchdistx, which llama-recipes carries: that one rounds moments to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packtrain.kernels.rows import HAS_TRITON, INTERPRETED, by_triton

if HAS_TRITON and (torch.cuda.is_available() or INTERPRETED):
    from packtrain.optim.anyprecision_triton import update as triton_update

BUCKET = 2**25
"""Elements updated together: enough for a GPU, and the fp32 temporaries of one step stay below 1 GiB."""

MOMENTS = torch.bfloat16

HALF = 2**16
"""What the low half of 32 bits counts to."""


class AnyPrecisionAdamW:
    """AdamW over values of any float type. bf16 ones get remainders unless `use_kahan` is False."""

    def __init__(
        self,
        values: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        use_kahan: bool = True,
    ) -> None:
        self.lr = lr
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._step = torch.zeros((), device=values[0].device)
        dtypes = dict.fromkeys(value.dtype for value in values)
        self._stores = [
            _Store([(i, v) for i, v in enumerate(values) if v.dtype == dtype], use_kahan) for dtype in dtypes
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], refused: Tensor) -> None:
        """One update; nothing is waited for."""
        self._step.add_(1 - refused)
        step = self._step.double()  # 1 - 0.999 would lose four digits in fp32
        beta1, beta2 = self._betas
        factors = torch.stack([self.lr / (1 - beta1**step), 1 / (1 - beta2**step)]).float()
        flat = [gradient.reshape(-1) for gradient in gradients]
        update = self._update_in_registers if by_triton(self._step) else self._update
        for store in self._stores:
            for bucket in store.buckets:
                update(store, bucket, flat, factors, refused)

    def state(self) -> list[dict[str, Tensor]]:
        """`step` (one for all), `exp_avg` and `exp_avg_sq` bf16, `remainder` int16 where one is kept."""
        found = dict(pair for store in self._stores for pair in store.state())
        return [{"step": self._step, **found[i]} for i in sorted(found)]

    def _update(
        self, store: _Store, bucket: _Bucket, gradients: Sequence[Tensor], factors: Tensor, refused: Tensor
    ) -> None:
        (beta1, beta2), stays = self._betas, refused > 0
        gradient = _cat([gradients[piece.number][piece.start : piece.stop] for piece in bucket.pieces])
        old, old_sq = store.exp_avg[bucket.span].float(), store.exp_avg_sq[bucket.span].float()
        mean = torch.where(stays, old, old.lerp(gradient, 1 - beta1))
        square = torch.where(stays, old_sq, (old_sq * beta2).addcmul_(gradient, gradient, value=1 - beta2))
        del gradient, old, old_sq
        update = (mean / (square * factors[1]).sqrt_().add_(self._eps)).mul_(factors[0])
        value = store.read(bucket)
        store.write(bucket, torch.where(stays, value, (value * (1 - self.lr * self._weight_decay)).sub_(update)))
        chance = _hash(mean, self._step)
        _round_(mean, chance & (HALF - 1))
        _round_(square, (chance >> 16) & (HALF - 1))
        store.exp_avg[bucket.span] = mean
        store.exp_avg_sq[bucket.span] = square

    def _update_in_registers(
        self, store: _Store, bucket: _Bucket, gradients: Sequence[Tensor], factors: Tensor, refused: Tensor
    ) -> None:
        place = bucket.span.start
        for piece in bucket.pieces:
            span = slice(place, place := place + piece.stop - piece.start)
            triton_update(
                piece.view,
                None if store.remainder is None else store.remainder[span],
                store.exp_avg[span],
                store.exp_avg_sq[span],
                gradients[piece.number][piece.start : piece.stop],
                factors,
                self._step,
                refused,
                decay=1 - self.lr * self._weight_decay,
                betas=self._betas,
                eps=self._eps,
            )


class _Piece(NamedTuple):
    """Elements [start, stop) of a value, by its `number`, and a view of them."""

    number: int
    start: int
    stop: int
    view: Tensor


class _Bucket(NamedTuple):
    """Pieces that are updated together, and where they lie in the store's flat tensors."""

    span: slice
    pieces: list[_Piece]


class _Store:
    """The states of all values of one dtype, end to end in one tensor each."""

    def __init__(self, values: list[tuple[int, Tensor]], use_kahan: bool) -> None:
        self._values = values
        first = values[0][1]
        total = sum(value.numel() for _, value in values)
        self.exp_avg = torch.zeros(total, dtype=MOMENTS, device=first.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        keeps = use_kahan and first.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(self.exp_avg, dtype=torch.int16) if keeps else None
        self.buckets = list(_buckets(values))

    def read(self, bucket: _Bucket) -> Tensor:
        """The values as fp32, a copy: with what their remainders add."""
        stored = _cat([piece.view for piece in bucket.pieces])
        if self.remainder is None:
            return stored.to(torch.float32, copy=True)
        return (stored.view(torch.int16).int() << 16).add_(self.remainder[bucket.span]).view(torch.float32)

    def write(self, bucket: _Bucket, value: Tensor) -> None:
        """fp32 into the values, rounded to nearest; what is left over into their remainders."""
        stored = value
        if self.remainder is not None:
            bits = value.view(torch.int32)
            high = (bits + HALF // 2) >> 16
            self.remainder[bucket.span] = bits - (high << 16)
            stored = high.to(torch.int16).view(torch.bfloat16)
        parts = torch.split(stored, [piece.stop - piece.start for piece in bucket.pieces])
        torch._foreach_copy_([piece.view for piece in bucket.pieces], list(parts))

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Each value's number and its states, as views of its shape."""
        names = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        names |= {} if self.remainder is None else {"remainder": self.remainder}
        place = 0
        for index, value in self._values:
            yield index, {name: flat[place : place + value.numel()].view_as(value) for name, flat in names.items()}
            place += value.numel()


def _buckets(values: list[tuple[int, Tensor]]) -> Iterator[_Bucket]:
    """Values end to end, cut every `BUCKET` elements."""
    pieces: list[_Piece] = []
    begin = end = 0
    for index, value in values:
        flat, done = value.view(-1), 0
        while done < flat.numel():
            stop = min(flat.numel(), done + BUCKET - (end - begin))
            pieces.append(_Piece(index, done, stop, flat[done:stop]))
            end += stop - done
            done = stop
            if end - begin == BUCKET:
                yield _Bucket(slice(begin, end), pieces)
                begin, pieces = end, []
    if pieces:
        yield _Bucket(slice(begin, end), pieces)


def _cat(parts: list[Tensor]) -> Tensor:
    """One flat tensor; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _round_(value: Tensor, chance: Tensor) -> None:
    """fp32 to what bf16 can hold, in place: away from zero with the probability of what is cut off.

    `chance` is int32, uniform in [0, 2**16). A value that bf16 holds stays as it is.
    """
    value.view(torch.int32).add_(chance).bitwise_and_(-HALF)


def _hash(value: Tensor, step: Tensor) -> Tensor:
    """32 bits of each fp32 element and the step (0-dim), in which each bit depends on all (murmur3's finaliser)."""
    bits = value.view(torch.int32) + step.int() * (0x9E3779B1 - 2**32)
    _shift_xor_(bits, 16).mul_(0x85EBCA6B - 2**32)
    _shift_xor_(bits, 13).mul_(0xC2B2AE35 - 2**32)
    return _shift_xor_(bits, 16)


def _shift_xor_(bits: Tensor, by: int) -> Tensor:
    """bits ^= bits >> by, int32 taken as unsigned."""
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (32 - by)) - 1))
