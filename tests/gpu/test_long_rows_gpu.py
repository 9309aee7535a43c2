"""Long rows on a CUDA device: offsets beyond 2^31, layers in pieces, inputs on the host, and that nothing waits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "model"))

from test_fast import adapters, batch, filled

from packtrain.batch import Batch
from packtrain.distributed.place import Place
from packtrain.kernels import adapter_gradients, attend, dropped, rows
from packtrain.kernels.attention import prepared
from packtrain.kernels.dropped import Drop
from packtrain.kernels.random import dropout
from packtrain.kernels.rows import Form, Raw, Rows
from packtrain.model import fast, long_rows, offload
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks
from packtrain.optim import Optimizer
from packtrain.peft import lora
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
BF16, FLOAT8 = Form(torch.bfloat16, float8=False), Form(torch.bfloat16, float8=True)
MANY, WIDTH, LAST = 360_000, 6144, 64
"""2.2e9 elements; what their last rows become is compared with the same rows alone."""

LAYERS = 8
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "initializer_range": 0.05,
}
TOKENS = 70_005
"""With the padding of `batch`."""


@pytest.fixture(scope="module")
def long() -> Iterator[Batch]:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    yield batch((TOKENS - 5,)).to(CUDA)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def wide() -> Iterator[Tensor]:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    made = torch.empty(MANY, WIDTH, dtype=torch.bfloat16, device=CUDA)
    for part in made.split(2**16):
        part.normal_(generator=torch.Generator(CUDA).manual_seed(len(part)))
    assert made.numel() > 2**31
    yield made
    del made
    torch.cuda.empty_cache()


def tail(x: Tensor | None) -> Tensor:
    assert x is not None
    return x[-LAST:].view(torch.uint8) if x.element_size() == 1 else x[-LAST:]


@pytest.mark.parametrize("form", [BF16, FLOAT8], ids=["bf16", "float8"])
def test_row_kernels_reach_beyond_2_31(form: Form, wide: Tensor) -> None:
    """Each gives the last rows what it gives them alone, to the bit."""
    end, half = wide[-LAST:].clone(), 64
    weight = torch.rand(WIDTH, dtype=torch.bfloat16, device=CUDA)
    cos, sin = (torch.rand(MANY, half, device=CUDA).to(torch.bfloat16) for _ in range(2))
    last = cos[-LAST:].contiguous(), sin[-LAST:].contiguous()

    def same(name: str, *pairs: tuple[Tensor | None, Tensor | None]) -> None:
        for many, few in pairs:
            assert torch.equal(tail(many), tail(few)), name

    many, few = rows.copy(wide, form, 48), rows.copy(end, form, 48)
    same("copy", (many.values, few.values), *([(many.scale, few.scale)] if form.float8 else []))
    del many
    many, few = (rows.rope_backward(x, c, s, 40, form, 48) for x, c, s in ((wide, cos, sin), (end, *last)))
    same("rope_backward", (many.values, few.values))
    del many
    found, expected = (rows.add_norm(x, Raw(x), weight, 1e-5, form, 48) for x in (wide, end))
    same("add_norm", (found[0], expected[0]), (found[1], expected[1]), (found[2].values, expected[2].values))
    del found
    rstd = torch.rand(MANY, device=CUDA)
    found, expected = (
        rows.norm_backward(Raw(x), x, weight, r, x, form, 48)
        for x, r in ((wide, rstd), (end, rstd[-LAST:].contiguous()))
    )
    same("norm_backward", (found[0], expected[0]), (found[1].values, expected[1].values))
    del found
    gated, alone = rows.silu_mul(Raw(wide), form, 48), rows.silu_mul(Raw(end), form, 48)
    same("silu_mul", (gated.values, alone.values))
    found, expected = (
        rows.silu_mul_backward(Raw(x), Raw(x[:, : WIDTH // 2].contiguous()), form, 48) for x in (wide, end)
    )
    same("silu_mul_backward", (found.values, expected.values))


def test_rope_in_place_beyond_2_31(wide: Tensor) -> None:
    end = wide[-LAST:].clone()
    cos, sin = (torch.rand(MANY, 64, device=CUDA).to(torch.bfloat16) for _ in range(2))
    rows.rope_(wide, cos, sin, 40)
    rows.rope_(end, cos[-LAST:].contiguous(), sin[-LAST:].contiguous(), 40)
    assert torch.equal(wide[-LAST:], end)


def test_small_products_beyond_2_31(wide: Tensor) -> None:
    """Of a tall matrix: where only the last rows count, the sum is theirs."""
    h = torch.zeros(MANY, 16, dtype=torch.bfloat16, device=CUDA)
    h[-LAST:].normal_()
    out = torch.empty(8, 16 * WIDTH, device=CUDA)
    exact = h[-LAST:].float().t() @ wide[-LAST:].float()
    adapter_gradients._gradient(wide, None, h, 16, out, (WIDTH, 1), 1.0)
    torch.testing.assert_close(out.sum(0).view(16, WIDTH), exact, rtol=1e-2, atol=1e-2)
    keys = torch.arange(MANY, device=CUDA)
    a = torch.randn(16, WIDTH, device=CUDA) / 64
    many, few = (torch.empty(n, 16, dtype=torch.bfloat16, device=CUDA) for n in (MANY, LAST))
    for x, tokens, to in ((wide, keys, many), (wide[-LAST:].clone(), keys[-LAST:].clone(), few)):
        dropped.down(Rows(x, None, WIDTH), [a], Drop(tokens, ("q",), 0.1), to)
    assert torch.equal(many[-LAST:], few)
    sums = torch.empty(8, 16 * WIDTH, device=CUDA)
    dropped.gradient(Rows(wide, None, WIDTH), h, 16, Drop(keys, ("q",), 0.1), sums)
    kept = dropout(wide[-LAST:].float(), keys[-LAST:], "q", 0.1)
    torch.testing.assert_close(sums.sum(0).view(16, WIDTH), h[-LAST:].float().t() @ kept, rtol=1e-2, atol=1e-2)


def made(form: Form, recompute: fast.Recompute) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=form.dtype, device=torch.device("meta"))
    lora.install(model, adapters(r=16))
    fast.install(model, form, recompute)
    fast.allocate(model, CUDA)
    filled(model, CUDA)
    if recompute == "offload":
        offload.install(blocks(model), CUDA)
    return model


def run(model: LlamaForCausalLM, data: Batch) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and the most bytes that the step took beside the model."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(data) / data.count
    loss.backward()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, taken


def cosines(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {
        name: torch.cosine_similarity(ours[name].double().flatten(), gradient.double().flatten(), 0).item()
        for name, gradient in theirs.items()
    }


def near(ours: dict[str, Tensor], theirs: dict[str, Tensor], least: float) -> None:
    assert all(cosine >= least for cosine in cosines(ours, theirs).values()), cosines(ours, theirs)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("form", [BF16, FLOAT8], ids=["bf16", "float8"])
def test_pieces_equal_the_whole(
    form: Form, recompute: fast.Recompute, long: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of other heights and attention's backward add up in another order: the same bits are not to be had."""
    ours = run(made(form, recompute), long)
    monkeypatch.setattr(long_rows, "LONG", TOKENS + 1)
    exact = run(made(form, recompute), long)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-4)
    near(ours[1], exact[1], 0.99)
    assert ours[2] < exact[2]


def test_what_offload_saves(long: Batch) -> None:
    """All inputs but three; the loss is the same to the bit, and gradients as near as two runs of the same.

    Attention's backward adds up in any order, and its roundings grow through eight layers in float8.
    """
    kept, once_more = run(made(FLOAT8, "full"), long), run(made(FLOAT8, "full"), long)
    away = run(made(FLOAT8, "offload"), long)
    assert torch.equal(kept[0], away[0])
    near(away[1], kept[1], 1 - 3 * (1 - min(cosines(once_more[1], kept[1]).values())))
    one = TOKENS * SHAPE["hidden_size"] * 2
    assert kept[2] - away[2] > (LAYERS - 4) * one


@pytest.mark.parametrize("tokens", [TOKENS - 5, 3000])
def test_a_step_with_offload_does_not_wait(tokens: int) -> None:
    """Once it has its host memory."""
    model, data = made(FLOAT8, "offload"), batch((tokens,))
    place = cast(Place, SimpleNamespace(world_size=1, rank=0, device=CUDA))
    optimizer = Optimizer(trainable(model), lr=1e-3)

    def step() -> None:
        batches = [data.to(CUDA)]
        train_step(model, batches, step_vector(batches, False, CUDA), optimizer, place, clip=1.0, memory=lambda: 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("parts", [1, 2])
def test_groups_of_heads_attend_as_all_do(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 4096
    data = prepared(batch((tokens - 100, 95)).to(CUDA), "auto", 0, torch.bfloat16, 64)
    q, k, v, gradient = (torch.randn(tokens, heads, 64, device=CUDA).bfloat16() for heads in (8, 2, 2, 8))
    exact = attend.attend(q, k, v, data)
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    attend.attend_backward(gradient, q, k, v, exact, data, into)
    monkeypatch.setattr(attend, "SUMS", 4 * 64 * tokens * 8 // parts)
    ours = q.clone(), k.clone(), v.clone()
    left = attend.attend_long(*ours, data)
    torch.testing.assert_close(left.out, exact.out, rtol=1e-2, atol=1e-3)
    attend.attend_long_backward(gradient, *ours, left, data)
    for found, expected in zip(ours, into, strict=True):
        assert torch.cosine_similarity(found.float().flatten(), expected.float().flatten(), 0) > 0.9999
