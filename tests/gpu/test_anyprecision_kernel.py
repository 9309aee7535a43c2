"""AnyPrecision AdamW's Triton kernel against its plain form: on a GPU, or by the interpreter (TRITON_INTERPRET=1).

Both round moments by a chance that is made of the first one's bits: the same one in the first update, when that is a
product of two numbers; later another one where an fp32 sum differs in its last place.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from packtrain.kernels import rows
from packtrain.optim import anyprecision, codes

RUNS = rows.HAS_TRITON and (rows.INTERPRETED or torch.cuda.is_available())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not RUNS, reason="needs Triton and a GPU, or its interpreter")]
SHAPES = ((1, 77), (30, 77), (5, 96), (9, 512), (1000,))
"""No tile divides the first three; the third and the fourth have blocks."""

LR = 1e-3
DTYPES = {32: torch.float32, 16: torch.bfloat16}
States = list[dict[str, Tensor]]


def updated(plain: bool, steps: int, weights: int, gradients: int, **settings: Any) -> tuple[list[Tensor], States]:
    """Values and states after so many updates; the fifth, of a NaN, is refused, and each second one clipped."""
    draws = torch.Generator(DEVICE).manual_seed(0)
    values = [torch.randn(shape, generator=draws, device=DEVICE).to(DTYPES[weights]) for shape in SHAPES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyprecision, "by_triton", lambda _: not plain)
        rule = anyprecision.AnyPrecisionAdamW(values, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, **settings)
        for step in range(steps):
            made = [torch.randn(shape, generator=draws, device=DEVICE) for shape in SHAPES]
            made[3] *= torch.logspace(-6, 0, 512, device=DEVICE)  # neighbours of all sizes
            if step == 4:
                made[0][0] = math.nan
            refused = torch.tensor(float(step == 4), device=DEVICE)
            factor = torch.tensor(0.5, device=DEVICE) if step % 2 else None
            rule.step([gradient.to(DTYPES[gradients]) for gradient in made], refused, factor)
    return values, rule.state()


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
@pytest.mark.parametrize(
    ("weights", "gradients", "use_kahan"), [(32, 32, True), (16, 32, True), (16, 16, True), (16, 16, False)]
)
def test_the_kernel_is_the_plain_form(weights: int, gradients: int, use_kahan: bool, moments: str) -> None:
    if rows.INTERPRETED and not use_kahan:
        pytest.skip("the interpreter truncates to bf16")
    settings = {"weights": weights, "gradients": gradients, "use_kahan": use_kahan, "moments": moments}
    last_place = 2.0**-7 if weights == 16 and not use_kahan else 2.0**-22
    # Of ten updates with codes: a block's scale that was rounded otherwise makes all of its moments others. A device
    # that multiplies and adds at once has other last bits, from which chance is made: a third of the codes are
    # neighbours after one update there.
    later = (10, 0.4, 0.5) if moments == "bf16" else (10, 0.0, 3.0)
    first = 0.99 if moments == "bf16" or rows.INTERPRETED else 0.5
    for steps, same, apart in ((1, first, 0.01), later):
        (values, states), (others, plain_states) = (updated(plain, steps, **settings) for plain in (False, True))
        for value, other, ours, theirs in zip(values, others, states, plain_states, strict=True):
            assert ours.keys() == theirs.keys()
            assert ours["step"] == theirs["step"] == steps - (steps > 4)
            torch.testing.assert_close(exact(value, ours), exact(other, theirs), rtol=last_place, atol=apart * LR)
            for name in ("exp_avg", "exp_avg_sq"):
                mine, plain = held(ours, name), held(theirs, name)
                assert (mine == plain).float().mean() >= same
                bound = 0.125 if steps == 1 else 0.5
                torch.testing.assert_close(mine, plain, rtol=bound, atol=bound * plain.abs().max().item() * (steps > 1))


def test_a_refused_update_changes_nothing() -> None:
    for moments in ("bf16", "8bit"):
        before, after = (updated(False, n, weights=16, gradients=16, moments=moments) for n in (4, 5))
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        for old, new in zip(before[1], after[1], strict=True):
            assert all(torch.equal(old[key], new[key]) for key in old)


def held(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment's values."""
    if name in state:
        return state[name].float()
    parts = state[f"{name}_codes"], state[f"{name}_scales"]
    return codes.decode(parts[0].flatten(), parts[1].flatten(), signed=name == "exp_avg").view_as(parts[0])


def exact(value: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The fp32 sum that value and remainder are."""
    if "remainder" not in state:
        return value.float()
    return (value.view(torch.int16).int() << 16).add(state["remainder"]).view(torch.float32)
