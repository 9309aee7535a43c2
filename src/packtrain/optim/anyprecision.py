"""AdamW without anything in fp32: moments of 2 bytes or of one, and bf16 weights that still add up small updates.

A bf16 weight near 1 moves by 1/128 or not at all, so that updates of 1e-5 are all lost; and moments rounded to nearest
stop following the gradient (1 - beta2 is less than half of bf16's last place: exp_avg_sq would never fall again).
Three things keep that from happening, at 8 bytes an element, or 6, where fp32 masters take 14:

    remainder   int16 beside each bf16 weight: the low half of an fp32 sum whose high half is the weight. Kahan's
                compensation, exact: what rounding takes from a weight is there in the next step, to the last bit
    rounding    moments are rounded up or down by chance, so that they are right in the mean. The chance is a function
                of the element and the step: the same on any number of ranks, and after a resume
    fp32        all arithmetic: in registers by a Triton kernel on GPUs, else some 2**25 elements at a time

Moments are bf16, or those of matrices codes of 8 bits (codes.py). Gradients are read as they are, bf16 or fp32.

After AnyPrecisionAdamW of PyTorch's torchdistx, which llama-recipes carries: that one rounds moments to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from packtrain.kernels.rows import HAS_TRITON, INTERPRETED, by_triton
from packtrain.optim import codes

if HAS_TRITON and (torch.cuda.is_available() or INTERPRETED):
    from packtrain.optim.anyprecision_triton import update as triton_update

BUCKET = 2**25
"""Elements of a value updated together: enough for a GPU, and the fp32 temporaries stay below 1 GiB."""

MOMENTS = torch.bfloat16

HALF = 2**16
"""What the low half of 32 bits counts to."""


class AnyPrecisionAdamW:
    """AdamW over values of any float type. bf16 ones get remainders unless `use_kahan` is False.

    `moments` 8bit: of those that have blocks; the others' stay bf16.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        use_kahan: bool = True,
        moments: Literal["bf16", "8bit"] = "bf16",
    ) -> None:
        self.lr = lr
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._step = torch.zeros((), device=values[0].device)
        self._kept = [_Kept(value, use_kahan, codes.block_of(value) if moments == "8bit" else 0) for value in values]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], refused: Tensor, factor: Tensor | None = None) -> None:
        """One update; nothing is waited for."""
        self._step.add_(1 - refused)
        step = self._step.double()  # 1 - 0.999 would lose four digits in fp32
        beta1, beta2 = self._betas
        clip = torch.ones_like(step) if factor is None else factor.to(step)
        factors = torch.stack([self.lr / (1 - beta1**step), 1 / (1 - beta2**step), clip]).float()
        update = self._update_in_registers if by_triton(self._step) else self._update
        for kept, gradient in zip(self._kept, gradients, strict=True):
            if gradient.numel() > 0:
                update(kept, gradient.reshape(-1), factors, refused)

    def state(self) -> list[dict[str, Tensor]]:
        """`step` (one for all); `exp_avg` and `exp_avg_sq` bf16, or NAME_codes uint8 and NAME_scales fp32, one a block.

        `remainder` int16 where one is kept.
        """
        return [{"step": self._step, **kept.state()} for kept in self._kept]

    def _update(self, kept: _Kept, gradient: Tensor, factors: Tensor, refused: Tensor) -> None:
        (beta1, beta2), stays = self._betas, refused > 0
        for span in kept.spans():
            grown = gradient[span].float() * factors[2]
            mean = kept.exp_avg.read(span).lerp_(grown, 1 - beta1)
            square = (kept.exp_avg_sq.read(span) * beta2).addcmul_(grown, grown, value=1 - beta2)
            del grown
            update = (mean / (square * factors[1]).sqrt_().add_(self._eps)).mul_(factors[0])
            value = kept.read(span)
            kept.write(span, torch.where(stays, value, (value * (1 - self.lr * self._weight_decay)).sub_(update)))
            chance = _hash(mean, self._step)
            kept.exp_avg.write(span, mean, chance, stays)
            kept.exp_avg_sq.write(span, square, chance, stays)

    def _update_in_registers(self, kept: _Kept, gradient: Tensor, factors: Tensor, refused: Tensor) -> None:
        triton_update(
            kept.flat,
            None if kept.remainder is None else kept.remainder.view(-1),
            kept.exp_avg.held,
            kept.exp_avg_sq.held,
            gradient,
            factors,
            self._step,
            refused,
            decay=1 - self.lr * self._weight_decay,
            betas=self._betas,
            eps=self._eps,
        )


class _Kept:
    """A value and what is kept beside it. A `span` is a slice of its elements in their order."""

    def __init__(self, value: Tensor, use_kahan: bool, block: int) -> None:
        """`block`: elements that share a moment's scale, or 0."""
        self.flat = value.view(-1)
        keeps = use_kahan and value.dtype == torch.bfloat16
        self.remainder = torch.zeros_like(value, dtype=torch.int16) if keeps else None
        self.exp_avg, self.exp_avg_sq = (
            _Codes(value, block, first) if block else _Moment(value, first) for first in (True, False)
        )
        unit = max(block, 1)
        self._length = max(BUCKET // unit, 1) * unit

    def spans(self) -> Iterator[slice]:
        """All elements, as many at a time as are updated together: whole blocks."""
        for start in range(0, self.flat.numel(), self._length):
            yield slice(start, min(start + self._length, self.flat.numel()))

    def read(self, span: slice) -> Tensor:
        """The value as fp32, a copy: with what its remainder adds."""
        stored = self.flat[span]
        if self.remainder is None:
            return stored.to(torch.float32, copy=True)
        return (stored.view(torch.int16).int() << 16).add_(self.remainder.view(-1)[span]).view(torch.float32)

    def write(self, span: slice, value: Tensor) -> None:
        """fp32 into the value, rounded to nearest; what is left over into its remainder."""
        if self.remainder is None:
            self.flat[span] = value
            return
        bits = value.view(torch.int32)
        high = (bits + HALF // 2) >> 16
        self.remainder.view(-1)[span] = bits - (high << 16)
        self.flat[span] = high.to(torch.int16).view(torch.bfloat16)

    def state(self) -> dict[str, Tensor]:
        """Live tensors of the value's rows."""
        found = self.exp_avg.state("exp_avg") | self.exp_avg_sq.state("exp_avg_sq")
        return found if self.remainder is None else found | {"remainder": self.remainder}


class _Moment:
    """A moment in bf16, the `first` one (which may be negative) or the second."""

    def __init__(self, value: Tensor, first: bool) -> None:
        self._whole = torch.zeros_like(value, dtype=MOMENTS)
        self._shift = 0 if first else 16

    @property
    def held(self) -> tuple[Tensor, Tensor | None]:
        """Flat: what an element has, and what a block has."""
        return self._whole.view(-1), None

    def read(self, span: slice) -> Tensor:
        """fp32, a copy."""
        return self.held[0][span].to(torch.float32, copy=True)

    def write(self, span: slice, value: Tensor, chance: Tensor, stays: Tensor) -> None:
        """fp32, used up; each moment rounds by other bits of the `chance`. Nothing where it `stays` (0-dim)."""
        _round_(value, (chance >> self._shift) & (HALF - 1))
        part = self.held[0][span]
        part.copy_(torch.where(stays, part, value.to(part.dtype)))

    def state(self, name: str) -> dict[str, Tensor]:
        """Of the value's shape."""
        return {name: self._whole}


class _Codes:
    """The same in 8 bits."""

    def __init__(self, value: Tensor, block: int, first: bool) -> None:
        self._codes = torch.zeros_like(value, dtype=torch.uint8)
        self._scales = torch.zeros(value.shape[0], value.shape[1] // block, device=value.device)
        self._block, self._first = block, first
        self._shift = 0 if first else 32 - codes.CUT

    @property
    def held(self) -> tuple[Tensor, Tensor | None]:
        """Flat: what an element has, and what a block has."""
        return self._codes.view(-1), self._scales.view(-1)

    def read(self, span: slice) -> Tensor:
        """fp32, a copy."""
        return codes.decode(*self._parts(span), signed=self._first)

    def write(self, span: slice, value: Tensor, chance: Tensor, stays: Tensor) -> None:
        """As `_Moment.write`."""
        made = codes.encode(value, (chance >> self._shift) & (2**codes.CUT - 1), self._block, signed=self._first)
        for part, new in zip(self._parts(span), made, strict=True):
            part.copy_(torch.where(stays, part, new))

    def state(self, name: str) -> dict[str, Tensor]:
        """Of the value's rows."""
        return {f"{name}_codes": self._codes, f"{name}_scales": self._scales}

    def _parts(self, span: slice) -> tuple[Tensor, Tensor]:
        return self._codes.view(-1)[span], self._scales.view(-1)[span.start // self._block : span.stop // self._block]


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
