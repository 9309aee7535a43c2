"""A model replaced in its folder: cut short at any step, transformers and we load the old or the new, whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM as TheirLlama

from packtrain.checkpoint import publish
from packtrain.checkpoint.folder import INDEX, SINGLE, HfFolder
from packtrain.checkpoint.hf import save_model
from packtrain.checkpoint.publish import shards_of
from packtrain.errors import Fault
from packtrain.model.llama import LlamaForCausalLM

LIMITS = {"single": 10**9, "sharded": 20_000, "finer": 12_000}


@pytest.fixture
def filled(make_ours: Any) -> Callable[[float], LlamaForCausalLM]:
    """A model of which every weight is one number."""

    def make(value: float) -> LlamaForCausalLM:
        model: LlamaForCausalLM = make_ours(device=torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data.fill_(value)
        return model

    return make


@pytest.fixture
def config(make_theirs: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(make_theirs().config.to_json_string(use_diff=False))
    return config


@contextmanager
def dies_at(step: int) -> Iterator[list[str]]:
    """The `step`-th rename, link or removal raises, as a kill would cut there; yields the steps that were made."""
    made: list[str] = []

    def wrap(function: Any, name: str) -> Any:
        def cut(*arguments: Any, **keywords: Any) -> Any:
            if len(made) == step:
                raise KeyboardInterrupt
            made.append(name)
            return function(*arguments, **keywords)

        return cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", wrap(os.replace, "replace"))
        patch.setattr(os, "link", wrap(os.link, "link"))
        patch.setattr(Path, "unlink", wrap(Path.unlink, "unlink"))
        patch.setattr(publish.Publication, "abandon", lambda self: None)  # a kill tidies nothing
        yield made


def value_of(folder: Path) -> float:
    """The one number of the model that transformers loads, and that we do."""
    theirs = TheirLlama.from_pretrained(folder)
    values = {value for tensor in theirs.state_dict().values() for value in tensor.unique().tolist()}
    ours = HfFolder(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert ours.problems(expected) == []
    values |= {v for name, shape in expected.items() for v in ours.rows(name, 0, shape[0]).unique().tolist()}
    (value,) = values
    return value


@pytest.mark.parametrize("new", ["single", "sharded"])
@pytest.mark.parametrize("old", ["single", "sharded", "finer"])
def test_cut_anywhere(old: str, new: str, tmp_path: Path, filled: Any, config: dict[str, Any]) -> None:
    step, values = 0, []
    while True:
        folder = tmp_path / str(step)
        save_model(filled(1.0), folder, config, shard_bytes=LIMITS[old])
        try:
            with dies_at(step) as made:
                save_model(filled(2.0), folder, config, shard_bytes=LIMITS[new])
        except KeyboardInterrupt:
            values.append(value_of(folder))
            step += 1
            save_model(filled(3.0), folder, config, shard_bytes=LIMITS[new])
            assert_tidy(folder, new)
            continue
        break
    assert value_of(folder) == 2.0
    assert_tidy(folder, new)
    assert step == len(made) > 0
    assert values == sorted(values), "once the new model is there, the old one does not come back"
    assert values[0] == 1.0


def assert_tidy(folder: Path, layout: str) -> None:
    names = {path.name for path in folder.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    if layout == "single":
        assert names == {"config.json", SINGLE}
    else:
        assert names == weights | {"config.json", INDEX}
        assert weights == set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        assert all(
            name.startswith("model-0000") and name.endswith(f"-of-{len(weights):05d}.safetensors") for name in weights
        )


def test_another_models_config_never_stands_beside_these_weights(
    tmp_path: Path, filled: Any, config: dict[str, Any]
) -> None:
    """Same shapes, another rope: cut anywhere, the folder holds the old pair, the new pair, or no weights."""
    other = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    step, seen = 0, set()
    while True:
        folder = tmp_path / str(step)
        save_model(filled(1.0), folder, config)
        try:
            with dies_at(step):
                save_model(filled(2.0), folder, other)
        except KeyboardInterrupt:
            theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
            pair = (theta, value_of(folder) if (folder / SINGLE).exists() else None)
            seen.add(pair)
            assert pair in {(1e4, 1.0), (1e4, None), (5e5, None), (5e5, 2.0)}
            step += 1
            continue
        break
    assert (1e4, 1.0) in seen
    assert value_of(folder) == 2.0


def test_without_hard_links(tmp_path: Path, filled: Any, config: dict[str, Any], monkeypatch: Any) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    for value in (1.0, 2.0):
        save_model(filled(value), tmp_path, config, shard_bytes=LIMITS["sharded"])
        assert value_of(tmp_path) == value
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())


@pytest.mark.parametrize("limit", LIMITS.values())
def test_a_full_disk_leaves_the_old_model(
    limit: int, tmp_path: Path, filled: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(filled(1.0), tmp_path, config, shard_bytes=limit)
    before = sorted(path.name for path in tmp_path.iterdir())
    add, calls = publish.TensorWriter.add, iter(range(100))

    def full(self: Any, *arguments: Any) -> None:
        if next(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *arguments)

    monkeypatch.setattr(publish.TensorWriter, "add", full)
    with pytest.raises(Fault, match="No space left on device"):
        save_model(filled(2.0), tmp_path, config, shard_bytes=limit)
    assert value_of(tmp_path) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_older_runs_adapter_goes(tmp_path: Path, filled: Any, config: dict[str, Any]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    save_model(filled(1.0), tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]


def test_shards_of() -> None:
    tensors = [("a", (10,)), ("b", (10,)), ("c", (50,)), ("d", (5,)), ("e", (5,))]
    names = [[name for name, _ in shard] for shard in shards_of(tensors, torch.float32, 80)]
    assert names == [["a", "b"], ["c"], ["d", "e"]]
    assert len(shards_of(tensors, torch.bfloat16, 160)) == 1


def test_pieces_of_one_parameter_may_lie_in_two_files(tmp_path: Path, filled: Any, config: dict[str, Any]) -> None:
    model = filled(1.0)
    q, k, v = (part for part in model.model.layers[0].self_attn.qkv_proj.parts)
    for i, part in enumerate((q, k, v)):
        model.model.layers[0].self_attn.qkv_proj.weight.data[part.start : part.stop] = 10.0 + i
    save_model(model, tmp_path, config, shard_bytes=2500)
    table = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    names = [f"model.layers.0.self_attn.{part.name}.weight" for part in (q, k, v)]
    assert len({table[name] for name in names}) > 1
    for i, name in enumerate(names):
        assert load_file(tmp_path / table[name])[name].unique().tolist() == [10.0 + i]
