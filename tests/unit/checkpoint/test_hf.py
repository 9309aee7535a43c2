"""Weights in and out of a Hugging Face folder, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers import LlamaForCausalLM as TheirLlama

from packtrain.checkpoint import hf
from packtrain.checkpoint.folder import INDEX, SINGLE, HfFolder
from packtrain.checkpoint.hf import copy_side_files, expected_shapes, load_model, mirror, save_model
from packtrain.distributed.parallelize import materialise
from packtrain.errors import UserError
from packtrain.model.linear import layout
from packtrain.model.llama import LlamaForCausalLM
from packtrain.peft.lora import LoraSettings, install

CPU = torch.device("cpu")
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def loaded(make_ours: Any, folder: Path, **config: Any) -> LlamaForCausalLM:
    model: LlamaForCausalLM = make_ours(**config)
    materialise(model, CPU)
    load_model(model, HfFolder(folder))
    return model


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}],
    ids=["plain", "tied", "biases"],
)
def test_load_gives_transformers_logits(
    *, config: dict[str, Any], shard_size: str, tmp_path: Path, make_theirs: Any, make_ours: Any, same_logits: Any
) -> None:
    theirs = make_theirs(**config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    ours = make_ours(**config)
    assert HfFolder(tmp_path).problems(expected_shapes(ours)) == []
    same_logits(theirs, loaded(make_ours, tmp_path, **config))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_every_dtype_into_every_dtype(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path, make_theirs: Any, make_ours: Any
) -> None:
    theirs = make_theirs().to(stored)
    theirs.save_pretrained(tmp_path)
    ours = loaded(make_ours, tmp_path, dtype=wanted)
    parameters = dict(ours.named_parameters())
    for name, pieces in layout(ours).items():
        assert parameters[name].dtype == wanted
        expected = torch.cat([theirs.state_dict()[piece.name] for piece in pieces])
        assert torch.equal(parameters[name], expected.to(wanted)), name


def shards(ranks: int) -> list[Callable[[Tensor], tuple[Tensor, int]]]:
    """What local_rows gives on each of `ranks` ranks, whose rows are all in one process here."""

    def of(rank: int) -> Callable[[Tensor], tuple[Tensor, int]]:
        def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
            rows = -(-parameter.shape[0] // ranks)
            first = min(rank * rows, parameter.shape[0])
            return parameter.detach()[first : first + rows], first

        return local_rows

    return [of(rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_a_rank_reads_its_rows_and_no_other(
    *, ranks: int, tmp_path: Path, make_theirs: Any, make_ours: Any, monkeypatch: pytest.MonkeyPatch, same_logits: Any
) -> None:
    """Counted at the file: every row once over all ranks, in pieces of at most STREAM_BYTES."""
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path)
    ours = make_ours()
    materialise(ours, CPU)
    folder = HfFolder(tmp_path)
    read: dict[str, list[int]] = {}
    rows = folder.rows

    def counted(name: str, start: int, stop: int) -> Tensor:
        read.setdefault(name, []).extend(range(start, stop))
        tensor = rows(name, start, stop)
        assert tensor.nbytes <= 512
        return tensor

    monkeypatch.setattr(folder, "rows", counted)
    monkeypatch.setattr(hf, "STREAM_BYTES", 512)
    for rank, local_rows in enumerate(shards(ranks)):
        load_model(ours, folder, local_rows)
        share = sum(map(len, read.values())) / sum(shape[0] for shape in expected_shapes(ours).values())
        assert share == pytest.approx((rank + 1) / ranks, abs=0.1)
    assert {name: sorted(r) for name, r in read.items()} == {
        name: list(range(shape[0])) for name, shape in expected_shapes(ours).items()
    }
    same_logits(theirs, ours)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old(
    tied: bool, tmp_path: Path, make_theirs: Any, make_ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_theirs(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(hf, "STREAM_BYTES", 1000)
    ours = make_ours(tie_word_embeddings=tied, vocab_size=79)
    materialise(ours, CPU)
    for local_rows in shards(3):
        said = load_model(ours, HfFolder(tmp_path), local_rows)
        names = [TABLE] if tied else [TABLE, HEAD]
        assert said == [f"{n} grew from 72 to 79 rows; each new row is the mean of the old" for n in names]
    for table, old in (
        (ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (ours.lm_head.weight, theirs.lm_head.weight),
    ):
        assert torch.equal(table[:72], old)
        mean = old.double().mean(0).float()
        assert torch.allclose(table[72:], mean.expand(7, -1), atol=1e-7)


def test_fewer_rows_than_the_file_is_an_error(tmp_path: Path, make_theirs: Any, make_ours: Any) -> None:
    make_theirs().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \[72, 32\], expected \[71, 32\]"):
        loaded(make_ours, tmp_path, vocab_size=71)


def test_config_and_weights_of_two_models(tmp_path: Path, make_theirs: Any, make_ours: Any) -> None:
    make_theirs(num_hidden_layers=3, intermediate_size=48).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        loaded(make_ours, tmp_path)
    extra, shapes = caught.value.problems
    assert "9 tensors are not of this model: model.layers.2." in extra
    assert "6 tensors are of the wrong shape" in shapes


def test_a_model_on_meta_is_refused(tmp_path: Path, make_theirs: Any, make_ours: Any) -> None:
    make_theirs().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="still on meta"):
        load_model(make_ours(), HfFolder(tmp_path))


def test_a_tied_models_head_in_the_file(tmp_path: Path, make_theirs: Any, make_ours: Any, same_logits: Any) -> None:
    """Some files hold it: the same values are fine, others mean that the config is wrong (transformers unties then)."""
    theirs = make_theirs(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors | {HEAD: tensors[TABLE].clone()}, tmp_path / SINGLE)
    same_logits(theirs, loaded(make_ours, tmp_path, tie_word_embeddings=True))
    changed = tensors[TABLE].clone()
    changed[70, 3] += 1e-3
    save_file(tensors | {HEAD: changed}, tmp_path / SINGLE)
    with pytest.raises(UserError, match='"tie_word_embeddings": false'):
        loaded(make_ours, tmp_path, tie_word_embeddings=True)


def test_layers_trained_whole_start_from_the_file(tmp_path: Path, make_theirs: Any, make_ours: Any) -> None:
    theirs = make_theirs(attention_bias=True).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = make_ours(dtype=torch.bfloat16, attention_bias=True)
    install(ours, LoraSettings(modules_to_save=("k_proj", "embed_tokens", "lm_head")))
    materialise(ours, CPU)
    load_model(ours, HfFolder(tmp_path))
    copy = ours.model.layers[1].self_attn.qkv_proj.adapters["k_proj"]
    expected = theirs.model.layers[1].self_attn.k_proj
    assert torch.equal(copy.weight, expected.weight.float())
    assert torch.equal(copy.bias, expected.bias.float())
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight.float())


def config_json(model: TheirLlama) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config


@pytest.mark.parametrize("limit", [5_000_000_000, 20_000])
@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=["", "tied", "bias"]
)
def test_transformers_loads_what_we_save(
    *, config: dict[str, Any], limit: int, tmp_path: Path, make_theirs: Any, make_ours: Any, same_logits: Any
) -> None:
    theirs = make_theirs(**config)
    theirs.save_pretrained(tmp_path / "in")
    ours = loaded(make_ours, tmp_path / "in", **config)
    save_model(ours, tmp_path / "out", config_json(theirs), shard_bytes=limit)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert (SINGLE in names) == (limit > 20_000)
    assert (INDEX in names) == (limit == 20_000)
    if limit == 20_000:
        files = sorted(name for name in names if name.endswith(".safetensors"))
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert all((tmp_path / "out" / name).stat().st_size < 22_000 for name in files)
    again = TheirLlama.from_pretrained(tmp_path / "out")
    same_logits(again, ours)
    for name, tensor in weights_of(tmp_path / "in").items():
        assert torch.equal(weights_of(tmp_path / "out")[name], tensor)
    same_logits(again, loaded(make_ours, tmp_path / "out", **config))


def test_saved_config_has_the_models_dtype_and_rows(tmp_path: Path, make_theirs: Any, make_ours: Any) -> None:
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path / "in")
    ours = loaded(make_ours, tmp_path / "in", dtype=torch.bfloat16, vocab_size=75)
    save_model(ours, tmp_path / "out", config_json(theirs))
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert (raw["dtype"], raw["torch_dtype"], raw["vocab_size"]) == ("bfloat16", "bfloat16", 75)
    again = TheirLlama.from_pretrained(tmp_path / "out", dtype="auto")
    assert (again.dtype, again.get_input_embeddings().num_embeddings) == (torch.bfloat16, 75)
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 32
    save_model(ours, tmp_path / "fp32", config_json(theirs), dtype=torch.float32)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "fp32").values()} == {torch.float32}


def test_ranks_that_do_not_lead_write_nothing_but_gather(
    tmp_path: Path, make_theirs: Any, make_ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path / "in")
    ours = loaded(make_ours, tmp_path / "in")
    gathered: list[Tensor] = []
    monkeypatch.setattr(hf, "gather", lambda parameter: gathered.append(parameter) or parameter.detach())
    save_model(ours, tmp_path / "out", config_json(theirs), leads=False)
    assert len(gathered) == len(list(ours.parameters()))
    assert not (tmp_path / "out").exists()


def test_side_files(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "blobs").mkdir(parents=True)
    out.mkdir()
    (source / "blobs/x").write_text("{}")
    (source / "tokenizer.json").symlink_to("blobs/x")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    (source / "config.json").write_text("{}")
    (source / "README.md").write_text("of another model")
    copy_side_files(source, out)
    assert sorted(path.name for path in out.iterdir()) == ["generation_config.json", "tokenizer.json"]
    assert not (out / "tokenizer.json").is_symlink()
    other = tmp_path / "with a tokenizer of its own"
    other.mkdir()
    copy_side_files(source, other, tokenizer=False)
    assert [path.name for path in other.iterdir()] == ["generation_config.json"]
    copy_side_files(out, out)
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 2}'


def fill(out: Path, text: str) -> None:
    for name in (SINGLE, "config.json", "tokenizer.json", "adapter_config.json"):
        (out / f"{name}.new").write_text(text)
        (out / f"{name}.new").rename(out / name)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_mirror(tmp_path: Path) -> None:
    fill(tmp_path, "first")
    (tmp_path / "run").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    mirror(tmp_path, tmp_path / "best")
    best = contents(tmp_path / "best")
    assert best == dict.fromkeys((SINGLE, "config.json", "tokenizer.json", "adapter_config.json"), "first")
    assert (tmp_path / "best" / SINGLE).stat().st_ino == (tmp_path / SINGLE).stat().st_ino
    fill(tmp_path, "second")
    assert contents(tmp_path / "best") == best
    mirror(tmp_path, tmp_path / "best")
    assert set(contents(tmp_path / "best").values()) == {"second"}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["best", "run"]


def test_mirror_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", no_links)
    fill(tmp_path, "first")
    mirror(tmp_path, tmp_path / "best")
    assert contents(tmp_path / "best")[SINGLE] == "first"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_kill_between_the_renames_of_mirror_loses_nothing(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "first")
    mirror(tmp_path, tmp_path / "best")
    fill(tmp_path, "second")
    rename, calls = Path.rename, iter(range(10))

    def dies(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise OSError("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(OSError, match="killed"):
        mirror(tmp_path, tmp_path / "best")
    monkeypatch.setattr(Path, "rename", rename)
    left = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert any(set(contents(p).values()) == {"first"} for p in left)
    mirror(tmp_path, tmp_path / "best")
    assert set(contents(tmp_path / "best").values()) == {"second"}
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["best"]
