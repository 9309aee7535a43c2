"""AdamW without fp32 states: what it learns beside fp32 masters, its moments in 16 and in 8 bits beside float64, its
remainders to the last bit, and gradients that are read as they came.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import tiny
from packtrain.batch import Batch
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw
from packtrain.optim import Optimizer, anyprecision, codes
from packtrain.optim.codes import encode

FINE, REFUSED = torch.tensor(0.0), torch.tensor(1.0)
CONFIG = LlamaConfig.from_dict(
    tiny.SIZES | {"vocab_size": 128, "initializer_range": 0.02, "architectures": ["LlamaForCausalLM"]}
)


def batch(rows: int = 2, length: int = 16) -> Batch:
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(0))
    index = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    return Batch(
        ids=ids,
        positions=torch.arange(length).repeat(rows, 1),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        lengths=(length,) * rows,
        max_seqlen=length,
        whole_rows=True,
        index=index,
        targets=ids.view(-1)[index + 1],
        keys=torch.zeros_like(ids),
        tokens=rows * length,
        rows=tuple(range(rows)),
    )


def learned(rule: str, steps: int = 20, **settings: Any) -> float:
    """How far the loss of a bf16 Llama falls at lr 2e-5, computed in fp32 from the weights that it has."""
    model = LlamaForCausalLM(CONFIG, dtype=torch.bfloat16, device=torch.device("cpu"))
    draw(model, 0)
    exact, rows = LlamaForCausalLM(CONFIG, dtype=torch.float32, device=torch.device("cpu")), batch()

    def loss() -> float:
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            return float(exact(rows)) / rows.count

    optimizer = Optimizer(dict(model.named_parameters()), lr=2e-5, rule=rule, **settings)
    before = loss()
    for _ in range(steps):
        (model(rows) / rows.count).backward()
        optimizer.step(FINE)
        optimizer.zero_grad()
    return before - loss()


def test_it_learns_what_fp32_masters_learn_and_without_remainders_it_does_not() -> None:
    masters = learned("AdamW")
    assert masters > 0.05
    assert learned("anyprecision") == pytest.approx(masters, rel=0.01)
    assert learned("anyprecision", moments="8bit") == pytest.approx(masters, rel=0.01)
    assert learned("anyprecision", use_kahan=False) < 0.5 * masters


def moments(gradients: list[Tensor], kept: Literal["bf16", "8bit"] = "bf16") -> tuple[Tensor, Tensor]:
    """(exp_avg, exp_avg_sq) after these gradients, over the same in float64, each the mean over elements."""
    weight = nn.Parameter(torch.zeros_like(gradients[0], dtype=torch.bfloat16))
    optimizer = Optimizer({"w": weight}, lr=0.0, rule="anyprecision", moments=kept)
    mean, square = torch.zeros_like(gradients[0]).double(), torch.zeros_like(gradients[0]).double()
    for gradient in gradients:
        weight.backward(gradient.bfloat16())
        optimizer.step(FINE)
        optimizer.zero_grad()
        exact = gradient.bfloat16().double()
        mean, square = 0.9 * mean + 0.1 * exact, 0.999 * square + 0.001 * exact**2
    found = [held(optimizer.state()["w"], name).double() for name in ("exp_avg", "exp_avg_sq")]
    return (found[0] / mean).mean(), (found[1] / square).mean()


def held(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment's values."""
    if name in state:
        assert state[name].dtype == torch.bfloat16
        return state[name]
    parts = state[f"{name}_codes"], state[f"{name}_scales"]
    assert [part.dtype for part in parts] == [torch.uint8, torch.float32]
    return codes.decode(parts[0].flatten(), parts[1].flatten(), signed=name == "exp_avg").view_as(parts[0])


@pytest.mark.parametrize("kept", ["bf16", "8bit"])
def test_moments_follow_the_gradient_where_rounding_to_nearest_would_stop(
    kept: Literal["bf16", "8bit"], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = torch.Generator().manual_seed(0)
    large = torch.ones(8, 256)
    large[:, 1:] = 10.0 ** -(4 * torch.rand(8, 255, generator=draws))  # neighbours of all sizes, as columns have them
    constant = [(torch.rand(8, 256, generator=draws) + 0.5) * large] * 200
    # The first column stays as it is, and with it the blocks' scales; the others' gradients become smaller.
    falls = torch.ones(8, 256).index_fill_(1, torch.arange(1, 256), 0.1)
    falling = [
        (torch.rand(8, 256, generator=draws) + 0.5) * large * (1 if step < 100 else falls) for step in range(600)
    ]
    assert moments(constant, kept)[0] == pytest.approx(1, abs=5e-3)
    assert moments(falling, kept)[1] == pytest.approx(1, abs=3e-2)
    monkeypatch.setattr(anyprecision, "_round_", lambda value, chance: None)
    monkeypatch.setattr(codes, "encode", lambda value, chance, *a, **k: encode(value, chance * 0 + 2**19, *a, **k))
    assert kept == "8bit" or moments(constant, kept)[0] < 0.98  # in 8 bits what is lost here is gained there
    assert moments(falling, kept)[1] > 1.2


def test_the_hash_makes_every_bit_a_fair_coin_whatever_the_values() -> None:
    values = torch.linspace(1, 1.1, 13).bfloat16().float()  # neighbours, low bits all zero
    hashed = torch.stack([anyprecision._hash(values, torch.tensor(float(step))) for step in range(4000)])
    bits = torch.stack([(hashed >> bit) & 1 for bit in range(32)]).double()
    assert (bits.mean((1, 2)) - 0.5).abs().max() < 0.01
    assert (anyprecision._hash(torch.zeros(1), torch.tensor(1.0)) != 0).all()


def net(dtype: torch.dtype, width: int = 7) -> nn.Sequential:
    """The second matrix has blocks if `width` is a multiple of 32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()


def train(model: nn.Module, steps: range, **settings: Any) -> Optimizer:
    optimizer = Optimizer(dict(model.named_parameters()), rule="anyprecision", **({"lr": 1e-3} | settings))
    run(model, optimizer, steps)
    return optimizer


def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step(FINE)
        optimizer.zero_grad()


def test_weight_and_remainder_hold_every_fp32_value() -> None:
    weight = torch.zeros(100_000, dtype=torch.bfloat16)
    kept = anyprecision._Kept(weight, use_kahan=True, block=0)
    exact = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 100_000)
    exact[:4] = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8])  # the last two half way between bf16 numbers
    (span,) = kept.spans()
    kept.write(span, exact)
    assert torch.equal(kept.read(span), exact)
    assert ((weight.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_exact_moments_it_is_adamw(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's, decay and bias correction too: over fp32 weights, and over bf16 ones beside fp32 masters."""
    monkeypatch.setattr(anyprecision, "MOMENTS", torch.float32)
    monkeypatch.setattr(anyprecision, "_round_", lambda value, chance: None)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = net(dtype), net(dtype)
    train(ours, range(10), **settings)
    run(theirs, Optimizer(dict(theirs.named_parameters()), **settings), range(10))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("kept", ["bf16", "8bit"])
def test_a_refused_step_changes_nothing(kept: str) -> None:
    model = net(torch.bfloat16, 32)
    optimizer = train(model, range(3), moments=kept)
    weights = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in state.items()} for state in optimizer.state().values()]
    backward(model, 3)
    optimizer.gradients()[1][0] = math.nan
    optimizer.step(REFUSED)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    for before, after in zip(states, optimizer.state().values(), strict=True):
        assert before.keys() == after.keys() >= {"step", "remainder"}
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kept", ["bf16", "8bit"])
def test_buckets_and_ranks_change_no_bit(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are cut wherever a bucket is full, and a shard holds some of the rows, or none."""
    whole = net(torch.bfloat16, 96)
    train(whole, range(5), moments=kept)
    monkeypatch.setattr(anyprecision, "BUCKET", 40)
    cut = net(torch.bfloat16, 96)
    train(cut, range(5), moments=kept)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))

    gradient = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = {"whole": slice(0, 6), "top": slice(0, 1), "bottom": slice(1, 6), "nothing": slice(0, 0)}
    shards = {name: nn.Parameter(torch.ones_like(gradient[part])) for name, part in rows.items()}
    optimizer = Optimizer(shards, lr=1e-3, rule="anyprecision", moments=kept)  # type: ignore[arg-type]
    for _ in range(3):
        for name, part in rows.items():
            shards[name].backward(gradient[part])
        optimizer.step(FINE)
        optimizer.zero_grad()
    states = optimizer.state()
    for key in states["whole"].keys() - {"step"}:
        assert torch.equal(states["whole"][key], torch.cat([states["top"][key], states["bottom"][key]])), key
    assert torch.equal(shards["whole"], torch.cat([shards["top"], shards["bottom"]]))


@pytest.mark.parametrize("kept", ["bf16", "8bit"])
def test_state_can_be_restored(kept: str) -> None:
    models = net(torch.bfloat16, 32), net(torch.bfloat16, 32)
    first, second = (train(model, range(n), moments=kept) for model, n in zip(models, (4, 0), strict=True))
    models[1].load_state_dict(models[0].state_dict())
    for name, state in first.state().items():
        for key, value in state.items():
            second.state()[name][key].copy_(value)
    for model, optimizer in zip(models, (first, second), strict=True):
        run(model, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_adapters_in_fp32_beside_a_bf16_base_have_no_remainder() -> None:
    model = nn.ModuleDict({"base": nn.Linear(3, 2).bfloat16(), "adapter": nn.Linear(3, 2)})
    optimizer = Optimizer(dict(model.named_parameters()), lr=0.1, rule="anyprecision")
    kept = {name: set(state) for name, state in optimizer.state().items()}
    assert kept["base.weight"] == {"step", "exp_avg", "exp_avg_sq", "remainder"}
    assert kept["adapter.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    model["adapter"](torch.ones(1, 3)).sum().backward()
    before = model["adapter"].weight.detach().clone()
    optimizer.step(FINE)
    torch.testing.assert_close(model["adapter"].weight, before - 0.1)


def test_moments_of_8_bits_are_those_of_matrices_with_blocks() -> None:
    shapes = {"rows of 512": (3, 512), "rows of 96": (3, 96), "rows of 48": (3, 48), "vector": (512,)}
    weights = {name: nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()}
    states = Optimizer(weights, lr=1e-3, rule="anyprecision", moments="8bit").state()
    assert states["rows of 512"]["exp_avg_sq_scales"].shape == (3, 2)
    assert states["rows of 96"]["exp_avg_scales"].shape == (3, 3)
    assert states["rows of 96"]["exp_avg_codes"].shape == (3, 96)
    for name in ("rows of 48", "vector"):
        assert states[name]["exp_avg"].dtype == states[name]["exp_avg_sq"].dtype == torch.bfloat16
        assert states[name].keys() == {"step", "exp_avg", "exp_avg_sq", "remainder"}


def test_codes_are_within_an_eighth_of_what_they_stand_for_and_right_in_the_mean() -> None:
    sizes = torch.logspace(-4.5, 0, 2048).view(8, 256)
    value = (sizes * torch.where(torch.arange(256) % 2 == 0, 1, -1) / sizes[:, -1:].clone()).flatten()
    draws = torch.Generator().manual_seed(0)
    for signed, exact in ((True, value), (False, value.square())):
        total = torch.zeros_like(exact)
        for _ in range(1000):
            chance = torch.randint(0, 2**codes.CUT, exact.shape, generator=draws, dtype=torch.int32)
            found = codes.decode(*encode(exact, chance, 256, signed=signed), signed=signed)
            assert ((found / exact - 1).abs() <= 0.125).all()
            total += found
        assert (total / 1000 / exact - 1).abs().max() < 0.01
        again = codes.decode(*encode(found, chance, 256, signed=signed), signed=signed)
        assert torch.equal(again, found)


def test_what_a_code_cannot_hold_is_rounded_to_nothing_only_where_nobody_divides_by_it() -> None:
    value = torch.full((256,), 1e-6)
    value[0], value[1] = 1.0, 0.0
    draws = torch.Generator().manual_seed(0)
    chances = [torch.randint(0, 2**codes.CUT, (256,), generator=draws, dtype=torch.int32) for _ in range(300)]
    first = torch.stack([codes.decode(*encode(value, chance, 256, signed=True), signed=True) for chance in chances])
    assert first[:, 1].eq(0).all()
    assert first[:, 2:].mean() == pytest.approx(1e-6, rel=0.05)
    second = codes.decode(*encode(value.square() * 1e-12, chances[0], 256, signed=False), signed=False)
    assert (second > 0).all()
    nothing = encode(torch.zeros(256), chances[0], 256, signed=False)
    assert not codes.decode(*nothing, signed=False).any()


def test_one_gradient_is_read_as_it_came_and_more_are_summed_in_fp32() -> None:
    weights = {name: nn.Parameter(torch.ones(3, 32, dtype=dtype)) for name, dtype in DTYPES.items()}
    optimizer = Optimizer(weights, lr=1e-3, rule="anyprecision")
    gradients = {name: torch.randn(2, 3, 32).to(weight.dtype) for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.backward(gradients[name][0])
    alone = optimizer.gradients()
    assert [gradient.dtype for gradient in alone] == [torch.float32, torch.bfloat16, torch.float32]  # fp16 has masters
    assert all(torch.equal(a, g[0].to(a.dtype)) for a, g in zip(alone, gradients.values(), strict=True))
    for name, weight in weights.items():
        weight.backward(gradients[name][1])
    summed = optimizer.gradients()
    assert all(gradient.dtype == torch.float32 for gradient in summed)
    assert all(torch.equal(s, g.float().sum(0)) for s, g in zip(summed, gradients.values(), strict=True))
    optimizer.zero_grad()
    weights["bf16"].backward(gradients["bf16"][0])
    wide = optimizer.gradients(fp32=True)[1]
    wide += 2**-20
    assert torch.equal(optimizer.gradients()[1], gradients["bf16"][0].float() + 2**-20)
    optimizer.zero_grad()
    assert optimizer.gradients()[1].dtype == torch.bfloat16  # none came: zeros


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("kept", ["bf16", "8bit"])
def test_a_bf16_gradient_and_its_clipping_give_the_bits_that_fp32_gives(kept: Literal["bf16", "8bit"]) -> None:
    found = []
    for fp32 in (True, False):
        model = net(torch.bfloat16, 64)
        optimizer = Optimizer(dict(model.named_parameters()), lr=1e-3, rule="anyprecision", moments=kept)
        for step in range(4):
            backward(model, step)
            assert {g.dtype for g in optimizer.gradients(fp32=fp32)} == {torch.float32 if fp32 else torch.bfloat16}
            optimizer.step(FINE, factor=torch.tensor(0.3))
            optimizer.zero_grad()
        found.append([*model.parameters(), *(t for state in optimizer.state().values() for t in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
