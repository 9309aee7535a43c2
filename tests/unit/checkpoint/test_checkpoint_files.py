"""Files are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from packtrain.checkpoint.files import copy_file, replacing, sweep, write_text


def test_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_text(path, "été")
    assert path.read_bytes() == "été".encode()
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "été"
        assert os.path.basename(file.name).startswith(".")
    assert path.read_text() == "new"
    copy_file(path, tmp_path / "y")
    assert (tmp_path / "y").read_text() == "new"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")

    def cut_short() -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(handle: int) -> None:
        steps.append("sync")
        sync(handle)

    def replace(*paths: str) -> None:
        steps.append("rename")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "x", "text")
    assert steps == ["sync", "rename", "sync"]


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / ".x.json.unfinished-123").write_text("half")
    (tmp_path / ".hidden").write_text("mine")
    write_text(tmp_path / "x.json", "whole")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "x.json"]
