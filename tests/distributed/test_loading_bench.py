"""bench/loading.py, small: it runs, all ways load the same, and what it counts is what was held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import loading

WORKERS = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, loading.make_checkpoint(folder, 24 * 2**20, width=512, vocabulary=4096)


def test_each_way_loads_the_same_and_only_streaming_holds_no_whole_model(checkpoint: tuple[Path, int]) -> None:
    folder, size = checkpoint
    found = {way: loading.measure(way, folder, WORKERS, timeout=60) for way in loading.WAYS}
    sums = [sum(worker.total for worker in loads) for loads in found.values()]
    assert sums == pytest.approx([sums[0]] * len(sums), abs=1e-9)
    assert abs(sums[0]) > 1e-3
    for loads in found.values():
        # rows do not divide evenly for every tensor, but each is held once
        assert sum(worker.shards for worker in loads) == size
    extra = {way: [worker.private - worker.shards for worker in loads] for way, loads in found.items()}
    assert sum(extra["packtrain"]) < 0.5 * size
    assert max(extra["rank 0 loads"]) > 0.5 * size
    assert min(extra["every rank loads"]) > 0.8 * size
    table = loading.table(found, size)
    assert all(f"| {way} |" in table for way in loading.WAYS)
