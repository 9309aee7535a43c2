"""A folder of weights: everything that can be wrong with it is one list of sentences."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packtrain.checkpoint.folder import INDEX, SINGLE, HfFolder

TENSORS = {f"model.layers.{i}.mlp.{part}_proj.weight": torch.randn(6, 4) for i in range(8) for part in ("up", "down")}
EXPECTED = dict.fromkeys(TENSORS, (6, 4))
NAMES = list(TENSORS)


def single(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> HfFolder:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE)
    return HfFolder(folder)


def shard_name(i: int) -> str:
    return f"model-0000{i + 1}-of-00004.safetensors"


def sharded(folder: Path) -> dict[str, str]:
    """Four shards of four tensors; returns the weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {name: shard_name(i // 4) for i, name in enumerate(NAMES)}
    for i in range(4):
        save_file({name: TENSORS[name] for name in NAMES[4 * i : 4 * i + 4]}, folder / shard_name(i))
    index(folder, table)
    return table


def index(folder: Path, table: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def one_problem(folder: HfFolder, expected: Any = None) -> str:
    (problem,) = folder.problems(EXPECTED if expected is None else expected)
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_single_file(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = single(tmp_path, {name: tensor.to(dtype) for name, tensor in TENSORS.items()})
    assert folder.problems(EXPECTED) == []
    assert torch.equal(folder.rows(NAMES[3], 2, 5), TENSORS[NAMES[3]].to(dtype)[2:5])
    assert folder.rows(NAMES[3], 4, 4).shape == (0, 4)


def test_rows_of_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    folder = HfFolder(tmp_path)
    assert folder.problems(EXPECTED) == []
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.rows(name, 0, 6), tensor)


def test_single_goes_before_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path)
    folder = single(tmp_path, {"w": torch.zeros(1)})
    assert list(folder.slots) == ["w"]


def test_missing_extra_misshaped_and_integers_are_all_named(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    tensors["model.layers.0.mlp.upproj.weight"] = tensors.pop(NAMES[0])
    tensors[NAMES[1]] = torch.zeros(6, 5)
    tensors[NAMES[2]] = torch.zeros(6, 4, dtype=torch.int8)
    problems = single(tmp_path, tensors).problems(EXPECTED)
    text = "\n".join(problems)
    assert len(problems) == 4
    assert f"1 tensor is missing: {NAMES[0]};" in text
    assert f"model.layers.0.mlp.upproj.weight (nearest of the model's: {NAMES[0]} [6, 4])" in text
    assert f"{NAMES[1]} is [6, 5], expected [6, 4]" in text
    assert f"{NAMES[2]} is I8; expected F32, BF16, F16" in text


def test_ten_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    problem = one_problem(single(tmp_path, {NAMES[0]: TENSORS[NAMES[0]]}))
    assert "15 tensors are missing" in problem
    assert "and 5 more" in problem
    assert problem.count("proj.weight") == 10


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert "16 tensors are missing" in one_problem(single(tmp_path, {}))


def test_harmless_extras(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "lm_head.weight": torch.zeros(9, 4)}
    table = {"model.embed_tokens.weight": torch.zeros(9, 4)}
    tied = EXPECTED | {"model.embed_tokens.weight": (9, 4)}
    assert single(tmp_path / "tied", TENSORS | extra | table).problems(tied) == []
    untied = tied | {"lm_head.weight": (9, 4)}
    assert "missing: lm_head.weight" in one_problem(single(tmp_path / "untied", TENSORS | table), untied)


def test_missing_shards_are_named_without_their_tensors(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / shard_name(1)).unlink()
    (tmp_path / shard_name(3)).unlink()
    problem = one_problem(HfFolder(tmp_path))
    assert f"2 of 4 shards that {INDEX} names are missing: {shard_name(1)}, {shard_name(3)}" in problem


def test_every_broken_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    whole = (tmp_path / shard_name(0)).read_bytes()
    (tmp_path / shard_name(0)).write_bytes(whole[:-7])
    (tmp_path / shard_name(2)).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    problems = HfFolder(tmp_path).problems(EXPECTED)
    assert len(problems) == 2
    assert f"{shard_name(0)}: {len(whole) - 7:,} bytes on disk, its header says {len(whole):,}" in problems[0]
    assert "git lfs pull" in problems[1]


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    table = sharded(tmp_path)
    save_file({NAMES[4]: TENSORS[NAMES[4]]} | load_file(tmp_path / shard_name(0)), tmp_path / shard_name(0))
    text = "\n".join(HfFolder(tmp_path).problems(EXPECTED))
    assert f"1 tensor is also in another shard: {NAMES[4]}" in text
    save_file({name: TENSORS[name] for name in NAMES[1:4]}, tmp_path / shard_name(0))
    index(tmp_path, table)
    assert f"1 tensor is not in the shard it names: {NAMES[0]} ({shard_name(0)})" in one_problem(HfFolder(tmp_path))


@pytest.mark.parametrize(
    "escape", ["/etc/model.safetensors", "../model.safetensors", "a/../../b.safetensors", "a\0b", ""]
)
def test_index_that_leads_out(tmp_path: Path, escape: str) -> None:
    (tmp_path / "out").mkdir()
    single(tmp_path)
    table = sharded(tmp_path / "out")
    index(tmp_path / "out", table | {NAMES[0]: escape})
    assert any("names files outside of the folder" in p for p in HfFolder(tmp_path / "out").problems(EXPECTED))


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "real")
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in (tmp_path / "real").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / shard_name(2)).unlink()
    (folder / shard_name(2)).symlink_to(tmp_path / "real" / shard_name(2))
    assert f"{shard_name(2)}: is a link to {tmp_path / 'real'}" in one_problem(HfFolder(folder))
    (folder / INDEX).unlink()
    (folder / SINGLE).symlink_to(tmp_path / "real" / shard_name(0))
    assert "is a link to" in one_problem(HfFolder(folder))


def test_links_inside_are_fine_and_so_is_a_linked_folder(tmp_path: Path) -> None:
    sharded(tmp_path / "real")
    (tmp_path / "real/data").mkdir()
    (tmp_path / "real" / shard_name(2)).rename(tmp_path / "real/data/x")
    (tmp_path / "real" / shard_name(2)).symlink_to("data/x")
    (tmp_path / "name").symlink_to("real")
    assert HfFolder(tmp_path / "name").problems(EXPECTED) == []


def test_the_hub_cache(tmp_path: Path) -> None:
    """snapshots/COMMIT/ links into blobs/ of the same repository, and not of another."""
    mine, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = mine / "snapshots" / "0123"
    for path in (snapshot, mine / "blobs", other / "blobs"):
        path.mkdir(parents=True)
    save_file(TENSORS, mine / "blobs" / "ffff")
    save_file(TENSORS, other / "blobs" / "ffff")
    (snapshot / SINGLE).symlink_to("../../blobs/ffff")
    assert HfFolder(snapshot).problems(EXPECTED) == []
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../models--c--d/blobs/ffff")
    assert "is a link to" in one_problem(HfFolder(snapshot))


def cached(root: Path) -> Path:
    """A snapshot in a hub's cache; its blob is the file."""
    snapshot, blobs = root / "models--a--b/snapshots/0123", root / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, root / "file")
    blob = (root / "file").rename(blobs / hashlib.sha256((root / "file").read_bytes()).hexdigest())
    (snapshot / SINGLE).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_flipped_bits_of_the_hubs_files_are_found(tmp_path: Path) -> None:
    """Twenty of twenty; those in the header are found without it."""
    snapshot = cached(tmp_path)
    assert HfFolder(snapshot).damaged() == []
    blob, choose = (snapshot / SINGLE).resolve(), random.Random(0)
    right = blob.read_bytes()
    for _ in range(20):
        wrong = bytearray(right)
        wrong[choose.randrange(len(right))] ^= 1 << choose.randrange(8)
        blob.write_bytes(wrong)
        folder = HfFolder(snapshot)
        (said,) = [*folder.problems(EXPECTED), *folder.damaged()][:1]
        assert str(snapshot) in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ("[]", "no weight_map"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_broken_index(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert words in one_problem(HfFolder(tmp_path))


def test_no_weights_that_we_read(tmp_path: Path) -> None:
    assert "no such folder" in one_problem(HfFolder(tmp_path / "none"))
    assert f"neither {SINGLE} nor {INDEX}" in one_problem(HfFolder(tmp_path))
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    assert "Meta's original weights" in one_problem(HfFolder(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    problem = one_problem(HfFolder(tmp_path))
    assert "only safetensors is read" in problem
    assert f"from_pretrained('{tmp_path}').save_pretrained" in problem


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    one = single(tmp_path / "a").fingerprint
    assert one == single(tmp_path / "b").fingerprint
    assert one != single(tmp_path / "c", {name: tensor + 1e-3 for name, tensor in TENSORS.items()}).fingerprint
