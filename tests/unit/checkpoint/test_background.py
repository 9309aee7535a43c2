"""A thread's error comes out where it is asked for; a host copy is the original as it was."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from packtrain.checkpoint.background import Background
from packtrain.checkpoint.dcp import Rows
from packtrain.checkpoint.host_copy import HostCopy
from packtrain.distributed import host_memory


def test_work_goes_on_beside() -> None:
    background, go, done = Background(), threading.Event(), []
    background.start("work", lambda: done.append(go.wait(10)))
    assert background.busy
    assert not background.wait(0.01)
    go.set()
    assert background.wait()
    assert done == [True]
    assert not background.busy


@pytest.mark.parametrize("error", [ValueError("no disk"), SystemExit(3)])
def test_an_error_is_raised_once_by_who_waits(error: BaseException) -> None:
    background = Background()

    def fails() -> None:
        raise error

    background.start("work", fails)
    until = time.monotonic() + 10
    while not background.failed and time.monotonic() < until:
        time.sleep(0.001)
    assert background.failed
    with pytest.raises(type(error)) as raised:
        background.wait()
    assert raised.value is error
    assert not background.failed
    assert background.wait()
    background.start("more", lambda: None)
    assert background.wait()


def test_a_process_can_end_whatever_keeps_the_thread() -> None:
    background, go = Background(), threading.Event()
    background.start("work", lambda: go.wait() and None)
    assert background._thread is not None
    assert background._thread.daemon
    go.set()
    background.wait()


def rows_of_all_kinds() -> dict[str, Rows]:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "rows": Rows((8, 6), {(4, 0): whole}),
        "columns": Rows((4, 12), {(0, 0): whole[:, :3].clone(), (0, 9): whole[:, 3:]}),
        "bf16": Rows((3,), {(0,): torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)}),
        "codes": Rows((5,), {(0,): torch.arange(5, dtype=torch.uint8)}),
        "number": Rows((1,), {(0,): torch.tensor(7.0).view(1)}),
        "nothing": Rows((0, 2), {(0, 0): torch.empty(0, 2)}),
    }


def same(first: dict[str, Rows], second: dict[str, Rows]) -> bool:
    return all(
        first[name].shape == second[name].shape
        and first[name].boxes.keys() == second[name].boxes.keys()
        and all(torch.equal(part, second[name].boxes[place]) for place, part in first[name].boxes.items())
        for name in {*first, *second}
    )


def test_a_copy_is_the_original_as_it_was() -> None:
    rows, copies = rows_of_all_kinds(), HostCopy()
    taken = copies.take(rows)
    assert taken is not None
    assert taken.event is None
    assert same(taken.rows, rows_of_all_kinds())
    for row in rows.values():
        for part in row.boxes.values():
            part.fill_(1)
    assert same(taken.rows, rows_of_all_kinds())


def test_memory_is_used_again() -> None:
    rows, copies = rows_of_all_kinds(), HostCopy()
    places = []
    for _ in range(3):
        taken = copies.take(rows)
        assert taken is not None
        places.append([part.data_ptr() for row in taken.rows.values() for part in row.boxes.values()])
    assert places[0] == places[1] == places[2]
    fewer = copies.take({"bf16": rows["bf16"]})
    assert fewer is not None
    assert list(fewer.rows) == ["bf16"]


def test_memory_can_be_there_before_the_first_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, copies = rows_of_all_kinds(), HostCopy()
    copies.prepare(rows)
    monkeypatch.setattr(HostCopy, "_make", lambda self, parts: pytest.fail("taken twice"))
    taken = copies.take(rows)
    assert taken is not None
    assert same(taken.rows, rows)


def test_without_memory_there_is_no_copy(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(host_memory, "free", lambda: 1000.0)
    HostCopy(neighbours=8).prepare(rows_of_all_kinds())
    assert HostCopy(neighbours=8).take(rows_of_all_kinds()) is None
    assert "checkpoints are written while the training waits" in capfd.readouterr().err


def test_free_memory_is_the_hosts_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < host_memory.free() < 2**50
    for name, text in (("MEMINFO", "MemTotal: 9 kB\nMemAvailable: 5 kB\n"), ("CGROUP", None)):
        (tmp_path / name).write_text(text) if text else (tmp_path / name).mkdir()
        monkeypatch.setattr(host_memory, name, tmp_path / name)
    assert host_memory.free() == 5 * 1024
    for limit, left in (("max", 5 * 1024), ("4000", 3000)):
        (tmp_path / "CGROUP/memory.max").write_text(f"{limit}\n")
        (tmp_path / "CGROUP/memory.stat").write_text("anon 1000\nfile 700\n")
        assert host_memory.free() == left


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_on_cuda_is_as_it_was_when_the_update_is_held() -> None:
    """What is queued after the event changes the original alone; the host waits for nothing: its memory is locked."""
    value = torch.zeros(2**26, device="cuda")
    rows, copies = {"value": Rows((2**26,), {(0,): value})}, HostCopy()
    for number in range(1, 5):
        value.fill_(number)
        taken = copies.take(rows)
        assert taken is not None
        assert taken.event is not None
        taken.event.wait()
        value.fill_(-1)
        taken.event.synchronize()
        copy = taken.rows["value"].boxes[torch.Size([0])]
        assert bool((copy == number).all())
        assert copy.is_pinned()
