"""Every damage is found, and what no disk can take is said before or without harm to what is there.

The checkpoint is a real one: two small tensors and an optimizer's, saved by torch.distributed.checkpoint on one rank.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from packtrain.checkpoint import dcp, dcp_file, dcp_folder, dcp_storage
from packtrain.checkpoint.dcp_folder import STATE, StepFolder, complete, keep_newest, verify
from packtrain.errors import Fault

ROWS = {
    "a.weight": dcp.Rows((64, 32), {(0, 0): torch.arange(2048.0).view(64, 32)}),
    "optimizer.exp_avg.a.weight": dcp.Rows((64, 32), {(0, 0): torch.ones(64, 32)}),
    "b.bias": dcp.Rows((7,), {(0,): torch.zeros(7, dtype=torch.bfloat16)}),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    """One rank, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dcp.saving_group()
    dist.destroy_process_group()


def small_files(folder: StepFolder) -> None:
    folder.write_json(STATE, {"step": 1, "step_items": 4, "fingerprint": {"--lr": 0.1}, "best_step": None})


def save(root: Path, step: int, group: dist.ProcessGroup, **more: Any) -> Path:
    dcp.save(root, step, ROWS, small_files, group=group, **more)
    return root / f"step-{step}"


@pytest.fixture
def folder(tmp_path: Path, group: dist.ProcessGroup) -> Path:
    return save(tmp_path, 1, group)


def flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_much_is_written_into_several_files_side_by_side(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dcp_storage, "PART_BYTES", 4096)
    monkeypatch.setattr(dcp_file, "_BLOCK", 1000)
    folder = save(tmp_path, 1, group)
    assert verify(folder) == []
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"rank-00000-{part}.safetensors" for part in range(3)]
    empty = {
        name: dcp.Rows(tuple(r.shape), {o: torch.empty_like(t) for o, t in r.boxes.items()}) for name, r in ROWS.items()
    }
    dcp.load(folder, empty, group=group)
    for name, rows in ROWS.items():
        assert all(torch.equal(empty[name].boxes[place], part) for place, part in rows.boxes.items())
    flip(folder / files[1], 200, 3)
    assert len(verify(folder)) == 1


def test_100_random_flips_are_100_found(folder: Path, record_property: Any) -> None:
    """A hundred checkpoints with one wrong bit each, anywhere in their bytes."""
    assert verify(folder) == []
    places = [(path, place) for path in sorted(folder.iterdir()) for place in range(path.stat().st_size)]
    choose, found = random.Random(0), 0
    for path, place in choose.sample(places, 100):
        bit = choose.randrange(8)
        flip(path, place, bit)
        found += bool(verify(folder))
        flip(path, place, bit)
    record_property("M9", f"{found} of 100")
    assert found == 100
    assert verify(folder) == []


def test_every_byte_of_the_json_files_counts(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors":
            for place in range(path.stat().st_size):
                flip(path, place, place % 8)
                assert verify(folder), (path.name, place)
                flip(path, place, place % 8)
    assert verify(folder) == []


def test_without_digests_a_flip_would_be_missed(folder: Path) -> None:
    """What reading back by its writer saves is asked for anew whenever a run begins."""
    (data,) = folder.glob("*.safetensors")
    flip(data, data.stat().st_size - 1, 0)
    assert verify(folder, read_back={data.name}) == []
    assert len(verify(folder)) == 1


def test_room_is_asked_for_first(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1, group)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(dcp_folder.shutil, "disk_usage", lambda _: usage._replace(free=50_000_000))
    with pytest.raises(Fault) as error:
        save(tmp_path, 2, group)
    assert "a checkpoint takes 0.07 GB, and 0.05 GB are free there; make room" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert verify(old) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["tensors", "sync", "small", "DONE"])
def test_a_write_that_fails_leaves_what_was(
    number: int, where: str, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1, group)

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    def on_done(path: Path, text: str, write: Any = dcp_folder.write_text) -> None:
        fails() if path.name == dcp_folder.DONE else write(path, text)

    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(dcp_file._Hashing, "write", fails)
        elif where == "sync":
            patch.setattr(dcp_file.os, "fsync", fails)
        elif where == "small":
            patch.setattr(StepFolder, "write_json", fails)
        else:
            patch.setattr(dcp_folder, "write_text", on_done)
        with pytest.raises(Fault) as error:
            save(tmp_path, 2, group)
    assert f"the checkpoint of step 2 could not be saved ([Errno {number}] {os.strerror(number)})" in str(error.value)
    assert ("make room (quotas" in str(error.value)) == (number != errno.EIO)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert verify(old) == []
    assert list(complete(save(tmp_path, 2, group).parent)) == [1, 2]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_checkpoint_damage as t
import torch.distributed as dist
from packtrain.checkpoint import dcp
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dcp.saving_group()
t.save(Path(sys.argv[1]), 1, group)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    t.save(Path(sys.argv[1]), 2, group)
except t.Fault as error:
    print(error)
"""


def test_a_real_limit_on_files(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as `ulimit -f` sets it, in a process of its own: the write comes out short, then fails."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "ck"), str(Path(__file__).parent)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "the checkpoint of step 2 could not be saved ([Errno 27] File too large)" in ended.stdout
    assert "`ulimit -f` count too" in ended.stdout
    assert [path.name for path in (tmp_path / "ck").iterdir()] == ["step-1"]
    assert verify(tmp_path / "ck/step-1") == []


def test_a_save_in_place_would_lose_the_old_one(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hidden folder is for: the same full disk, and a writer that begins in the folder that is there."""

    class InPlace(StepFolder):
        def __init__(self, root: Path, step: int) -> None:
            super().__init__(root, step)
            self.path = root / "step-1"

    old = save(tmp_path, 1, group)
    monkeypatch.setattr(dcp_storage, "StepFolder", InPlace)
    monkeypatch.setattr(dcp_file._Hashing, "write", lambda *_: os.write(-1, b""))
    with pytest.raises(Fault):
        save(tmp_path, 2, group)
    assert verify(old) != []


def test_a_disk_that_keeps_other_bytes_is_found_before_it_counts(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1, group)

    def lies(file: int, sync: Any = os.fsync) -> None:
        sync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.suffix == ".safetensors":
            flip(path, 3000, 1)

    monkeypatch.setattr(dcp_file.os, "fsync", lies)
    with pytest.raises(Fault, match="was read back with other bytes than were written; check the disk"):
        save(tmp_path, 2, group, done=lambda _: keep_newest(tmp_path, 1, None))
    assert list(complete(tmp_path)) == [1]
    assert verify(old) == []


def test_the_old_one_goes_only_after_the_new_one_was_read_back(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is short once the folder has its name: nothing is removed, and the new one is put aside."""
    save(tmp_path, 1, group)
    monkeypatch.setattr(dcp_folder, "SEEN_SECONDS", 0.2)

    def commits(self: StepFolder, commit: Any = StepFolder.commit) -> Path:
        final: Path = commit(self)
        os.truncate(final / "rank-00000.safetensors", 100)
        return final

    with monkeypatch.context() as patch:
        patch.setattr(StepFolder, "commit", commits)
        with pytest.raises(Fault, match=r"100 bytes, and .* were written; it is now in .*damaged/step-2"):
            save(tmp_path, 2, group, done=lambda _: keep_newest(tmp_path, 1, None))
    assert list(complete(tmp_path)) == [1]
    save(tmp_path, 2, group, done=lambda _: keep_newest(tmp_path, 1, None))
    assert list(complete(tmp_path)) == [2]


def test_a_shared_file_system_that_is_late(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are not seen at first, stale handles, sizes from before: waited for, and the save is whole."""
    late = {"exists": 3, "stat": 3, "open": 3}
    exists, stat, opened = Path.exists, Path.stat, Path.open

    def not_yet(what: str) -> bool:
        late[what] -= 1
        return late[what] >= 0

    def sees(path: Path) -> bool:
        return False if path.name.startswith(".step-") and not_yet("exists") else exists(path)

    def looks(path: Path, **how: Any) -> Any:
        if path.name == "rank-00000.safetensors" and not_yet("stat"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **how)

    def opens(path: Path, mode: str = "r", *how: Any, **more: Any) -> Any:
        if mode == "rb" and path.name == "rank-00000.safetensors" and not_yet("open"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, mode, *how, **more)

    monkeypatch.setattr(Path, "exists", sees)
    monkeypatch.setattr(Path, "stat", looks)
    monkeypatch.setattr(Path, "open", opens)
    folder = save(tmp_path, 1, group)
    assert all(left < 0 for left in late.values()), late
    assert verify(folder) == []


def test_without_patience_it_would_be_an_error(tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_folder, "SEEN_SECONDS", 0.0)
    monkeypatch.setattr(dcp_folder, "asked_again", lambda look: look())
    with pytest.raises((Fault, OSError)):
        test_a_shared_file_system_that_is_late(tmp_path, group, monkeypatch)


def test_what_never_comes_into_sight_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_folder, "SEEN_SECONDS", 0.1)
    with pytest.raises(Fault, match="every machine needs the same file system at this path"):
        dcp_folder.wait_until_seen(tmp_path / "step-1")


def test_a_disk_that_cannot_be_read_is_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(dcp_folder, "_facts_of", fails)
    with pytest.raises(OSError, match="Input/output"):
        dcp_folder.facts_of(folder / STATE)
    (data,) = folder.glob("*.safetensors")
    expected = dcp_folder.FileFacts(data.stat().st_size, "")
    said = dcp_folder._difference(folder, data.name, expected, digest=True)
    assert said == f"{data}: cannot be read (Input/output error)"


def test_so_many_of_the_newest_stay_and_the_best(tmp_path: Path, group: Any) -> None:
    for step in range(1, 7):
        save(tmp_path, step, group)
    keep_newest(tmp_path, 0, 2)
    assert list(complete(tmp_path)) == [1, 2, 3, 4, 5, 6]
    (tmp_path / "step-6/DONE").unlink()
    keep_newest(tmp_path, 2, 2)
    assert list(complete(tmp_path)) == [2, 4, 5]
    keep_newest(tmp_path, 1, None)
    assert list(complete(tmp_path)) == [5]
