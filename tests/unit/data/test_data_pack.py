"""Packing: every document once, none cut, few packs, and always the same ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.pack import pack, shuffled, single

lengths_and_context = st.integers(1, 60).flatmap(
    lambda context: st.tuples(st.lists(st.integers(1, context), min_size=1, max_size=60), st.just(context))
)


def slow_best_fit(lengths: list[int], context: int) -> int:
    """Best-fit decreasing by looking at every pack; the number of packs."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(context - length)
    return len(room)


@settings(deadline=None)
@given(lengths_and_context, st.integers(0, 3))
def test_no_document_is_lost_doubled_or_cut(case: tuple[list[int], int], seed: int) -> None:
    lengths, context = np.array(case[0], dtype=np.int64), case[1]
    packs = pack(lengths, context, seed)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    sizes = [int(lengths[packs[i]].sum()) for i in range(len(packs))]
    assert min(sizes) > 0
    assert max(sizes) <= context
    assert len(packs) == slow_best_fit(case[0], context)


@settings(deadline=None)
@given(lengths_and_context)
def test_packs_are_a_function_of_lengths_context_and_seed(case: tuple[list[int], int]) -> None:
    lengths, context = np.array(case[0], dtype=np.int64), case[1]
    first, second = pack(lengths, context, 5), pack(lengths.copy(), context, 5)
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.offsets, second.offsets)


def test_the_seed_mixes_equal_lengths() -> None:
    lengths = np.full(40, 10, dtype=np.int64)
    assert not np.array_equal(pack(lengths, 40, 0).rows, pack(lengths, 40, 1).rows)


def test_packs_are_nearly_full_on_ordinary_lengths() -> None:
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 80, size=5000), 512)
    packs = pack(lengths, 512, 0)
    assert lengths.sum() / (512 * len(packs)) > 0.99


def test_a_document_that_does_not_fit_is_not_cut() -> None:
    with pytest.raises(ValueError, match="41 tokens, more than context_length 40"):
        pack(np.array([3, 41]), 40, 0)


def test_single_rows() -> None:
    groups = single(3)
    assert [groups[i].tolist() for i in range(len(groups))] == [[0], [1], [2]]


def test_shuffles_are_fixed_for_ever() -> None:
    """An order that changed would break every resume: these numbers are PCG64's, whatever numpy's version."""
    assert shuffled(8, 42, 1).tolist() == GOLDEN
    assert sorted(shuffled(100, -3, 2).tolist()) == list(range(100))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 0, 2))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 1, 1))


GOLDEN = [1, 2, 5, 3, 6, 0, 4, 7]
