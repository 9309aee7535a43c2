"""LLaMA-Adapter against peft and against float64: the same numbers, the same file, and all of it learns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from packtrain import peft
from packtrain.batch import Batch
from packtrain.checkpoint.adapter import load_adapter, read_adapter_config, save_adapter
from packtrain.errors import UserError
from packtrain.kernels.attention import attention, attention_to_all
from packtrain.model.llama import LlamaConfig, blocks
from packtrain.peft.llama_adapter import (
    AdaptionPrompt,
    LlamaAdapterSettings,
    adapter_tensors,
    config_dict,
    fit,
    initialise,
    install,
    problems,
    settings_from,
)
from packtrain.peft.tensors import PREFIX, modules
from packtrain.peft.trainable import frozen, trainable

SETTINGS = LlamaAdapterSettings(adapter_len=5, adapter_layers=2)
LENGTHS = (9, 4, 13, 2)
CONFIGS: list[dict[str, Any]] = [
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]


def adapted(model: Any, settings: LlamaAdapterSettings = SETTINGS) -> Any:
    """`model` with prompts and gates that are not at their start."""
    install(model, settings)
    initialise(model, seed=7)
    return model


def peft_model(theirs: Any) -> Any:
    config = AdaptionPromptConfig(
        adapter_len=SETTINGS.adapter_len, adapter_layers=SETTINGS.adapter_layers, task_type="CAUSAL_LM"
    )
    return get_peft_model(theirs, config).eval()


def largest(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_save(config: dict[str, Any], twins: Any, tools: Any, tmp_path: Path) -> None:
    pair = twins(**config)
    documents = pair.documents(*LENGTHS)
    base = [pair.their_logits(pair.theirs, ids).detach() for ids in documents]
    ours = adapted(pair.ours)
    tools.disturb(trainable(ours).values())
    save_adapter(ours, tmp_path, config_dict(SETTINGS, "some/model"))
    loaded = PeftModel.from_pretrained(pair.theirs, tmp_path).eval()
    packed = ours(tools.rows_of(documents, packed=True), logits=True)[0].split(LENGTHS)
    padded = ours(tools.rows_of(documents, packed=False), logits=True)
    for i, ids in enumerate(documents):
        expected = pair.their_logits(loaded, ids)
        assert largest(packed[i], expected) <= 1e-5
        assert largest(padded[i, : len(ids)], expected) <= 1e-5
        assert largest(base[i], expected) > 1e-3, "the adapter does nothing, so equality would prove nothing"


@pytest.mark.parametrize("config", CONFIGS)
def test_we_load_what_peft_saves(config: dict[str, Any], twins: Any, tools: Any, tmp_path: Path) -> None:
    pair = twins(**config)
    theirs = peft_model(pair.theirs)
    tools.disturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    settings = peft.settings_from(read_adapter_config(tmp_path))
    assert settings == SETTINGS
    ours = adapted(pair.ours, settings)
    load_adapter(ours, tmp_path)
    (ids,) = pair.documents(11)
    assert largest(ours(tools.rows_of([ids], packed=True), logits=True)[0], pair.their_logits(theirs, ids)) <= 1e-5


def test_the_files_are_pefts(twins: Any, tmp_path: Path) -> None:
    pair = twins()
    save_adapter(adapted(pair.ours), tmp_path / "ours", config_dict(SETTINGS, "some/model"))
    peft_model(pair.theirs).save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    written, expected = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft"))
    assert written.pop("base_model_name_or_path") == "some/model"
    assert {key: expected[key] for key in written} == written
    assert set(expected) - set(written) == {"auto_mapping", "base_model_name_or_path", "peft_version"}


def test_gradients_are_pefts_packed_and_padded_recomputed_or_not(twins: Any, tools: Any) -> None:
    """Of one loss over four documents; the prompt's gradient is what a stale copy of it would not have."""
    pair = twins()
    documents = pair.documents(*LENGTHS)
    ours = adapted(pair.ours)
    tools.disturb(trainable(ours).values())
    theirs = peft_model(pair.theirs)
    names = {name.removeprefix(PREFIX): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for path, adapter in modules(ours, AdaptionPrompt):
            assert path == f"{adapter.name}.prompt"
            for tensor in ("adaption_prompt", "adaption_gate"):
                names[f"{adapter.name}.{tensor}"].copy_(getattr(adapter, tensor))
    loss = pair.their_loss(theirs, documents)
    loss.backward()
    for packed in (True, False):
        for recompute in (False, True):
            ours.train()
            for block in blocks(ours):
                block.recompute = recompute
            found = ours(tools.rows_of(documents, packed))
            assert found.item() == pytest.approx(loss.item(), rel=1e-5)
            for name, gradient in tools.gradients(ours, found).items():
                expected = names[name.replace(".prompt.", ".")].grad
                assert expected.abs().max() > 1e-2
                assert largest(gradient, expected) < 1e-5, name


def test_one_layer_is_the_formula(tiny: Any) -> None:
    """gate * softmax(q K^T / sqrt(d)) V beside causal attention, in float64, head by head."""
    model = adapted(tiny())
    layer = model.model.layers[1].self_attn
    layer.prompt.adaption_gate.data.fill_(0.7)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, heads, 8, generator=generator) for heads in (4, 2, 2))
    batch = _batch(6)
    found = layer.prompt(q, k, v, batch, layer.qkv_proj)
    weight = layer.qkv_proj.weight.double()
    prompt = layer.prompt.adaption_prompt[0].double()
    keys, values = ((prompt @ weight[start : start + 16].t()).view(5, 2, 8) for start in (32, 48))
    for head in range(4):
        mine = q[:, head].double()
        causal = (mine @ k[:, head // 2].double().t() / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        expected = causal.softmax(-1) @ v[:, head // 2].double()
        expected = expected + 0.7 * (mine @ keys[:, head // 2].t() / 8**0.5).softmax(-1) @ values[:, head // 2]
        assert (found[:, head] - expected).abs().max() < 1e-5


def _batch(length: int) -> Any:
    flat = torch.zeros(1, length, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    edges = torch.tensor([0, length], dtype=torch.int32)
    return Batch(flat, torch.arange(length)[None], edges, (length,), length, False, none, none, flat, length, (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_gates_at_zero_it_is_the_base_model(tiny: Any, tools: Any, dtype: torch.dtype) -> None:
    """Bit for bit; and not once a gate has opened."""
    model = tiny(num_hidden_layers=3, dtype=dtype)
    batch = tools.rows_of([[5, 6, 7, 8], [9, 3, 1]], packed=True)
    base = model(batch, logits=True)
    adapted(model)
    assert torch.equal(model(batch, logits=True), base)
    model.model.layers[2].self_attn.prompt.adaption_gate.data.fill_(0.5)
    assert not torch.equal(model(batch, logits=True), base)


def test_after_two_steps_every_prompt_and_gate_has_moved_and_nothing_else(tiny: Any, tools: Any) -> None:
    model = adapted(tiny(num_hidden_layers=3))
    model(tools.rows_of([[2, 3, 4]], packed=True), logits=True)  # as a validation before training would
    batch = tools.rows_of([[5, 6, 7, 8], [9, 3, 1]], packed=True)
    moved, stayed = tools.two_steps(model, batch)
    assert moved == set(trainable(model))
    assert {name.rpartition(".")[2] for name in moved} == {"adaption_prompt", "adaption_gate"}
    assert len(moved) == 4
    assert stayed == set(frozen(model))


def test_a_prompt_that_is_kept_between_forwards_is_noticed(
    tiny: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of the prompt made once, in a validation: the flaw that some have, where only gates learn."""
    model = adapted(tiny(num_hidden_layers=3))
    monkeypatch.setattr(AdaptionPrompt, "forward", _from_a_cache)
    with torch.no_grad():
        model(tools.rows_of([[2, 3, 4]], packed=True), logits=True)
    moved, _ = tools.two_steps(model, tools.rows_of([[5, 6, 7, 8], [9, 3, 1]], packed=True))
    assert {name.rpartition(".")[2] for name in moved} == {"adaption_gate"}


def _from_a_cache(self: Any, q: Tensor, k: Tensor, v: Tensor, batch: Batch, qkv_proj: Any) -> Tensor:
    if not hasattr(self, "kept"):
        prompt = self.adaption_prompt[0]
        _, keys, values = qkv_proj.split(prompt, batch.keys.new_zeros(len(prompt)))
        self.kept = keys.view(-1, *k.shape[1:]), values.view(-1, *v.shape[1:])
    return attention(q, k, v, batch) + self.adaption_gate * attention_to_all(q, *self.kept)


def test_prompts_are_fp32_and_compute_in_the_base_dtype(tiny: Any, tools: Any) -> None:
    model = adapted(tiny(dtype=torch.bfloat16))
    tools.disturb(trainable(model).values())
    batch = tools.rows_of([[5, 6, 7, 8]], packed=True)
    assert model(batch, logits=True).dtype == torch.bfloat16
    found = tools.gradients(model, model(batch))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.any() for gradient in found.values())


def test_starting_values_are_pefts(tiny: Any) -> None:
    """Prompts normal(0, 1) by the recipe that is promised, from seed and name alone; gates zero."""
    model = tiny(hidden_size=256, num_attention_heads=4)
    install(model, LlamaAdapterSettings(adapter_len=40, adapter_layers=2))
    torch.manual_seed(99)
    initialise(model, seed=3)
    for index, layer in enumerate(model.model.layers):
        values = layer.self_attn.prompt.adaption_prompt.detach()
        assert abs(values.mean()) < 0.04
        assert abs(values.std() - 1) < 0.03
        digest = hashlib.sha256(f"3\nmodel.layers.{index}.self_attn.adaption_prompt".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        assert torch.equal(values, torch.empty(1, 40, 256).normal_(generator=generator))
        assert not layer.self_attn.prompt.adaption_gate.any()


def test_the_last_layers_have_a_prompt_on_meta_too(tiny: Any) -> None:
    model = tiny(num_hidden_layers=3, device="meta")
    install(model, SETTINGS)
    assert [layer.self_attn.prompt is not None for layer in model.model.layers] == [False, True, True]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(saved.parameter in trainable(model) for saved in adapter_tensors(model).values())


def test_llama_recipes_default_fits_a_small_model(tiny: Any) -> None:
    """30 layers, where peft ends with an error on a model of fewer."""
    model = tiny(device="meta")
    assert problems(model, LlamaAdapterSettings()) == ["adapter_layers: 30; expected no more than the model's 2"]
    fitted = fit(LlamaAdapterSettings(), model.config)
    assert fitted == LlamaAdapterSettings(adapter_len=10, adapter_layers=2)
    assert problems(model, fitted) == []
    assert fit(fitted, LlamaConfig.from_dict({**vars_of(model.config), "num_hidden_layers": 40})) == fitted


def vars_of(config: LlamaConfig) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    return {"model_type": "llama"} | {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"attention_bias": True}, "peft would add that of o_proj twice"),
        ({"head_dim": 16}, "head_dim (16) is not hidden_size / num_attention_heads (32 / 4)"),
    ],
)
def test_models_that_peft_cannot_run_are_refused(config: dict[str, Any], words: str, twins: Any, tools: Any) -> None:
    """And it is so: peft's own adapter changes such a model with its gates at zero, or fails."""
    pair = twins(**config)
    (found,) = problems(pair.ours, SETTINGS)
    assert words in found
    (ids,) = pair.documents(7)
    base = pair.their_logits(pair.theirs, ids)
    theirs = peft_model(pair.theirs)
    if "head_dim" in config:
        with pytest.raises(RuntimeError, match="shape"):
            pair.their_logits(theirs, ids)
    else:
        assert largest(pair.their_logits(theirs, ids), base) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_modules": "mlp"}, "target_modules is 'mlp'; only 'self_attn' or None is supported"),
        ({"adapter_len": "5"}, "adapter_len is '5'; expected a whole number"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; only 'ADAPTION_PROMPT' is supported"),
        ({"something_new": 3}, "something_new is 3, which is not supported; only plain LLaMA-Adapter"),
        ({"adapter_layers": None}, "adapter_layers is None; expected a whole number"),
    ],
)
def test_what_we_do_not_do_is_refused(change: dict[str, Any], words: str) -> None:
    config = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM")
    written = json.loads(json.dumps(config.to_dict()))
    assert settings_from(written) == SETTINGS
    with pytest.raises(UserError) as error:
        settings_from(written | change)
    assert words in str(error.value)


def test_an_unknown_kind_of_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="peft_type is 'IA3'; only LORA, ADAPTION_PROMPT, PREFIX_TUNING are supported"):
        peft.settings_from({"peft_type": "IA3"})
