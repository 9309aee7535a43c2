"""Prefix tuning against peft: the same numbers, position by position, the same file, and all of it learns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from packtrain import peft
from packtrain.checkpoint.adapter import adapter_problems, load_adapter, read_adapter_config, save_adapter
from packtrain.errors import UserError
from packtrain.kernels.attention import attention
from packtrain.model.llama import blocks
from packtrain.peft.prefix import (
    PrefixSettings,
    adapter_tensors,
    config_dict,
    fit,
    initialise,
    install,
    problems,
    settings_from,
)
from packtrain.peft.trainable import frozen, trainable

TOKENS = 5
SETTINGS = PrefixSettings(num_virtual_tokens=TOKENS)
LENGTHS = (9, 4, 13, 2)
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
"""Frequencies by the length, virtual tokens included; transformers keeps the longest one's for what comes after."""
CONFIGS: list[dict[str, Any]] = [
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "attention_bias": True},
    {"head_dim": 16},
]


def adapted(model: Any, settings: PrefixSettings = SETTINGS) -> Any:
    install(model, settings)
    initialise(model, seed=7)
    return model


def peft_model(theirs: Any) -> Any:
    return get_peft_model(theirs, PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")).eval()


def largest(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_save(config: dict[str, Any], twins: Any, tools: Any, tmp_path: Path) -> None:
    """Each packed document as peft has it alone: the same prefix, and positions from 5 on."""
    pair = twins(**config)
    documents = pair.documents(*LENGTHS)
    base = [pair.their_logits(pair.theirs, ids).detach() for ids in documents]
    ours = adapted(pair.ours)
    save_adapter(ours, tmp_path, config_dict(fit(SETTINGS, ours.config), "some/model"))
    loaded = PeftModel.from_pretrained(pair.theirs, tmp_path).eval()
    packed = ours(tools.rows_of(documents, packed=True), logits=True)[0].split(LENGTHS)
    padded = ours(tools.rows_of(documents, packed=False), logits=True)
    for i, ids in enumerate(documents):
        expected = pair.their_logits(loaded, ids)
        assert largest(packed[i], expected) <= 1e-5
        assert largest(padded[i, : len(ids)], expected) <= 1e-5
        assert largest(base[i], expected) > 1e-3, "the adapter does nothing, so equality would prove nothing"


@pytest.mark.parametrize("config", [*CONFIGS, DYNAMIC])
def test_we_load_what_peft_saves(config: dict[str, Any], twins: Any, tools: Any, tmp_path: Path) -> None:
    pair = twins(**config)
    theirs = peft_model(pair.theirs)
    theirs.save_pretrained(tmp_path)
    settings = peft.settings_from(read_adapter_config(tmp_path))
    assert settings == fit(SETTINGS, pair.ours.config)
    ours = adapted(pair.ours, settings)
    load_adapter(ours, tmp_path)
    (ids,) = pair.documents(11)
    assert largest(ours(tools.rows_of([ids], packed=True), logits=True)[0], pair.their_logits(theirs, ids)) <= 1e-5


def test_padded_rows_are_pefts_with_a_mask(twins: Any, tools: Any) -> None:
    """Its way to train a batch: rows padded on the right, a mask, no position ids."""
    pair = twins()
    theirs, ours = peft_model(pair.theirs), adapted(pair.ours)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(side_by_side(ours))
    documents = pair.documents(*LENGTHS)
    batch = tools.rows_of(documents, packed=False)
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    expected, found = theirs(batch.ids, attention_mask=mask).logits, ours(batch, logits=True)
    for row, length in enumerate(LENGTHS):
        assert largest(found[row, :length], expected[row, :length]) <= 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex"])
@torch.no_grad()
def test_every_attention_kernel_gives_pefts_numbers(kernel: str, packed: bool, twins: Any, tools: Any) -> None:
    pair = twins()
    theirs, ours = peft_model(pair.theirs), adapted(pair.ours)
    theirs.prompt_encoder["default"].embedding.weight.copy_(side_by_side(ours))
    documents = pair.documents(*LENGTHS)
    ours.model.kernel = kernel
    expected = pair.their_loss(theirs, documents)
    assert ours(tools.rows_of(documents, packed)).item() == pytest.approx(expected.item(), rel=1e-5)


def side_by_side(model: Any) -> Tensor:
    return torch.cat([layer.self_attn.prompt.past_key_values for layer in model.model.layers], dim=1)


def test_gradients_are_pefts_packed_and_padded_recomputed_or_not(twins: Any, tools: Any) -> None:
    pair = twins()
    documents = pair.documents(*LENGTHS)
    ours, theirs = adapted(pair.ours), peft_model(pair.theirs)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(side_by_side(ours))
    loss = pair.their_loss(theirs, documents)
    loss.backward()
    assert embedding.grad.abs().max() > 1e-2
    for packed in (True, False):
        for recompute in (False, True):
            ours.train()
            for block in blocks(ours):
                block.recompute = recompute
            found = ours(tools.rows_of(documents, packed))
            assert found.item() == pytest.approx(loss.item(), rel=1e-5)
            gradient = torch.cat(list(tools.gradients(ours, found).values()), dim=1)
            assert largest(gradient, embedding.grad) < 1e-5


def test_documents_that_begin_at_zero_are_noticed(twins: Any, tools: Any) -> None:
    """Keys of the prefix are not turned, so a query's own position counts."""
    pair = twins()
    theirs, ours = peft_model(pair.theirs), adapted(pair.ours)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(side_by_side(ours))
    (ids,) = pair.documents(11)
    batch = tools.rows_of([ids], packed=True)
    assert ours.model.first_position == TOKENS
    ours.model.first_position = 0
    assert largest(ours(batch, logits=True)[0], pair.their_logits(theirs, ids)) > 1e-3


def test_the_files_are_pefts(twins: Any, tmp_path: Path) -> None:
    pair = twins(head_dim=16)
    ours = adapted(pair.ours)
    save_adapter(ours, tmp_path / "ours", config_dict(fit(SETTINGS, ours.config), "some/model"))
    peft_model(pair.theirs).save_pretrained(tmp_path / "peft")
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    written, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft"))
    assert written.pop("base_model_name_or_path") == "some/model"
    assert {key: expected[key] for key in written} == written
    left = {"auto_mapping", "base_model_name_or_path", "init_weights", "modules_to_save", "peft_version"}
    assert set(expected) - set(written) == left


def test_after_two_steps_every_prefix_has_moved_and_nothing_else(tiny: Any, tools: Any) -> None:
    model = adapted(tiny(num_hidden_layers=3))
    model(tools.rows_of([[2, 3, 4]], packed=True), logits=True)  # as a validation before training would
    moved, stayed = tools.two_steps(model, tools.rows_of([[5, 6, 7, 8], [9, 3, 1]], packed=True))
    assert moved == {f"model.layers.{i}.self_attn.prompt.past_key_values" for i in range(3)} == set(trainable(model))
    assert stayed == set(frozen(model))


def test_a_prefix_that_one_layer_ignores_is_noticed(tiny: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny(num_hidden_layers=3))
    monkeypatch.setattr(
        model.model.layers[1].self_attn.prompt,
        "forward",
        lambda q, k, v, batch, _: attention(q, k, v, batch),
    )
    moved, _ = tools.two_steps(model, tools.rows_of([[5, 6, 7, 8], [9, 3, 1]], packed=True))
    assert moved != set(trainable(model))


def test_a_prefix_is_fp32_and_computes_in_the_base_dtype(tiny: Any, tools: Any) -> None:
    model = adapted(tiny(dtype=torch.bfloat16))
    batch = tools.rows_of([[5, 6, 7, 8]], packed=True)
    assert model(batch, logits=True).dtype == torch.bfloat16
    found = tools.gradients(model, model(batch))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.any() for gradient in found.values())


def test_starting_values_are_pefts(tiny: Any) -> None:
    """normal(0, 1), by the recipe that is promised, from seed and name alone."""
    model = tiny(hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    install(model, SETTINGS)
    torch.manual_seed(99)
    initialise(model, seed=3)
    for index, layer in enumerate(model.model.layers):
        values = layer.self_attn.prompt.past_key_values.detach()
        assert abs(values.mean()) < 0.08
        assert abs(values.std() - 1) < 0.05
        digest = hashlib.sha256(f"3\nmodel.layers.{index}.self_attn.past_key_values".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        assert torch.equal(values, torch.empty(TOKENS, 512).normal_(generator=generator))


def test_installs_on_meta(tiny: Any) -> None:
    model = tiny(device="meta")
    install(model, SETTINGS)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    (saved,) = adapter_tensors(model).values()
    assert set(saved.parameters) == set(trainable(model))
    assert adapter_tensors(tiny(device="meta")) == {}


def test_a_file_of_another_shape_is_refused(tiny: Any, tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(TOKENS, 96)}, tmp_path / "adapter_model.safetensors")
    (found,) = adapter_problems(adapted(tiny()), tmp_path)
    assert f"prompt_embeddings is [{TOKENS}, 96], expected [{TOKENS}, 64]" in found


def test_a_prefix_of_another_model_is_refused(tiny: Any) -> None:
    other = fit(SETTINGS, tiny(device="meta", num_hidden_layers=3, num_key_value_heads=4).config)
    assert [problem.split(";")[0] for problem in problems(tiny(device="meta"), other)] == [
        "num_layers: 3",
        "num_attention_heads: 4",
        "token_dim: 32",
    ]
    assert problems(tiny(device="meta"), PrefixSettings(num_virtual_tokens=0)) == [
        "num_virtual_tokens: 0; expected 1 or more"
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix_projection": True}, "prefix_projection is True; only False is supported"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; only 1 or None is supported"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5'; expected a whole number"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head'], which is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; only 'CAUSAL_LM' or None is supported"),
    ],
)
def test_what_we_do_not_do_is_refused(change: dict[str, Any], words: str) -> None:
    written = json.loads(json.dumps(PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM").to_dict()))
    assert settings_from(written) == SETTINGS
    with pytest.raises(UserError) as error:
        settings_from(written | change)
    assert words in str(error.value)
