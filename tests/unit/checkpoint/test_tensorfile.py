"""One safetensors file: written as the library reads it, and every damage found before the library sees it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from packtrain.checkpoint.tensorfile import BadFile, Slot, TensorWriter, read_header

SHAPES = {"a": (3, 4), "b": (5,), "empty": (0, 7), "c": (2, 2, 2)}


def written(dtype: torch.dtype, tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    writer = TensorWriter(file, [(name, tuple(t.shape)) for name, t in tensors.items()], dtype)
    for name, tensor in tensors.items():
        assert not writer.full
        writer.add(name, tensor)
    assert writer.full
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    tensors["not contiguous"] = torch.randn(4, 6).t()
    data = written(dtype, tensors)
    found = load(data)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    (tmp_path / "x.safetensors").write_bytes(data)
    assert read_header(tmp_path / "x.safetensors")["a"].shape == (3, 4)
    assert b'"__metadata__":{"format":"pt"}' in data


def test_tensors_come_in_the_headers_order() -> None:
    writer = TensorWriter(io.BytesIO(), [("a", (2,)), ("b", (2,))], torch.float32)
    with pytest.raises(ValueError, match="next tensor is"):
        writer.add("b", torch.zeros(2))
    with pytest.raises(ValueError, match="next tensor is"):
        writer.add("a", torch.zeros(3))


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(3, 4, dtype=torch.bfloat16), "i": torch.zeros(5, dtype=torch.int64)}, path)
    assert read_header(path) == {"w": Slot("BF16", (3, 4), 40, 64), "i": Slot("I64", (5,), 0, 40)}


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


FLOAT = b"\0" * 4
BAD = {
    "empty": (b"", "0 bytes on disk, too short"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "Git LFS pointer .*git lfs pull",
    ),
    "text": (b"<!DOCTYPE html><html>Not found</html>", "header has .* bytes, and 100,000,000 is the limit"),
    "huge header": (file_of({}, length=100_000_001), "100,000,001 bytes, and 100,000,000"),
    "header cut": (file_of({"a": entry(0, 4)}, length=500), "its header alone says 508"),
    "data cut": (file_of({"a": entry(0, 4)}, FLOAT[:3]), "72 bytes on disk, its header says 73"),
    "data too long": (file_of({"a": entry(0, 4)}, FLOAT + b"x"), "74 bytes on disk, its header says 73"),
    "no JSON": (file_of(b"{nonsense}"), "header cannot be read"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "header cannot be read"),
    "nested": (file_of(b"[" * 100_000), "header cannot be read"),
    "a list": (file_of([]), "no JSON object"),
    "twice": (file_of(b'{"a": {}, "a": {}}'), "'a' is there twice"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "no dtype, shape and data_offsets for a"),
    "no numbers": (file_of({"a": entry(0, 4, ["1"])}, FLOAT), "entry for a"),
    "negative": (file_of({"a": entry(0, 4, [-1])}, FLOAT), "entry for a"),
    "too few bytes": (file_of({"a": entry(0, 4, (2,))}, FLOAT), r"gives a 4 bytes, and F32 \[2\] takes 8"),
    "overlap": (file_of({"a": entry(0, 4), "b": entry(0, 4)}, FLOAT), "b overlap another tensor's or leave a gap"),
    "gap": (file_of({"a": entry(4, 8)}, FLOAT * 2), "a overlap another tensor's or leave a gap"),
    "backwards": (file_of({"a": entry(0, 4), "b": entry(4, 2, (1,), "ODD")}, FLOAT), "b overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage(case: str, tmp_path: Path) -> None:
    data, words = BAD[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=words):
        read_header(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadFile, match="no such file"):
            read_header(path)


@settings(deadline=None)
@given(cut=st.integers(0, 400), at=st.integers(0, 399), flip=st.integers(0, 255))
def test_no_damage_to_the_header_goes_unseen_by_us_and_crashes_the_reader(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, flip: int
) -> None:
    """Whatever byte changes and wherever the file is cut: BadFile, or a file that the library reads too."""
    data = bytearray(written(torch.float32, {"a": torch.zeros(3, 4), "b": torch.zeros(5)}))
    data[min(at, len(data) - 1)] ^= flip
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(data)[: len(data) - max(0, cut - 300)])
    try:
        slots = read_header(path)
    except BadFile:
        return
    if all(slot.dtype == "F32" for slot in slots.values()):
        assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {n: s.shape for n, s in slots.items()}
