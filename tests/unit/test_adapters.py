"""Which adapter a run trains, from flags and saved folders."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from packtrain import log
from packtrain.adapters import chosen, problems
from packtrain.configs.parse import parse
from packtrain.errors import UserError
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.peft import LlamaAdapterSettings, LoraSettings, PrefixSettings, name_of
from packtrain.peft.llama_adapter import config_dict

CONFIG = LlamaConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
PREFIX = PrefixSettings(num_virtual_tokens=30, num_layers=3, num_attention_heads=2, token_dim=16)


def flags(line: str) -> Any:
    return parse(["--model_name", "DIR", "--output_dir", "OUT", *shlex.split(line)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LLaMA-Adapter's configuration, of two layers."""
    config = config_dict(LlamaAdapterSettings(adapter_len=4, adapter_layers=2), "some/model")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", None),
        ("--use_peft", LoraSettings()),
        ("--use_peft --r 4 --target_modules all-linear", LoraSettings(r=4, target_modules="all-linear")),
        ("--use_peft --peft_method llama_adapter", LlamaAdapterSettings(adapter_len=10, adapter_layers=3)),
        (
            "--use_peft --peft_method llama_adapter --adapter_len 2 --adapter_layers 1",
            LlamaAdapterSettings(adapter_len=2, adapter_layers=1),
        ),
        ("--use_peft --peft_method prefix", PREFIX),
    ],
)
def test_flags_choose(line: str, expected: Any) -> None:
    assert chosen(flags(line), CONFIG) == (expected, None)


def test_more_layers_than_there_are_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """llama-recipes' default, where peft ends with an error."""
    monkeypatch.setattr(log, "_said", set())
    chosen(flags("--use_peft --peft_method llama_adapter"), CONFIG)
    chosen(flags("--use_peft --peft_method llama_adapter --adapter_layers 2"), CONFIG)
    said = capsys.readouterr().err
    assert said == "--adapter_layers: 30 layers are more than the model has; all its 3 get a prompt\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--peft_method llama_adapter",
        "--peft_method llama_adapter --adapter_len 4",
        "--peft_method llama_adapter --adapter_layers 2",
    ],
)
def test_a_saved_adapter_wins(line: str, saved: Path) -> None:
    """Whatever it is: --peft_method need not say it again."""
    settings, folder = chosen(flags(f"--use_peft --from_peft_checkpoint {saved} {line}"), CONFIG)
    assert settings == LlamaAdapterSettings(adapter_len=4, adapter_layers=2)
    assert name_of(settings) == "llama_adapter"
    assert folder == saved


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--peft_method prefix", "--peft_method: is prefix, and the adapter in {} was trained with llama_adapter"),
        (
            "--peft_method llama_adapter --adapter_len 5",
            "--adapter_len: is 5, and the adapter in {} was trained with 4",
        ),
        ("--peft_method lora --r 4", "--peft_method: is lora, and the adapter in {} was trained with llama_adapter"),
        (
            "--peft_method llama_adapter --adapter_layers 3",
            "--adapter_layers: is 3, and the adapter in {} was trained with 2",
        ),
    ],
)
def test_a_flag_at_odds_with_a_saved_adapter(line: str, words: str, saved: Path) -> None:
    with pytest.raises(UserError) as error:
        chosen(flags(f"--use_peft --from_peft_checkpoint {saved} {line}"), CONFIG)
    (problem,) = error.value.problems
    assert problem.startswith(words.format(saved))


def test_a_runs_own_file_is_not_at_odds(saved: Path, tmp_path: Path) -> None:
    """run/config.yaml lists every default, as if somebody had asked for it."""
    cfg = flags(f"--use_peft --from_peft_checkpoint {saved}")
    cfg.write(tmp_path / "config.yaml")
    again = parse([str(tmp_path / "config.yaml")])
    assert again.typed("train_config.peft_method")
    assert chosen(again, CONFIG) == chosen(cfg, CONFIG)


def skeleton(**changes: Any) -> LlamaForCausalLM:
    values = {
        name: getattr(CONFIG, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    config = LlamaConfig.from_dict({"model_type": "llama", **values, **changes})
    return LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("meta"))


def test_problems_begin_with_flag_or_file(saved: Path) -> None:
    cfg = flags("--use_peft --peft_method llama_adapter")
    two = LlamaAdapterSettings(adapter_len=4, adapter_layers=2)
    (found,) = problems(cfg, skeleton(attention_bias=True), two, None)
    assert found.startswith("--peft_method: llama_adapter is not for a model with attention biases")
    (found,) = problems(cfg, skeleton(num_hidden_layers=1), two, saved)
    assert found == f"{saved / 'adapter_config.json'}: adapter_layers: 2; expected no more than the model's 1"
    (found,) = problems(cfg, skeleton(), LoraSettings(r=0), None)
    assert found.startswith("--r: 0; expected a rank of at least 1")
    (found,) = problems(cfg, skeleton(), LoraSettings(modules_to_save=("q_proj",)), None)
    assert found.startswith("--lora_config.target_modules and modules_to_save both name q_proj")
    (found,) = problems(cfg, skeleton(), two, saved)
    assert "adapter_model.safetensors" in found
