"""One output folder has one run: however close together two begin, and whatever became of an earlier one."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from packtrain.checkpoint import owner
from packtrain.checkpoint.owner import NAME, Owner
from packtrain.checkpoint.store import Claim, claim
from packtrain.errors import UserError

RUNS, ROUNDS = 6, 15


def test_a_second_run_is_told_who_has_it(tmp_path: Path) -> None:
    root = tmp_path / "out"
    with Owner(root) as first, Owner(root) as second:
        first.take()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}; wait for it"):
            second.take()
    assert list(root.iterdir()) == []
    with Owner(root) as third:
        third.take()


def takes(root: Path, barrier: Any, told: Any) -> None:
    with Owner(root) as mine:
        barrier.wait(20)
        try:
            mine.take()
            told.put("")
        except UserError as error:
            told.put(str(error))
        barrier.wait(20)


def winners(root: Path) -> list[int]:
    """How many of several processes that begin at once have the folder, in each of some rounds."""
    context = multiprocessing.get_context("fork")
    found = []
    for number in range(ROUNDS):
        barrier, told = context.Barrier(RUNS), context.Queue()
        work = (root / str(number), barrier, told)
        processes = [context.Process(target=takes, args=work, daemon=True) for _ in range(RUNS)]
        for process in processes:
            process.start()
        answers = [told.get(timeout=20) for _ in range(RUNS)]
        for process in processes:
            process.join(20)
        assert all("in use by process" in answer for answer in answers if answer), answers
        found.append(answers.count(""))
    return found


def test_of_runs_that_begin_at_once_one_has_it(tmp_path: Path) -> None:
    assert winners(tmp_path) == [1] * ROUNDS


def test_without_the_lock_several_would_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner.fcntl, "flock", lambda *_: None)
    assert winners(tmp_path) == [RUNS] * ROUNDS
    for _ in range(2):  # what result.json says comes later
        assert claim(tmp_path / "out", {}, overwrite=False) is Claim.NEW


def test_a_killed_owner_has_it_no_more(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with Owner(tmp_path) as mine:
            mine.take()
            os.write(writer, b"x")
            signal.pause()
    os.read(reader, 1)
    with Owner(tmp_path) as mine:
        with pytest.raises(UserError, match=f"process {child} on "):
            mine.take()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert (tmp_path / NAME).exists()
        mine.take()
        assert str(os.getpid()) in (tmp_path / NAME).read_text()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with Owner(tmp_path) as mine, pytest.raises(OSError, match="symbolic links"):
        mine.take()
    assert not (tmp_path / "elsewhere").exists()


def test_without_locks_the_run_goes_on_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(file: int, how: int) -> None:
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(owner.fcntl, "flock", fails)
    with Owner(tmp_path) as mine:
        mine.take()
    assert "the file system has no locks" in capfd.readouterr().err
