"""adapter_config.json: what peft writes is read, what we do not do is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from packtrain.errors import UserError
from packtrain.peft.settings import LoraSettings, config_dict, settings_from


def peft_json(folder: Path, **settings: Any) -> dict[str, Any]:
    LoraConfig(**({"target_modules": ["q_proj"]} | settings)).save_pretrained(folder)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 16, "lora_alpha": 64, "target_modules": ["q_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
        {"target_modules": "all-linear", "use_rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": r".*\.(q|v)_proj", "init_lora_weights": "gaussian", "inference_mode": True},
    ],
)
def test_reads_what_peft_writes(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = settings_from(peft_json(tmp_path, **settings))
    theirs = LoraConfig(**settings)
    targets = settings["target_modules"]
    assert found == LoraSettings(
        r=theirs.r,
        lora_alpha=theirs.lora_alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        lora_dropout=theirs.lora_dropout,
        use_rslora=theirs.use_rslora,
        modules_to_save=tuple(settings.get("modules_to_save", ())),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "some"),
        ("layers_to_transform", [0]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("trainable_token_indices", [1, 2]),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["layers.0"]),
        ("task_type", "SEQ_CLS"),
        ("ensure_weight_tying", True),
        ("lora_bias", True),
        ("peft_type", "IA3"),
        ("something_new", 3),
    ],
)
def test_refuses_what_we_do_not_do(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        settings_from(peft_json(tmp_path) | {key: value}, "DIR/adapter_config.json")
    assert [problem for problem in caught.value.problems if f"DIR/adapter_config.json: {key} is " in problem]


def test_defaults_of_unknown_keys_are_fine(tmp_path: Path) -> None:
    assert settings_from(peft_json(tmp_path) | {"something_new": None, "another": {}, "third": False}).r == 8


def test_what_the_file_leaves_out_is_pefts_default() -> None:
    bare = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    expected = LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj",), lora_dropout=LoraConfig().lora_dropout)
    assert settings_from(bare) == expected


def test_all_problems_at_once(tmp_path: Path) -> None:
    config = peft_json(tmp_path) | {"r": "8", "use_dora": True, "lora_dropout": None, "target_modules": None}
    del config["lora_alpha"]
    with pytest.raises(UserError) as caught:
        settings_from(config)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    assert "r is '8'; expected a whole number" in text
    assert "no lora_alpha" in text


def test_peft_reads_what_we_write(tmp_path: Path) -> None:
    settings = LoraSettings(r=4, lora_alpha=6.5, target_modules=("v_proj", "q_proj"), modules_to_save=("norm",))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config_dict(settings, "meta-llama/Llama-3.1-8B")))
    theirs = LoraConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.target_modules) == (4, 6.5, {"q_proj", "v_proj"})
    assert (theirs.modules_to_save, theirs.base_model_name_or_path) == (["norm"], "meta-llama/Llama-3.1-8B")
    assert settings_from(config_dict(settings, "x")) == settings
    assert config_dict(LoraSettings(lora_alpha=32.0), "x")["lora_alpha"].__class__ is int


def test_scale() -> None:
    assert LoraSettings(r=16, lora_alpha=32).scale == 2.0
    assert LoraSettings(r=16, lora_alpha=32, use_rslora=True).scale == 8.0
