"""config.json of every Llama is read as transformers reads it; all that is wrong is said at once."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from transformers import LlamaConfig as TheirConfig

from packtrain.errors import UserError
from packtrain.model.config import LlamaConfig, problems, unknown_keys
from packtrain.model.rope import RopeParameters

LLAMA_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
READ = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range")
READ += ("tie_word_embeddings", "attention_bias", "mlp_bias", "pad_token_id", "vocab_size", "intermediate_size")


@pytest.mark.parametrize("values", [LLAMA_2, LLAMA_3_2], ids=["llama 2", "llama 3.2"])
@pytest.mark.parametrize("saved_again", [False, True])
def test_reads_what_transformers_reads(values: dict[str, Any], saved_again: bool) -> None:
    theirs = TheirConfig.from_dict(deepcopy(values))
    config = LlamaConfig.from_dict(theirs.to_dict() if saved_again else values)
    assert {name: getattr(config, name) for name in READ} == {name: getattr(theirs, name) for name in READ}
    rope = {name: getattr(config.rope_parameters, name) for name in theirs.rope_parameters}
    assert rope == theirs.rope_parameters
    assert unknown_keys(values) == []


def test_defaults_are_transformers() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig.from_dict({"model_type": "llama", **{name: LLAMA_2[name] for name in sizes}})
    theirs = TheirConfig()
    assert {name: getattr(config, name) for name in READ} == {name: getattr(theirs, name) for name in READ}
    assert config.rope_parameters == RopeParameters("default", 10000.0)


def test_llama_3_of_before_lengths_were_saved_takes_the_models_length() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig.from_dict({**LLAMA_2, "rope_scaling": scaling})
    assert config.rope_parameters.original_max_position_embeddings == 4096


@pytest.mark.parametrize("model_type", ["mistral", "mllama", "llama4", "qwen2", None])
def test_another_model_is_refused_in_one_sentence(model_type: str | None) -> None:
    values = {"model_type": model_type, "hidden_act": "gelu", "architectures": ["SomeForCausalLM"]}
    (problem,) = problems(values)
    assert repr(model_type) in problem
    assert "'llama'" in problem


def test_a_llama_for_another_purpose_is_refused() -> None:
    (problem,) = problems({**LLAMA_2, "architectures": ["LlamaForSequenceClassification"]})
    assert "LlamaForSequenceClassification" in problem


def test_a_config_without_model_type_is_known_by_its_architecture() -> None:
    values = {**LLAMA_2, "architectures": ["LLaMAForCausalLM"]}
    del values["model_type"]
    assert problems(values) == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is 'gptq'"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type is 'longrope'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor is None"),
    "small factor": ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor is 0.5"),
    "llama3 in part": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "high_freq_factor is None",
    ),
    "llama3 the wrong way": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "low_freq_factor 4 is not below high_freq_factor 1",
    ),
    "rope a list": ({"rope_scaling": [1]}, "rope_scaling is [1]"),
    "theta": ({"rope_theta": "10000"}, "rope_theta is '10000'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial rotary in rope": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "a text": ({"vocab_size": "32000"}, "vocab_size is '32000'"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a boolean": ({"num_attention_heads": True}, "num_attention_heads is True"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    "heads": ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
    "odd head": ({"head_dim": 7}, "head_dim is 7"),
    "width": ({"hidden_size": 4097}, "hidden_size 4097 is not a multiple"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str) -> None:
    changed, words = WRONG[case]
    (problem,) = problems({**LLAMA_2, **changed})
    assert problem.startswith("config.json: ")
    assert words in problem
    assert "expected" in problem or "is not" in problem


def test_all_problems_come_in_one_error() -> None:
    cases = ("activation", "yarn", "zero", "quantised", "a text")
    values = dict(LLAMA_2)
    for case in cases:
        values |= WRONG[case][0]
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_dict(values, source="tiny.json")
    assert len(caught.value.problems) == len(cases)
    for case in cases:
        assert any(p.startswith("tiny.json: ") and WRONG[case][1] in p for p in caught.value.problems)


def test_unknown_keys_are_listed_and_ignored() -> None:
    values = {**LLAMA_2, "zebra": 1, "auto_map": {}}
    assert unknown_keys(values) == ["auto_map", "zebra"]
    assert LlamaConfig.from_dict(values) == LlamaConfig.from_dict(LLAMA_2)


def test_a_pad_token_that_is_no_row_is_left_alone() -> None:
    rows = [LlamaConfig.from_dict({**LLAMA_2, "pad_token_id": token}).padding_row for token in (None, 0, -1, 32000)]
    assert rows == [None, 0, -1, None]
