"""Adapters against peft itself: the same names, the same logits, both ways; bad files refused whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM as TheirLlama

from packtrain.checkpoint import adapter
from packtrain.checkpoint.adapter import adapter_problems, load_adapter, read_adapter_config, save_adapter
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import load_model
from packtrain.distributed.parallelize import materialise
from packtrain.errors import Fault, UserError
from packtrain.model.llama import LlamaForCausalLM
from packtrain.peft.lora import LoraSettings, adapter_tensors, config_dict, initialise, install, settings_from
from packtrain.peft.trainable import trainable

CASES: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ("q_proj", "v_proj")},
    "rank and alpha": {"r": 3, "lora_alpha": 10, "target_modules": ("k_proj", "down_proj")},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ("up_proj", "o_proj")},
    "regex": {"target_modules": r".*\.layers\.1\.self_attn\.(q|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "path": {"target_modules": ("layers.0.mlp.gate_proj", "model.layers.1.self_attn.k_proj")},
    "head": {"target_modules": ("q_proj", "lm_head")},
    "embedding and head saved": {"modules_to_save": ("embed_tokens", "lm_head")},
    "norms saved": {"modules_to_save": ("norm",)},
    "one norm saved": {"modules_to_save": ("model.norm",)},
    "fused part saved": {"target_modules": ("v_proj",), "modules_to_save": ("q_proj", "up_proj")},
    "block saved": {"target_modules": ("q_proj",), "modules_to_save": ("layers.0.mlp", "1.self_attn.o_proj")},
    "all biases": {"target_modules": ("q_proj", "v_proj", "up_proj"), "bias": "all"},
    "biases of adapted layers": {"target_modules": ("q_proj", "v_proj", "up_proj"), "bias": "lora_only"},
    "biases and a saved part": {"modules_to_save": ("k_proj",), "bias": "lora_only"},
    "all-linear and saved": {"target_modules": "all-linear", "modules_to_save": ("down_proj",)},
}
BASE = {"attention_bias": True}

SameLogits = Callable[[nn.Module, LlamaForCausalLM], None]


def peft_model(base: Path, settings: LoraSettings) -> PeftModel:
    targets, saved = settings.target_modules, settings.modules_to_save
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(saved) or None,
        bias=settings.bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(TheirLlama.from_pretrained(base), config).eval()


def our_model(make_ours: Any, base: Path, settings: LoraSettings, tied: bool) -> LlamaForCausalLM:
    model: LlamaForCausalLM = make_ours(tie_word_embeddings=tied, **BASE)
    install(model, settings)
    materialise(model, torch.device("cpu"))
    load_model(model, HfFolder(base))
    initialise(model, seed=1)
    return model.eval()


@torch.no_grad()
def disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_peft_names_and_loads_what_we_save(
    *, case: str, tied: bool, tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any, same_logits: SameLogits
) -> None:
    settings = LoraSettings(**CASES[case])
    base = base_folders[tied]
    ours = our_model(make_ours, base, settings, tied)
    same_logits(TheirLlama.from_pretrained(base), ours)  # B is zero: nothing is added yet
    disturb(trainable(ours).values())
    save_adapter(ours, tmp_path / "ours", config_dict(settings, str(base)))

    peft_model(base, settings).save_pretrained(tmp_path / "peft")
    theirs = {name: t.shape for name, t in load_file(tmp_path / "peft/adapter_model.safetensors").items()}
    # peft puts the frozen head's own weight beside a LoRA on it; it is the base model's, and not needed to load
    theirs.pop("base_model.model.lm_head.base_layer.weight", None)
    assert {name: t.shape for name, t in load_file(tmp_path / "ours/adapter_model.safetensors").items()} == theirs

    loaded = PeftModel.from_pretrained(TheirLlama.from_pretrained(base), tmp_path / "ours").eval()
    same_logits(loaded, ours)
    with pytest.raises(AssertionError):
        same_logits(TheirLlama.from_pretrained(base), ours)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "all-linear and saved"])
def test_we_load_what_peft_saves(
    *, case: str, tied: bool, tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any, same_logits: SameLogits
) -> None:
    base = base_folders[tied]
    theirs = peft_model(base, LoraSettings(**CASES[case]))
    disturb(p for p in theirs.parameters() if p.requires_grad)
    if tied and case == "embedding and head saved":
        theirs.base_model.model.lm_head.weight.data.copy_(theirs.base_model.model.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path)

    settings = settings_from(read_adapter_config(tmp_path))
    ours = our_model(make_ours, base, settings, tied)
    load_adapter(ours, tmp_path)
    same_logits(theirs, ours)


def saved_adapter(folder: Path, base: Path, make_ours: Any, tied: bool = False, **settings: Any) -> LlamaForCausalLM:
    ours = our_model(make_ours, base, LoraSettings(**settings), tied)
    disturb(trainable(ours).values())
    save_adapter(ours, folder, config_dict(LoraSettings(**settings), "some/model"))
    return ours


def test_round_trip_is_exact_and_fp32(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    settings = {"modules_to_save": ("embed_tokens", "lm_head", "norm")}
    ours = saved_adapter(tmp_path, base_folders[False], make_ours, **settings)
    again = our_model(make_ours, base_folders[False], LoraSettings(**settings), False)
    load_adapter(again, tmp_path)
    for name, parameter in trainable(ours).items():
        assert torch.equal(parameter, trainable(again)[name]), name
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert read_adapter_config(tmp_path)["base_model_name_or_path"] == "some/model"
    assert settings_from(read_adapter_config(tmp_path)) == LoraSettings(**settings)


def test_each_rank_takes_its_rows(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    ours = saved_adapter(tmp_path, base_folders[False], make_ours, target_modules=("q_proj", "down_proj"))
    again = our_model(make_ours, base_folders[False], LoraSettings(target_modules=("q_proj", "down_proj")), False)
    for rank in range(3):

        def third(parameter: torch.Tensor, rank: int = rank) -> tuple[torch.Tensor, int]:
            rows = -(-parameter.shape[0] // 3)
            return parameter.detach()[rank * rows : (rank + 1) * rows], min(rank * rows, parameter.shape[0])

        load_adapter(again, tmp_path, third)
        whole = [torch.equal(p, trainable(again)[name]) for name, p in trainable(ours).items()]
        assert all(whole) == (rank == 2)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_all_that_does_not_fit_is_one_error(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    ours = saved_adapter(tmp_path, base_folders[False], make_ours)
    stem = "base_model.model.model.layers.0.self_attn."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{stem}q_proj.lora_A.weight"]
        tensors[f"{stem}k_proj.lora_A.weight"] = torch.zeros(8, 32)
        tensors[f"{stem}v_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{stem}v_proj.lora_B.weight"] = torch.zeros(16, 8, dtype=torch.int32)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_adapter(ours, tmp_path)
    (problem,) = caught.value.problems
    assert f"1 tensor is missing: {stem}q_proj.lora_A.weight" in problem
    assert f"1 tensor is not of this adapter: {stem}k_proj.lora_A.weight" in problem
    assert f"{stem}v_proj.lora_A.weight is [4, 32], expected [8, 32]" in problem
    assert f"{stem}v_proj.lora_B.weight is I32" in problem


def test_pickles_missing_and_broken_files_are_refused(
    tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any
) -> None:
    ours = saved_adapter(tmp_path / "good", base_folders[False], make_ours)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "pickled" in adapter_problems(ours, pickled)[0]
    (tmp_path / "empty").mkdir()
    assert "no such file" in adapter_problems(ours, tmp_path / "empty")[0]
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read_adapter_config(pickled)
    weights = tmp_path / "good/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "bytes on disk" in adapter_problems(ours, tmp_path / "good")[0]
    (tmp_path / "good/adapter_config.json").write_text('{"r": 8, "r": 16}')
    with pytest.raises(UserError, match="there twice"):
        read_adapter_config(tmp_path / "good")


def test_tied_weights_trained_apart_are_refused(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    settings = {"modules_to_save": ("embed_tokens", "lm_head")}
    ours = saved_adapter(tmp_path, base_folders[True], make_ours, tied=True, **settings)
    load_adapter(ours, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_adapter(ours, tmp_path)


def test_another_base_models_head_is_refused(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    settings = LoraSettings(target_modules=("lm_head",))
    peft_model(base_folders[False], settings).save_pretrained(tmp_path)
    ours = our_model(make_ours, base_folders[False], settings, False)
    load_adapter(ours, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].add_(0.1))
    with pytest.raises(UserError, match="another base model"):
        load_adapter(ours, tmp_path)


def test_what_is_read_back_is_compared(
    tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk keeps something else than was written: no adapter appears, and the old one stays."""
    ours = saved_adapter(tmp_path, base_folders[False], make_ours)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    disturb(trainable(ours).values())
    add = adapter.TensorWriter.add

    def worn_disk(self: Any, name: str, tensor: torch.Tensor) -> None:
        damaged = tensor.clone()
        damaged.view(-1)[-1] += 1e-6
        add(self, name, damaged if "layers.1.self_attn.v_proj.lora_B" in name else tensor)

    monkeypatch.setattr(adapter.TensorWriter, "add", worn_disk)
    with pytest.raises(Fault, match=r"layers\.1\.self_attn\.v_proj\.lora_B"):
        save_adapter(ours, tmp_path, config_dict(LoraSettings(), "some/model"))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_kill_never_leaves_two_adapters_mixed(
    failing: int, tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adapter over an old one, whose first or second rename fails: no weights beside a foreign config."""
    saved_adapter(tmp_path, base_folders[False], make_ours)
    other = our_model(make_ours, base_folders[False], LoraSettings(r=4), False)
    rename, calls = os.replace, iter(range(100))

    def dies(*paths: Any) -> None:
        if next(calls) == failing:
            raise OSError("killed")
        rename(*paths)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Fault, match="killed"):
        save_adapter(other, tmp_path, config_dict(LoraSettings(r=4), "some/model"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    monkeypatch.setattr(os, "replace", rename)
    save_adapter(other, tmp_path, config_dict(LoraSettings(r=4), "some/model"))
    assert adapter_problems(other, tmp_path) == []


def test_ranks_that_do_not_lead_write_nothing(tmp_path: Path, base_folders: dict[bool, Path], make_ours: Any) -> None:
    ours = our_model(make_ours, base_folders[False], LoraSettings(), False)
    save_adapter(ours, tmp_path / "out", config_dict(LoraSettings(), "some/model"), leads=False)
    assert not (tmp_path / "out").exists()


def test_tied_weight_is_one_parameter_under_two_names(base_folders: dict[bool, Path], make_ours: Any) -> None:
    settings = replace(LoraSettings(), modules_to_save=("embed_tokens", "lm_head"))
    ours = our_model(make_ours, base_folders[True], settings, True)
    table = adapter_tensors(ours)
    assert table["base_model.model.lm_head.weight"] == table["base_model.model.model.embed_tokens.weight"]
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
