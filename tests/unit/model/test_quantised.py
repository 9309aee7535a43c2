"""A base in 4 and 8 bits against the same model with what the numbers mean loaded as plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fast import CPU, FP32, SHAPE, adapters, bare, batch, farthest, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from packtrain import peft
from packtrain.distributed.parallelize import materialise
from packtrain.kernels.quantise import Quantisation
from packtrain.model import fast
from packtrain.model.linear import base_shapes, layout
from packtrain.model.llama import LlamaForCausalLM, blocks, draw
from packtrain.model.quantised import held, quantise, quantised
from packtrain.peft import LlamaAdapterSettings, LoraSettings, PrefixSettings, lora
from packtrain.peft.tensors import LocalRows, all_rows
from packtrain.peft.trainable import count_line
from packtrain.train.flops import Cost, Count, Work

FP = torch.float32
FORMS = {
    "nf4": Quantisation("nf4"),
    "nf4 twice": Quantisation("nf4", True),
    "fp4": Quantisation("fp4", storage=torch.float32),
    "int8": Quantisation("int8"),
}
SETTINGS: dict[str, Any] = {
    "lora": adapters(),
    "lora with dropout": adapters(("q_proj", "down_proj"), lora_dropout=0.3),
    "llama_adapter": LlamaAdapterSettings(adapter_len=3, adapter_layers=2),
    "prefix": PrefixSettings(num_virtual_tokens=4),
}


def models(
    form: Quantisation,
    settings: Any = None,
    recompute: fast.Recompute | None = None,
    dtype: torch.dtype = FP,
    **shape: Any,
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """(quantised, in the fused form if `recompute` says how; and its plain twin), with the same values everywhere."""
    ours, plain = (bare_with(settings or adapters(), **shape) for _ in range(2))
    quantise(ours, form, dtype)
    if recompute is not None:
        assert fast.obstacle(ours, CPU, FP32) is None
        fast.install(ours, FP32, recompute)
    for model in (ours, plain):
        materialise(model, CPU)
        draw(model, 0)
        moved(model, settings or adapters())
    dequantise_into(plain, ours)
    return ours.train(), plain.train()


def bare_with(settings: Any, **shape: Any) -> LlamaForCausalLM:
    if isinstance(settings, LoraSettings):
        return bare(settings, **shape)
    model = LlamaForCausalLM(config(**shape), dtype=torch.float32, device=torch.device("meta"))
    peft.method_of(settings).install(model, settings)
    return model


def config(**shape: Any) -> Any:
    return peft.LlamaConfig.from_dict(SHAPE | shape)


@torch.no_grad()
def moved(model: nn.Module, settings: Any, local_rows: LocalRows = all_rows) -> None:
    """Adapters and norms away from where they start; the same in every model."""
    peft.method_of(settings).initialise(model, 0, local_rows)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name or parameter.requires_grad:
            local, first = local_rows(parameter)
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            local.add_(noise[first : first + len(local)])


@torch.no_grad()
def dequantise_into(plain: nn.Module, ours: nn.Module) -> None:
    matrices = dict(plain.named_parameters())
    for name, layer in ours.named_modules():
        if layer in set(quantised(ours)):
            matrices[f"{name}.weight"].copy_(layer.matrix())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_equals_the_model_of_what_the_numbers_mean(form: Quantisation, settings: Any, again: bool) -> None:
    ours, plain = models(form, settings)
    for block in blocks(ours):
        block.recompute = again
    with torch.no_grad():
        torch.testing.assert_close(ours(batch(), logits=True), plain(batch(), logits=True), rtol=1e-5, atol=1e-5)
    found, expected = run(ours, batch()), run(plain, batch())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert farthest(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_fused_form_too(form: Quantisation, recompute: fast.Recompute) -> None:
    ours, plain = models(form, recompute=recompute)
    for data in (batch(), batch((9, 9), seed=3)):
        found, expected = run(ours, data), run(plain, data)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
        assert farthest(found[1], expected[1]) < 1e-5


def test_the_comparison_can_fail() -> None:
    """A number of one weight off by one, or a scale by a hundredth, is seen."""
    for changed in ("weight", "weight_scale"):
        ours, plain = models(FORMS["nf4"])
        layer = blocks(ours)[1].self_attn.qkv_proj
        with torch.no_grad():
            if changed == "weight":
                layer.weight.view(torch.uint8)[0] ^= 1
            else:
                layer.weight_scale.mul_(1.01)
        assert farthest(run(ours, batch())[1], run(plain, batch())[1]) > 1e-4


def test_products_are_in_the_compute_dtype() -> None:
    ours, plain = models(FORMS["nf4"], dtype=torch.bfloat16)
    x = torch.randn(5, 64)
    layer, twin = blocks(ours)[0].mlp.gate_up_proj, blocks(plain)[0].mlp.gate_up_proj
    assert layer.product(x).dtype == torch.float32
    assert torch.equal(layer.product(x), (x.bfloat16() @ twin.weight.detach().bfloat16().T).float())
    obstacle = fast.obstacle(ours, CPU, FP32)
    assert obstacle == "products of the quantised base are in torch.bfloat16, all else in torch.float32"


def test_bytes_that_are_no_number_as_floats_stay() -> None:
    """A block of its largest value is 0xff throughout: NaN, seen as bf16. Nothing is computed with that view."""
    ours, _ = models(FORMS["nf4"])
    layer = blocks(ours)[0].mlp.down_proj
    layer.form.pack(torch.full((64, 96), 0.25), layer.weight.data, layer.weight_scale.data)
    assert layer.weight.isnan().all()
    assert (layer.matrix() == 0.25).all()
    run(ours, batch())
    assert (layer.matrix() == 0.25).all()


def test_biases_and_adapters_are_the_plain_layers() -> None:
    ours, plain = models(FORMS["int8"], attention_bias=True, mlp_bias=True)
    for model in (ours, plain):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.fill_(0.3)
    found, expected = run(ours, batch()), run(plain, batch())
    assert farthest(found[1], expected[1]) < 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)


def test_what_is_held_and_what_is_said() -> None:
    ours, plain = models(FORMS["nf4 twice"])
    assert layout(ours) == layout(plain)
    assert base_shapes(ours) == base_shapes(plain)
    assert count_line(ours) == count_line(plain)
    assert Cost.of(ours) == Cost.of(plain)
    weights = sum(layer.in_features * layer.out_features for layer in quantised(ours))
    rows = dict.fromkeys((64, 96), 0)
    for layer in quantised(ours):
        rows[layer.in_features] += layer.out_features
    scales = rows[64] * (8 + 4) + rows[96] * (8 + 4)  # one and two bytes of scales, rounded up to four
    assert held(ours, all_rows) == (weights // 2 + scales, 4 * weights)
    names = {name.rpartition(".")[0] for name, parameter in ours.named_parameters() if name.endswith("weight_scale")}
    assert names == {
        f"model.layers.{i}.{part}"
        for i in range(3)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }


def test_nothing_keeps_a_dequantised_weight() -> None:
    ours, plain = models(FORMS["nf4"])
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for name, model in {"ours": ours, "plain": plain}.items():
        kept = sizes.setdefault(name, set())

        def note(tensor: Tensor, kept: set[tuple[int, ...]] = kept) -> Tensor:
            kept.add(tuple(sorted(tensor.shape)))
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            model(batch())
    matrices = {tuple(sorted(shape)) for name, shape in base_shapes(ours).items() if "_proj" in name}
    assert matrices <= sizes["plain"]
    assert not matrices & sizes["ours"]


def test_flops_are_counted_and_what_is_recomputed_is_told() -> None:
    ours, plain = models(FORMS["nf4"])
    counted = []
    for model in (ours, plain):
        for block in blocks(model):
            block.recompute = True
        with Count() as count:
            model(batch()).backward()
        counted.append((count.flops, count.recomputed))
    assert counted[0] == counted[1]
    assert counted[0][1] > 0
    assert Cost.of(ours).flops(Work.computed([batch()])) == pytest.approx(counted[0][0] - counted[0][1], rel=0.02)


def test_a_layer_trained_whole_starts_from_the_files_weights() -> None:
    """It takes the quantised rows' place, and is saved for use on the plain base."""
    settings = LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj",), modules_to_save=("up_proj",))
    ours, plain = bare(settings), bare(settings)
    quantise(ours, FORMS["nf4"], FP)
    for model in (ours, plain):
        materialise(model, CPU)
        draw(model, 0, copies=lora.saved_layout(model))
        lora.initialise(model, 0)
    copies = [blocks(model)[0].mlp.gate_up_proj.adapters["up_proj"].weight for model in (ours, plain)]
    assert copies[0].dtype == torch.float32
    assert torch.equal(copies[0], copies[1])
    run(ours.train(), batch())
    assert copies[0].grad is not None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_runs_on_fake_tensors(form: Quantisation) -> None:
    real = batch()
    with FakeTensorMode() as mode:
        model = LlamaForCausalLM(config(), dtype=FP, device=CPU)
        lora.install(model, adapters())
        quantise(model, form, FP)
        values = {name: getattr(real, name) for name in real.__dataclass_fields__}
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        model.train()(type(real)(**fake)).backward()
    ours, plain = models(form)  # and leaves nothing fake behind
    assert torch.equal(blocks(ours)[0].self_attn.o_proj.matrix(), blocks(plain)[0].self_attn.o_proj.weight)
