"""Every strategy on 2 and 4 gloo ranks against one process: each parameter's gradient, the norm, the new weights.

The small Llama has what makes sharding hard: tied weights, rows that do not divide by the ranks, adapters of another
dtype than the frozen base beside them, and micro-batches without a row on some ranks.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from packtrain.batch import Batch
from packtrain.distributed.parallelize import (
    copies,
    gather,
    group_sizes,
    local_rows,
    materialise,
    parallelize,
    problems,
    reduce_gradients,
    reshard,
    set_gradient_sync,
    sums_after,
)
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks
from packtrain.optim import Optimizer, clip_factor, grad_norm, not_finite
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings
from packtrain.peft.trainable import trainable

CONFIG = LlamaConfig(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=21,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    tie_word_embeddings=True,
    attention_bias=True,
    mlp_bias=True,
)
LORA = LoraSettings(r=3, lora_alpha=6, target_modules=("q_proj", "v_proj", "down_proj"))
ADAMW: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "eps": 0.01}
"""eps is large so that an update is a smooth function of the gradient, and not nearly its sign."""
MICRO_BATCHES, ROWS, LENGTH = 3, 22, 6
Rows = tuple[int, Tensor]
"""(the first one's place in the whole, a rank's rows)."""

Layout = tuple[str, int, int]
"""Strategy, sharding_group_size, replica_group_size."""

FULL, HYBRID, NONE = ("FULL_SHARD", 0, 0), ("HYBRID_SHARD", 2, 2), ("NO_SHARD", 0, 0)
LAYOUTS: dict[int, list[Layout]] = {
    2: [FULL, ("SHARD_GRAD_OP", 0, 0), ("HYBRID_SHARD", 1, 0), NONE],
    4: [FULL, HYBRID, NONE],
}
"""By number of ranks."""


def built_on(device: str, adapters: bool, dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM(CONFIG, dtype=dtype, device=torch.device(device))
    if adapters:
        lora.install(model, LORA)
    return model


def rows() -> tuple[Tensor, Tensor]:
    """ids [ROWS, LENGTH] and which of their next tokens are trained, bool; the later rows have fewer of them."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
    trained = torch.rand(ROWS, LENGTH, generator=generator) > torch.linspace(0, 0.9, ROWS)[:, None]
    trained[:, -1] = False
    return ids, trained


def batch_of(ids: Tensor, trained: Tensor) -> Batch:
    """Rows without padding, a document each."""
    count, length = ids.shape
    index = trained.flatten().nonzero().flatten()
    return Batch(
        ids=ids,
        positions=torch.arange(length).expand(count, length).contiguous(),
        cu_seqlens=torch.arange(0, ids.numel() + 1, length, dtype=torch.int32),
        lengths=(length,) * count,
        max_seqlen=length,
        whole_rows=True,
        index=index,
        targets=ids.flatten()[index + 1],
        keys=torch.zeros_like(ids),
        tokens=ids.numel(),
        rows=tuple(range(count)),
    )


def micro_batches(rank: int, world: int) -> list[Batch]:
    """As many on each rank; where rows run out, one row without a label."""
    ids, trained = rows()
    size = -(-ROWS // (world * (MICRO_BATCHES - 1)))  # so the last ones are empty, on the last rank two of them
    out = []
    for i in range(MICRO_BATCHES):
        start = (i * world + rank) * size
        if start >= ROWS:
            out.append(batch_of(ids[:1], torch.zeros_like(trained[:1])))
        else:
            out.append(batch_of(ids[start : start + size], trained[start : start + size]))
    return out


def values(adapters: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same weights for every rank and for the reference."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(p.shape, generator=generator) * 0.3).to(p.dtype)
        for name, p in built_on("meta", adapters, dtype).named_parameters()
    }


def built(
    place: Place, layout: Layout, adapters: bool, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> LlamaForCausalLM:
    """On meta, sharded, given memory, then each rank's rows written: as a run does it."""
    model = built_on("meta", adapters, dtype)
    strategy, shard_group, replica_group = layout
    parallelize(
        model,
        blocks(model),
        place,
        strategy,
        shard_group=shard_group,
        replica_group=replica_group,
        recompute=recompute,
    )
    materialise(model, place.device)
    for name, value in values(adapters, dtype).items():
        local, first = local_rows(model.get_parameter(name))
        local.copy_(value[first : first + local.shape[0]])
    return model


def optimizer_of(model: nn.Module) -> Optimizer:
    return Optimizer(trainable(model), **ADAMW)


def step(
    model: nn.Module, optimizer: Optimizer, place: Place, every: bool | None = None
) -> tuple[float, dict[str, Rows]]:
    """One optimizer step over the rank's micro-batches: (gradient norm, the rank's rows of each gradient by name)."""
    labels = rows()[1].sum()
    batches = micro_batches(place.rank, place.world_size)
    for i, batch in enumerate(batches):
        set_gradient_sync(model, last=i == len(batches) - 1, every=every)
        (model(batch) / labels).backward()
    gradients = optimizer.gradients()
    reduce_gradients(model, gradients, place)
    norm = grad_norm(gradients, model, place)
    rows_of = {name: local_rows(p)[1] for name, p in trainable(model).items()}
    ours = {name: (first, gradient.clone()) for (name, first), gradient in zip(rows_of.items(), gradients, strict=True)}
    optimizer.step(found_inf=not_finite(norm), factor=clip_factor(norm, 0.5))
    optimizer.zero_grad()
    return float(norm), ours


def reference(
    adapters: bool, dtype: torch.dtype, steps: int
) -> list[tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """One process, all rows at once, fp32, torch's own AdamW and clipping: norm, gradients and weights of each step."""
    model = built_on("cpu", adapters, torch.float32)
    model.load_state_dict({name: value.float() for name, value in values(adapters, dtype).items()})
    learning = trainable(model)
    adamw = torch.optim.AdamW(learning.values(), **ADAMW)
    batch = batch_of(*rows())
    out = []
    for _ in range(steps):
        adamw.zero_grad()
        (model(batch) / batch.count).backward()
        gradients = {name: p.grad.clone() for name, p in learning.items() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(learning.values(), 0.5)
        adamw.step()
        out.append((float(norm), gradients, {name: p.detach().clone() for name, p in learning.items()}))
    return out


def two_steps(place: Place, layout: Layout, adapters: bool, recompute: bool, every: bool | None) -> Any:
    """On a rank: after each step its norm, its rows of gradients and weights; and how the model was wrapped."""
    model = built(place, layout, adapters, recompute=recompute)
    optimizer = optimizer_of(model)
    out = []
    for _ in range(2):
        norm, gradients = step(model, optimizer, place, every)
        weights = {name: local_rows(p) for name, p in trainable(model).items()}
        out.append((norm, gradients, {name: (first, rows.clone()) for name, (rows, first) in weights.items()}))
    return out, isinstance(model, FSDPModule), copies(model, place)


def all_layouts(place: Place) -> Any:
    """Everything in one group of processes: starting groups would take longer than the work."""
    return {
        (layout, adapters, recompute, every): two_steps(place, layout, adapters, recompute, every)
        for layout in LAYOUTS[place.world_size]
        for adapters in (False, True)
        for recompute, every in ((False, None), (True, adapters))
    }


def wrong(ours: dict[str, Rows], whole: dict[str, Tensor], bound: float = 1e-5) -> list[str]:
    """Names whose rows differ from those of the whole by more than `bound` of its largest entry."""
    assert ours.keys() == whole.keys()
    return [
        name
        for name, (first, rows) in ours.items()
        if rows.numel()
        and (rows - whole[name][first : first + len(rows)]).abs().max() > bound * whole[name].abs().max()
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_each_gradient_and_weight_equals_one_process(world: int) -> None:
    expected = {adapters: reference(adapters, torch.float32, 2) for adapters in (False, True)}
    ranks = run_ranks(all_layouts, world)
    for key in ranks[0]:
        layout, adapters = key[0], key[1]
        bits: dict[Any, Tensor] = {}
        for steps, wrapped, same in (rank[key] for rank in ranks):
            assert wrapped == (layout[0] != "NO_SHARD" and layout[1] != 1)
            assert same == {"NO_SHARD": world, "HYBRID_SHARD": world // layout[1] if layout[1] else 1}.get(layout[0], 1)
            for i, (norm, gradients, weights) in enumerate(steps):
                norm0, gradients0, weights0 = expected[adapters][i]
                assert norm == pytest.approx(norm0, rel=1e-5)
                assert norm == ranks[0][key][0][i][0]
                assert not wrong(gradients, gradients0), key
                assert not wrong(weights, weights0), key
                for name, (first, rows) in weights.items():  # ranks with the same rows have the same bits
                    assert torch.equal(bits.setdefault((i, name, first, len(rows)), rows), rows)


def half_the_gradient(place: Place) -> Any:
    """What rule 3 warns of: sums asked for on the root alone."""
    model = built(place, FULL, True)
    for block in blocks(model):
        cast(FSDPModule, block).set_gradient_divide_factor(float(place.world_size))
    return step(model, optimizer_of(model), place)[1]


def test_a_block_that_averages_is_noticed() -> None:
    expected = reference(True, torch.float32, 1)[0][1]
    gradients = run_ranks(half_the_gradient, 2)[0]
    assert wrong(gradients, expected) == list(expected)


def mixed(place: Place, layout: Layout) -> Any:
    model = built(place, layout, True, torch.bfloat16)
    norm, gradients = step(model, optimizer_of(model), place)
    dtypes = {name: gather(p).dtype for name, p in model.named_parameters()}
    frozen = all(
        torch.equal(gather(p), values(True, torch.bfloat16)[name])
        for name, p in model.named_parameters()
        if not p.requires_grad
    )
    return norm, gradients, dtypes, frozen


@pytest.mark.parametrize("layout", [FULL, NONE])
def test_bf16_base_beside_fp32_adapters(layout: Layout) -> None:
    norm0, gradients0, _, _ = run_ranks(mixed, 1, NONE)[0]  # bf16 rounds alike there
    for norm, gradients, dtypes, frozen in run_ranks(mixed, 2, layout):
        assert norm == pytest.approx(norm0, rel=1e-2)
        assert frozen
        assert all(rows.dtype == torch.float32 for _, rows in gradients.values())
        assert {str(d) for n, d in dtypes.items() if "lora" in n} == {"torch.float32"}
        assert {str(d) for n, d in dtypes.items() if "lora" not in n} == {"torch.bfloat16"}
        assert not wrong(gradients, {name: rows for name, (_, rows) in gradients0.items()}, bound=2e-2)


def bf16_weights(place: Place, layout: Layout) -> Any:
    model = built(place, layout, False, torch.bfloat16)
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer, place)
    state = optimizer.state()
    rounded = [torch.equal(local_rows(p)[0], state[name]["master"].bfloat16()) for name, p in trainable(model).items()]
    return all(rounded), {name: (local_rows(p)[1], state[name]["master"]) for name, p in trainable(model).items()}


@pytest.mark.parametrize("layout", [FULL, NONE])
def test_bf16_weights_follow_their_masters(layout: Layout) -> None:
    start = {name: value.float() for name, value in values(False, torch.bfloat16).items()}
    _, _, weights0 = reference(False, torch.bfloat16, 2)[1]
    for rounded, masters in run_ranks(bf16_weights, 2, layout):
        assert rounded
        moved0 = {name: weights0[name] - start[name] for name in start}
        moved = {name: (a, rows - start[name][a : a + len(rows)]) for name, (a, rows) in masters.items()}
        assert not wrong(moved, moved0, bound=0.2)
        assert all(rows.dtype == torch.float32 for _, rows in masters.values())


def many_small_gradients(place: Place, layout: Layout, in_fp32: bool) -> Rows:
    """A gradient after 64 micro-batches of a bf16 weight; without our sums, as torch would leave it."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False, dtype=torch.bfloat16))
    parallelize(model, [], place, layout[0], shard_group=layout[1], replica_group=layout[2], recompute=False)
    optimizer = Optimizer(dict(model.named_parameters()), lr=0.1) if in_fp32 else None
    for i in range(64):
        set_gradient_sync(model, last=i == 63)
        model(inputs(place.rank, i)).sum().backward()
    weight = cast(Tensor, model[0].weight)
    first = local_rows(weight)[1]
    if optimizer is None:
        assert weight.grad is not None
        return first, local_rows(weight.grad)[0]
    gradients = optimizer.gradients()
    reduce_gradients(model, gradients, place)
    assert weight.grad is None
    return first, gradients[0]


def one_bf16_gradient(place: Place, layout: Layout) -> Rows:
    """As a step reads it for a rule that takes bf16 gradients; the first rank's micro-batch came in two pieces."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False, dtype=torch.bfloat16))
    parallelize(model, [], place, layout[0], shard_group=layout[1], replica_group=layout[2], recompute=False)
    optimizer = Optimizer(dict(model.named_parameters()), lr=0.1, rule="anyprecision")
    pieces = torch.split(inputs(place.rank, 0), 2 if place.rank == 0 and layout == NONE else 4)
    for piece in pieces:
        model(piece).sum().backward()
    gradients = optimizer.gradients(fp32=sums_after(model, place))
    reduce_gradients(model, gradients, place)
    assert torch.equal(optimizer.gradients()[0], gradients[0])
    return local_rows(cast(Tensor, model[0].weight))[1], gradients[0]


@pytest.mark.parametrize("layout", [FULL, NONE])
def test_copies_of_the_model_have_the_same_bits_whatever_their_gradients_were(layout: Layout) -> None:
    exact = sum(inputs(rank, 0).sum(0, dtype=torch.float32) for rank in range(4)).expand(8, 16)
    found = run_ranks(one_bf16_gradient, 4, layout)
    for first, rows in found:
        assert rows.dtype == (torch.float32 if layout == NONE else torch.bfloat16)
        torch.testing.assert_close(rows.float(), exact[first : first + len(rows)], rtol=2**-7, atol=0)
        assert layout != NONE or torch.equal(rows, found[0][1])


def inputs(rank: int, i: int) -> Tensor:
    return torch.rand(4, 16, generator=torch.Generator().manual_seed(64 * rank + i)).bfloat16()


@pytest.mark.parametrize("layout", [FULL, HYBRID, NONE])
def test_many_bf16_micro_batches_lose_nothing(layout: Layout) -> None:
    exact = sum(inputs(rank, i).sum(0, dtype=torch.float32) for rank in range(4) for i in range(64)).expand(8, 16)
    # Copies of the model are summed once, in fp32, and FSDP2 rounds that sum to bf16; the others round each part.
    bound = 2**-8 if layout == HYBRID else 1e-3
    for first, rows in run_ranks(many_small_gradients, 4, layout, True):
        assert rows.dtype == torch.float32
        assert (rows / exact[first : first + len(rows)] - 1).abs().max() < bound
    if layout == FULL:  # torch's own sum in bf16 does lose
        first, rows = run_ranks(many_small_gradients, 4, layout, False)[0]
        assert (rows / exact[first : first + len(rows)] - 1).abs().max() > 2 * bound


def rows_and_whole(place: Place, layout: Layout) -> Any:
    model = nn.Sequential(nn.Linear(3, 7, device="meta"), nn.Linear(7, 1, device="meta"))
    parallelize(model, [], place, layout[0], shard_group=layout[1], replica_group=layout[2], recompute=False)
    materialise(model, place.device)
    for parameter in model.parameters():
        local, first = local_rows(parameter)
        for row in range(local.shape[0]):
            local[row] = first + row
    return [(local_rows(p)[1], local_rows(p)[0].shape[0], gather(p)) for p in model.parameters()]


@pytest.mark.parametrize("layout", LAYOUTS[4])
def test_local_rows_tile_the_parameter(layout: Layout) -> None:
    ranks = run_ranks(rows_and_whole, 4, layout)
    for i, length in enumerate([7, 7, 1, 1]):
        expected = torch.arange(length, dtype=torch.float32)
        seen = {row for first, count, _ in (rank[i] for rank in ranks) for row in range(first, first + count)}
        assert seen == set(range(length))
        for rank in ranks:
            assert torch.equal(rank[i][2].reshape(length, -1)[:, 0], expected)


def ties(place: Place) -> Any:
    model = built(place, FULL, False)
    table = model.model.embed_tokens
    tied = [model.lm_head.weight is table.weight]
    with torch.no_grad():
        model(micro_batches(place.rank, place.world_size)[0])
    tied.append(model.lm_head.weight is table.weight)
    gathered = not isinstance(table.weight, DTensor)
    reshard(model)
    return tied, gathered, isinstance(table.weight, DTensor)


def test_tied_weights_stay_one_and_reshard_frees_the_root() -> None:
    assert run_ranks(ties, 2) == [([True, True], True, True)] * 2


def test_materialise_keeps_the_values_of_real_tensors() -> None:
    model = built_on("meta", True, torch.float32)
    model.register_buffer("scale", torch.tensor(3.0))
    materialise(model, torch.device("cpu"))
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert cast(Tensor, model.scale).item() == 3.0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_group_sizes() -> None:
    assert group_sizes(8, 4, "FULL_SHARD", None, None) == (1, 8)
    assert group_sizes(8, 4, "NO_SHARD", None, None) == (8, 1)
    assert group_sizes(8, 4, "HYBRID_SHARD", None, None) == (2, 4)
    assert group_sizes(8, 8, "HYBRID_SHARD", 0, 4) == (4, 2)
    assert group_sizes(8, 8, "HYBRID_SHARD", 2, 0) == (4, 2)
    assert problems(8, 8, "HYBRID_SHARD", 2, 4) == []
    (sentence,) = problems(8, 8, "HYBRID_SHARD", 3, 2)
    assert "sharding_group_size 3 x replica_group_size 2 is 6, but there are 8 ranks" in sentence
    (sentence,) = problems(4, 4, "HYBRID_SHARD", 8, None)
    assert "4 ranks" in sentence
    (sentence,) = problems(4, 4, "FULL", None, None)
    assert "FULL_SHARD" in sentence


def wrong_sizes(place: Place) -> str:
    try:
        built(place, ("HYBRID_SHARD", 3, 0), False)
    except UserError as error:
        return str(error)
    return ""


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert all("sharding_group_size 3" in text for text in run_ranks(wrong_sizes, 2))


def alone(place: Place) -> Any:
    model = built(place, FULL, True, recompute=True)
    norm, gradients = step(model, optimizer_of(model), place)
    return isinstance(model, FSDPModule), [block.recompute for block in blocks(model)], norm, gradients


def test_one_rank_is_not_wrapped() -> None:
    ((wrapped, recompute, norm, gradients),) = run_ranks(alone, 1)
    norm0, gradients0, _ = reference(True, torch.float32, 1)[0]
    assert not wrapped
    assert recompute == [True, True]
    assert norm == pytest.approx(norm0, rel=1e-5)
    assert not wrong(gradients, gradients0)
