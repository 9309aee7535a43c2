"""LoRA as arithmetic, its starting values, and what trains."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from packtrain.kernels.random import dropout
from packtrain.model.linear import Linear, linear_parts
from packtrain.peft.lora import LoraAdapter, LoraSettings, SavedPart, adapter_tensors, initialise, install, saved_layout
from packtrain.peft.trainable import trainable


def filled(tiny: Any, settings: LoraSettings, **config: Any) -> Any:
    model = tiny(**config)
    install(model, settings)
    initialise(model, seed=7)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def input_of(layer: Linear, rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, layer.in_features, generator=generator).to(dtype)
    return x, torch.randint(0, 2**60, (rows,), generator=generator)


def test_one_adapter_a_part(tiny: Any) -> None:
    """q and v adapted, k trained whole: against float64, each part by itself."""
    settings = LoraSettings(r=4, lora_alpha=12, lora_dropout=0.0, modules_to_save=("k_proj",))
    model = filled(tiny, settings, attention_bias=True)
    layer = model.model.layers[1].self_attn.qkv_proj
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    x, keys = input_of(layer)
    found = layer(x, keys)
    expected = []
    for part in layer.parts:
        adapter = layer.adapters[part.name]
        weight, bias = layer.weight[part.start : part.stop].double(), layer.bias[part.start : part.stop].double()
        if isinstance(adapter, LoraAdapter):
            weight = weight + 3.0 * adapter.lora_B.double() @ adapter.lora_A.double()
        else:
            weight, bias = adapter.weight.double(), adapter.bias.double()
        expected.append(x.double() @ weight.t() + bias)
    assert (found - torch.cat(expected, 1)).abs().max() < 1e-5


def test_dropout_is_by_key_and_layer_name_and_only_in_training(tiny: Any) -> None:
    settings = LoraSettings(r=4, target_modules=("q_proj", "v_proj"), lora_dropout=0.5)
    model = filled(tiny, settings)
    layer = model.model.layers[0].self_attn.qkv_proj
    x, keys = input_of(layer)
    parts = {part.name: part for part in layer.parts}
    model.train()
    training = layer(x, keys)
    for word in ("q_proj", "v_proj"):
        adapter, part = layer.adapters[word], parts[word]
        dropped = dropout(x, keys, f"model.layers.0.self_attn.{word}", 0.5)
        base = F.linear(x, layer.weight[part.start : part.stop])
        expected = base + settings.scale * dropped @ adapter.lora_A.t() @ adapter.lora_B.t()
        assert torch.allclose(training[:, part.start : part.stop], expected, atol=1e-5)
    model.eval()
    assert not torch.allclose(layer(x, keys), training)
    assert torch.equal(layer(x, keys), layer(x, keys + 1))


def test_columns_are_the_same_product(tiny: Any) -> None:
    model = filled(tiny, LoraSettings(target_modules=("lm_head",), lora_dropout=0.3))
    model.train()
    adapter = model.lm_head.adapters["lm_head"]
    x, keys = input_of(model.lm_head)
    y = torch.zeros(6, 40)
    assert torch.allclose(adapter(x, y, keys), adapter.columns(x, keys) @ adapter.lora_B.t(), atol=1e-6)


def test_adapters_are_fp32_and_compute_in_the_base_dtype(tiny: Any) -> None:
    model = filled(tiny, LoraSettings(modules_to_save=("k_proj", "norm")), dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.qkv_proj
    x, keys = input_of(layer, dtype=torch.bfloat16)
    y = layer(x, keys)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert layer.adapters["q_proj"].lora_B.grad.dtype == torch.float32
    assert layer.adapters["k_proj"].weight.grad.dtype == torch.float32
    assert layer.weight.grad is None


def test_only_what_was_asked_for_trains(tiny: Any) -> None:
    model = tiny()
    install(model, LoraSettings(target_modules=("q_proj", "down_proj"), modules_to_save=("embed_tokens", "model.norm")))
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for i in (0, 1):
        for layer in ("self_attn.qkv_proj.adapters.q_proj", "mlp.down_proj.adapters.down_proj"):
            expected |= {f"model.layers.{i}.{layer}.lora_{matrix}" for matrix in "AB"}
    assert set(trainable(model)) == expected


def test_saved_parts_start_as_the_base(tiny: Any) -> None:
    model = tiny(dtype=torch.bfloat16, attention_bias=True)
    install(model, LoraSettings(modules_to_save=("k_proj",)))
    layer = model.model.layers[1].self_attn.qkv_proj
    part, copy = layer.parts[1], layer.adapters["k_proj"]
    assert isinstance(copy, SavedPart)
    assert torch.equal(copy.weight, layer.weight[part.start : part.stop].float())
    pieces = saved_layout(model)["model.layers.1.self_attn.qkv_proj.adapters.k_proj.bias"]
    assert pieces == (("model.layers.1.self_attn.k_proj.bias", 0, 16),)


def test_tied_weight_stays_one_parameter(tiny: Any) -> None:
    model = tiny(dtype=torch.bfloat16, tie_word_embeddings=True)
    install(model, LoraSettings(modules_to_save=("embed_tokens", "lm_head")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    names = {name for name, saved in adapter_tensors(model).items() if saved.parameter == "model.embed_tokens.weight"}
    assert names == {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}


def test_installs_on_meta(tiny: Any) -> None:
    model = tiny(device="meta")
    install(model, LoraSettings(target_modules="all-linear", modules_to_save=("embed_tokens",)))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def adapters_of(model: Any) -> dict[str, LoraAdapter]:
    return {name: layer.adapters[part.name] for name, layer, part in linear_parts(model) if part.name in layer.adapters}


def test_starting_values_are_pefts(tiny: Any) -> None:
    """B zero; A uniform in +-1/sqrt(in): bounds, mean and variance of that distribution."""
    model = tiny(hidden_size=256, intermediate_size=64, num_attention_heads=4)
    install(model, LoraSettings(r=64, target_modules="all-linear"))
    initialise(model, seed=3)
    for adapter in adapters_of(model).values():
        bound = adapter.lora_A.shape[1] ** -0.5
        values = adapter.lora_A.detach() / bound
        assert values.abs().max() <= 1
        assert values.abs().max() > 0.99
        assert abs(values.mean()) < 0.04
        assert abs(values.var() - 1 / 3) < 0.03
        assert not adapter.lora_B.any()


def test_starting_values_depend_on_seed_and_name_alone(tiny: Any) -> None:
    """By the recipe that is promised, whatever else is adapted and in whichever order."""

    def drawn(seed: int, targets: tuple[str, ...]) -> Tensor:
        model = tiny()
        install(model, LoraSettings(r=4, target_modules=targets))
        torch.manual_seed(seed + 100)
        initialise(model, seed)
        return adapters_of(model)["model.layers.1.self_attn.v_proj"].lora_A.detach()

    one = drawn(1, ("v_proj",))
    assert torch.equal(one, drawn(1, ("q_proj", "v_proj", "lm_head")))
    assert not torch.equal(one, drawn(2, ("v_proj",)))
    digest = hashlib.sha256(b"1\nmodel.layers.1.self_attn.v_proj.lora_A.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    expected = torch.empty(4, 32).uniform_(-(32**-0.5), 32**-0.5, generator=generator)
    assert torch.equal(one, expected)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_starting_values_are_the_same_on_any_number_of_ranks(tiny: Any, ranks: int) -> None:
    """Each rank fills its rows (r = 6 does not divide by 4; one rank gets none), and together they are the whole."""
    settings = LoraSettings(r=6, target_modules="all-linear")
    whole, sharded = tiny(), tiny()
    install(whole, settings)
    install(sharded, settings)
    initialise(whole, 5)
    for rank in range(ranks):

        def mine(parameter: Tensor, rank: int = rank) -> tuple[Tensor, int]:
            rows = -(-parameter.shape[0] // ranks)
            first = min(rank * rows, parameter.shape[0])
            return parameter.detach()[first : first + rows], first

        initialise(sharded, 5, mine)
    for name, adapter in adapters_of(whole).items():
        assert torch.equal(adapters_of(sharded)[name].lora_A, adapter.lora_A), name
