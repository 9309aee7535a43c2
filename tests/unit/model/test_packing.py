"""Several documents in a batch: each computed as if it were alone, whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
LENGTHS = (5, 13, 2, 9, 1)


@pytest.fixture(params=[{}, DYNAMIC], ids=["default rope", "dynamic rope"])
def model(request: pytest.FixtureRequest, tools: Any) -> Any:
    return tools.ours(request.param)


def documents(tools: Any) -> list[list[int]]:
    return [tools.some_ids(length, seed) for seed, length in enumerate(LENGTHS)]


def test_logits_do_not_depend_on_neighbours(tools: Any, model: Any) -> None:
    first, second, third, fourth, _ = documents(tools)
    before = model(tools.batch_of([[first, second, third], [fourth]]), logits=True)
    others = [tools.some_ids(len(d), 50 + i) for i, d in enumerate((first, third, fourth))]
    after = model(tools.batch_of([[others[0], second, others[1]], [others[2]]]), logits=True)
    own = slice(len(first), len(first) + len(second))
    assert torch.equal(before[0, own], after[0, own])
    alone = model(tools.batch_of([[second]]), logits=True)
    assert tools.distance(before[0, own], alone[0]) < 1e-6
    assert tools.distance(before[0, : len(first)], after[0, : len(first)]) > 0.1


def test_frequencies_of_a_document_do_not_depend_on_a_longer_one(tools: Any) -> None:
    model = tools.ours(DYNAMIC)
    short, long = tools.some_ids(10), tools.some_ids(40, 1)
    beside = model(tools.batch_of([[short, long]]), logits=True)[0, :10]
    assert tools.distance(beside, model(tools.batch_of([[short]]), logits=True)[0]) < 1e-6


def test_packed_gradients_are_the_sum_of_single_ones(tools: Any, model: Any) -> None:
    *most, last = documents(tools)
    packed = model(tools.batch_of([most, [last]], masked=2))
    packed.backward()
    together = tools.gradients(model)
    alone = [model(tools.batch_of([[document]], masked=2)) for document in (*most, last)]
    torch.stack(alone).sum().backward()
    assert packed.item() == pytest.approx(sum(loss.item() for loss in alone), rel=1e-6)
    for name, gradient in tools.gradients(model).items():
        assert tools.distance(together[name], gradient) < 1e-5, name


def test_whole_rows_equal_packed_rows(tools: Any, model: Any) -> None:
    rows = [[document] for document in documents(tools)]
    losses = [model(tools.batch_of(rows, length=16, whole_rows=whole)) for whole in (False, True)]
    found = []
    for loss in losses:
        loss.backward()
        found.append(tools.gradients(model))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for name, gradient in found[0].items():
        assert tools.distance(found[1][name], gradient) < 1e-5, name


def test_a_document_without_borders_is_noticed(tools: Any) -> None:
    model = tools.ours()
    first, second, *_ = documents(tools)
    batch = tools.batch_of([[first, second]])
    mixed = replace(batch, whole_rows=True)
    own = slice(len(first), None)
    assert tools.distance(model(mixed, logits=True)[0, own], model(batch, logits=True)[0, own]) > 1e-3


def test_an_empty_batch_gives_an_exact_zero_and_a_gradient_for_every_parameter(tools: Any, model: Any) -> None:
    batch = replace(tools.batch_of([[[0] * 8]], masked=8), tokens=0, rows=())
    assert batch.count == 0
    loss = model(batch)
    assert loss.item() == 0.0
    loss.backward()
    assert all(not gradient.any() for gradient in tools.gradients(model).values())
