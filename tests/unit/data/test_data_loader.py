"""Steps for any number of ranks: the same rows, labels and keys in each, every row once an epoch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.batch import IGNORE, Batch
from packtrain.data.loader import Loader
from packtrain.data.tokens import Tokens
from packtrain.errors import UserError

CONTEXT = 24
Strategy = Literal["padding", "packing"]


def make_tokens(lengths: list[int], first_label: bool = False) -> Tokens:
    """Row r holds tokens 100 r + place + 1; about half are labelled, the first if asked, the last always."""
    rng = np.random.default_rng(len(lengths))
    ids = [np.arange(length) + 100 * row + 1 for row, length in enumerate(lengths)]
    labels = []
    for row in ids:
        kept = rng.random(len(row)) < 0.5
        kept[0] = first_label
        kept[-1] = len(row) > 1 or first_label
        labels.append(np.where(kept, row, IGNORE))
    return Tokens(
        ids=np.concatenate(ids).astype(np.int32),
        labels=np.concatenate(labels).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        numbers=np.arange(1, len(lengths) + 1),
        file="made.csv",
    )


def make(tokens: Tokens, strategy: Strategy = "padding", **other: Any) -> Loader:
    fields: dict[str, Any] = {
        "context_length": CONTEXT, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 7,
        "shuffle": True, "pad_id": 0, **other,
    }  # fmt: skip
    return Loader(tokens, strategy=strategy, **fields)


def ranks(tokens: Tokens, world: int, strategy: Strategy, **other: Any) -> list[Loader]:
    return [make(tokens, strategy, rank=rank, world_size=world, **other) for rank in range(world)]


def documents(batch: Batch) -> list[tuple[int, list[int]]]:
    """(row of the data, ids) of each document that is not padding, read from the batch alone."""
    ids, edges = batch.ids.flatten(), batch.cu_seqlens.tolist()
    found = [ids[a:b].tolist() for a, b in pairwise(edges) if int(ids[a]) != 0]
    return list(zip(batch.rows, found, strict=True))


def check(batch: Batch, tokens: Tokens) -> None:
    """Everything that batch.py promises."""
    total = batch.ids.numel()
    assert batch.ids.shape == batch.positions.shape == batch.keys.shape
    assert {batch.ids.dtype, batch.positions.dtype, batch.index.dtype, batch.targets.dtype, batch.keys.dtype} == {
        torch.int64
    }
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *batch.lengths]).tolist()
    assert batch.cu_seqlens[-1] == total
    assert batch.max_seqlen == max(batch.lengths)
    assert min(batch.lengths) > 0
    assert batch.positions.flatten().tolist() == [p for length in batch.lengths for p in range(length)]
    assert batch.tokens == int((batch.ids != 0).sum()) == sum(len(ids) for _, ids in documents(batch))
    expected = []
    for row, ids in documents(batch):
        real, labels = tokens.row(row)
        assert ids == real.tolist()
        expected += [(int(a), int(b)) for a, b in zip(real[:-1], labels[1:], strict=True) if b != IGNORE]
    flat = batch.ids.flatten()
    assert [(int(flat[i]), int(t)) for i, t in zip(batch.index, batch.targets, strict=True)] == expected
    begun = ((batch.positions == 0) & (batch.ids != 0)).sum(dim=1)
    assert batch.whole_rows == bool((begun <= 1).all())


cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, CONTEXT), min_size=1, max_size=40),
        "strategy": st.sampled_from(["padding", "packing"]),
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "shuffle": st.booleans(),
        "first_label": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(cases, st.integers(1, 5))
def test_an_epoch_visits_every_row_once_with_all_its_labels(case: dict[str, Any], world: int) -> None:
    tokens = make_tokens(case.pop("lengths"), case.pop("first_label"))
    loaders = ranks(tokens, world, **case)
    count = loaders[0].steps_per_epoch
    for epoch in range(2):
        seen: list[int] = []
        labels = 0
        for step in range(epoch * count, (epoch + 1) * count):
            micro = [loader.step(step) for loader in loaders]
            assert len({len(batches) for batches in micro}) == 1  # as many forwards on every rank
            for batch in (b for batches in micro for b in batches):
                check(batch, tokens)
                seen += batch.rows
                labels += batch.count
        assert sorted(seen) == list(range(tokens.rows))
        assert labels == loaders[0].labels_total


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, CONTEXT), min_size=1, max_size=50),
    st.sampled_from(["padding", "packing"]),
    st.sampled_from([(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4), (2, 4, 1), (1, 1, 8)]),
)
def test_a_step_is_the_same_for_any_number_of_ranks(
    lengths: list[int], strategy: Strategy, split: tuple[int, int, int]
) -> None:
    """With one G, each step has the same rows, (row, position) places, targets and dropout keys as on one rank."""
    tokens = make_tokens(lengths)
    alone = make(tokens, strategy, batch_size=8)
    batch_size, world, accumulation = split
    together = ranks(tokens, world, strategy, batch_size=batch_size, accumulation=accumulation)
    assert alone.steps_per_epoch == together[0].steps_per_epoch
    for step in range(alone.steps_per_epoch + 1):
        one = places(alone.step(step))
        many = places([batch for loader in together for batch in loader.step(step)])
        assert one == many


def places(batches: list[Batch]) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(row, position) -> (id, key, target or 0)."""
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for batch in batches:
        targets = dict(zip(batch.index.tolist(), batch.targets.tolist(), strict=True))
        ids, keys = batch.ids.flatten().tolist(), batch.keys.flatten().tolist()
        rows = iter(batch.rows)
        edges = batch.cu_seqlens.tolist()
        for a, b in pairwise(edges):
            if ids[a] == 0:
                continue
            row = next(rows)
            for place in range(a, b):
                assert (row, place - a) not in found
                found[row, place - a] = ids[place], keys[place], targets.get(place, 0)
    return found


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    tokens = make_tokens([5] * 50)
    base = make(tokens)
    for world in (2, 4):
        for loader in ranks(tokens, world, "padding", batch_size=3):
            assert np.array_equal(loader.order(3), base.order(3))
    assert not np.array_equal(base.order(0), base.order(1))
    assert not np.array_equal(base.order(0), make(tokens, seed=8).order(0))
    assert np.array_equal(make(tokens, shuffle=False).order(4), np.arange(50))
    torch.manual_seed(0)
    np.random.seed(0)
    assert np.array_equal(base.order(0), make(tokens).order(0))


def test_step_is_a_pure_function_of_its_number() -> None:
    tokens = make_tokens([3, 9, 4, 7, 5, 2, 8])
    loader = make(tokens, "packing", accumulation=2)
    later = loader.step(5)
    for step in (0, 3, 1):
        loader.step(step)
    again, fresh = loader.step(5), make(tokens, "packing", accumulation=2).step(5)
    for a, b, c in zip(later, again, fresh, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.ids, c.ids)
        assert torch.equal(a.keys, c.keys)
        assert a.rows == c.rows


def test_a_short_last_step_keeps_ranks_in_step() -> None:
    """21 rows, G = 12: the last step has 9 rows = 3 micro-batches of 4 abreast, the last with one row on rank 0."""
    tokens = make_tokens([4] * 21)
    loaders = ranks(tokens, 2, "padding", accumulation=3)
    assert (loaders[0].steps_per_epoch, loaders[0].last_step_items, loaders[0].items) == (2, 9, 21)
    first, second = (loader.step(1) for loader in loaders)
    assert [len(b.rows) for b in first] == [2, 2, 1]
    assert [len(b.rows) for b in second] == [2, 2, 0]
    empty = second[-1]
    assert empty.ids.shape == (1, 4)
    assert (empty.count, empty.tokens, empty.rows, empty.lengths) == (0, 0, (), (4,))
    assert empty.whole_rows
    check(empty, tokens)
    order = loaders[0].order(0)
    assert second[1].rows == tuple(order[12 + 4 + 2 : 12 + 4 + 4])


def test_one_row_on_many_ranks() -> None:
    loaders = ranks(make_tokens([6]), 4, "packing", batch_size=3, accumulation=2)
    batches = [loader.step(0) for loader in loaders]
    assert [len(b) for b in batches] == [1, 1, 1, 1]
    assert [b[0].rows for b in batches] == [(0,), (), (), ()]
    assert {b[0].ids.shape for b in batches} == {(1, 6)}


def test_evaluation_gives_one_batch_a_rank_in_the_files_order() -> None:
    loaders = ranks(make_tokens([3] * 7), 2, "padding", shuffle=False)
    assert loaders[0].steps_per_epoch == 2
    assert [[b.rows for b in loader.step(k)] for k in range(2) for loader in loaders] == [
        [(0, 1)], [(2, 3)], [(4, 5)], [(6,)],
    ]  # fmt: skip


def test_padding_and_neighbours_are_documents_of_their_own() -> None:
    tokens = make_tokens([10, 6, 5, 4, 3])
    (batch,) = make(tokens, "packing", context_length=16, batch_size=2, shuffle=False).step(0)
    check(batch, tokens)
    assert not batch.whole_rows
    assert sorted(batch.lengths) == [3, 4, 4, 5, 6, 10]  # 10 + 6 and 5 + 4 + 3, padded by 4
    last = {edge - 1 for edge in batch.cu_seqlens.tolist()[1:]}
    assert not last & set(batch.index.tolist())  # no document's last place predicts its neighbour


def test_keys_depend_on_seed_and_step() -> None:
    tokens = make_tokens([4])
    keys = [make(tokens, seed=seed).step(step)[0].keys for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert all(len(set(k.flatten().tolist())) == 4 for k in keys)
    assert not torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


def test_filled_is_the_share_of_places_with_tokens() -> None:
    tokens = make_tokens([8, 2, 5, 5, 1])
    loader = make(tokens, shuffle=False)
    batches = [b for k in range(loader.steps_per_epoch) for b in loader.step(k)]
    assert loader.filled == pytest.approx(sum(b.tokens for b in batches) / sum(b.ids.numel() for b in batches))
    assert loader.filled == pytest.approx(21 / (16 + 10 + 1))


class PadTo:
    """A collator as users write them: pads to a multiple, on either side."""

    def __init__(self, multiple: int, left: bool) -> None:
        self.multiple, self.left = multiple, left

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        fill = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0}
        made = {}
        for name, value in fill.items():
            pads = [[value] * (width - len(row[name])) for row in rows]
            both = list(zip(pads, (row[name] for row in rows), strict=True))
            made[name] = torch.tensor([pad + row if self.left else row + pad for pad, row in both])
        return made


@pytest.mark.parametrize("left", [False, True])
def test_a_collators_batch_is_ours_whichever_side_it_pads(left: bool) -> None:
    tokens = make_tokens([3, 9, 4, 7, 5])
    plain, collated = make(tokens, world_size=2), make(tokens, world_size=2, collator=PadTo(8, left))
    for step in range(4):
        for ours, theirs in zip(plain.step(step), collated.step(step), strict=True):
            check(theirs, tokens)
            assert theirs.rows == ours.rows
            assert torch.equal(theirs.ids, ours.ids)
            assert torch.equal(theirs.keys, ours.keys)
            assert torch.equal(theirs.targets, ours.targets)


def test_a_collator_may_change_labels() -> None:
    tokens = make_tokens([5, 5])

    def last_only(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {
            "input_ids": [r["input_ids"] for r in rows],
            "labels": [[IGNORE] * 4 + r["labels"][-1:] for r in rows],
            "attention_mask": [r["attention_mask"] for r in rows],
        }

    (batch,) = make(tokens, shuffle=False, collator=last_only).step(0)
    assert batch.targets.tolist() == [5, 105]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.pop("labels"), "no labels"),
        (lambda made: made.update(labels=made["labels"][:, 1:]), "different shapes"),
        (lambda made: made.update(input_ids=made["input_ids"][:1]), r"expected whole numbers of shape \(2, columns\)"),
        (lambda made: made.update(input_ids=made["input_ids"].float()), "float32"),
        (lambda made: made["attention_mask"][:, 1].zero_(), "one unbroken run"),
        (lambda made: made["attention_mask"].zero_(), "one unbroken run"),
    ],
)
def test_a_collators_mistakes_name_the_file(change: Any, said: str) -> None:
    def collator(rows: list[dict[str, list[int]]]) -> Any:
        made = PadTo(1, False)(rows)
        change(made)
        return made

    with pytest.raises(UserError, match=f"made.csv: get_data_collator.*{said}"):
        make(make_tokens([3, 4]), collator=collator).step(0)


def test_a_collator_that_fails_is_the_users_to_mend() -> None:
    def broken(rows: list[dict[str, list[int]]]) -> Any:
        return rows[0]["pixels"]

    with pytest.raises(UserError, match="get_data_collator failed with KeyError: 'pixels'"):
        make(make_tokens([3, 4]), collator=broken).step(0)


def test_a_collator_with_packing_is_refused() -> None:
    with pytest.raises(UserError, match="--batching_strategy padding"):
        make(make_tokens([3]), "packing", collator=PadTo(8, False))
