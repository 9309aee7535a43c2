"""The fast form of the layers against the plain one, and its float8 base against a twin that rounds where it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from packtrain.batch import Batch
from packtrain.data.collate import make_batch
from packtrain.data.tokens import Tokens
from packtrain.distributed.parallelize import materialise
from packtrain.kernels import float8
from packtrain.kernels.rows import Form
from packtrain.model import fast
from packtrain.model.linear import Linear
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings

CPU = torch.device("cpu")
FP32, FLOAT8 = Form(torch.float32, float8=False), Form(torch.float32, float8=True)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
}
QV = ("q_proj", "v_proj")


def batch(lengths: tuple[int, ...] = (7, 20, 3, 13), seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(97, size=edges[-1]).astype(np.int32)
    labels = np.where(generator.random(len(ids)) < 0.3, -100, ids).astype(np.int32)
    tokens = Tokens(ids=ids, labels=labels, offsets=edges, numbers=np.arange(len(lengths)), file="test")
    return make_batch(tokens, [np.arange(len(lengths))], seed=1, step=1, pad_id=0, width=int(edges[-1]) + 5)


def bare(settings: LoraSettings | None = None, **shape: Any) -> LlamaForCausalLM:
    """On meta, with adapters installed."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE | shape), dtype=torch.float32, device=torch.device("meta"))
    lora.install(model, settings or adapters())
    return model


def adapters(targets: tuple[str, ...] | str = "all-linear", r: int = 4, **others: Any) -> LoraSettings:
    return LoraSettings(r=r, lora_alpha=2 * r, target_modules=targets, **{"lora_dropout": 0.0, **others})


def filled(model: LlamaForCausalLM, device: torch.device = CPU) -> LlamaForCausalLM:
    """With values: norms away from one, adapters away from zero."""
    materialise(model, device)
    draw(model, 0)
    lora.initialise(model, 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if "norm" in name:
                parameter.copy_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return model.train()


def made(form: Form | None, recompute: fast.Recompute = "none", settings: LoraSettings | None = None) -> Any:
    model = bare(settings)
    if form is not None:
        assert fast.obstacle(model, CPU, form) is None
        fast.install(model, form, recompute)
        fast.allocate(model, CPU)
    return filled(model)


def run(model: LlamaForCausalLM, data: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(data) / max(1, data.count)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def farthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-6)).item() for name in ours)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        adapters(),
        adapters(QV, r=5),
        adapters(("gate_proj", "down_proj"), r=8),
        adapters(("o_proj",), use_rslora=True),
        adapters(lora_dropout=0.3),
        adapters(QV, r=5, lora_dropout=0.05),
        adapters(QV, modules_to_save=("model.norm",)),
    ],
    ids=["all", "q and v", "gate and down", "o, rsLoRA", "all, dropout", "q and v, dropout", "last norm"],
)
def test_equals_the_plain_form(settings: LoraSettings, recompute: fast.Recompute) -> None:
    ours = run(made(FP32, recompute, settings), batch())
    plain = run(made(None, settings=settings), batch())
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    assert farthest(ours[1], plain[1]) < 1e-5


def whole(form: Form | None, recompute: fast.Recompute = "none", frozen: int = 0, **shape: Any) -> LlamaForCausalLM:
    """Without adapters: all learns but the first `frozen` layers."""
    config = LlamaConfig.from_dict(SHAPE | shape)
    model = LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("meta"))
    for layer in blocks(model)[:frozen]:
        layer.requires_grad_(False)
    if form is not None:
        assert fast.obstacle(model, CPU, form) is None
        fast.install(model, form, recompute)
        fast.allocate(model, CPU)
    return filled(model)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_equals_the_plain_form(tied: bool, frozen: int, recompute: fast.Recompute) -> None:
    ours = run(whole(FP32, recompute, frozen, tie_word_embeddings=tied), batch())
    plain = run(whole(None, frozen=frozen, tie_word_embeddings=tied), batch())
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    assert len(plain[1]) == 6 * (3 - frozen) + (2 if tied else 3)
    assert farthest(ours[1], plain[1]) < 1e-5


def test_a_dropout_is_off_in_evaluation() -> None:
    settings = adapters(lora_dropout=0.5)
    ours, plain = made(FP32, settings=settings), made(None, settings=settings)
    with torch.no_grad():
        trained, evaluated = ours(batch()), ours.eval()(batch())
        torch.testing.assert_close(evaluated, plain.eval()(batch()), rtol=1e-6, atol=0)
    assert (trained - evaluated).abs() > 1e-4 * evaluated


def test_the_comparison_can_fail() -> None:
    model = made(FP32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.qkv_proj.adapters.k_proj.lora_B").mul_(1.01)
    assert farthest(run(model, batch())[1], run(made(None), batch())[1]) > 1e-4


def test_rows_of_one_document_and_a_batch_without_labels() -> None:
    whole, empty = batch((23,)), batch((1,))
    assert empty.count == 0
    for data in (whole, empty):
        ours, plain = run(made(FP32), data), run(made(None), data)
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
        assert all((ours[1][name] - plain[1][name]).norm() <= 1e-5 * plain[1][name].norm() for name in plain[1])
    assert all((gradient == 0).all() for gradient in ours[1].values())


def test_logits_and_evaluation() -> None:
    ours, plain = made(FP32), made(None)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch(), logits=True), plain(batch(), logits=True), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.eval()(batch()), plain.eval()(batch()), rtol=1e-6, atol=0)


def test_gradients_add_up_over_micro_batches() -> None:
    ours, plain = made(FP32), made(None)
    for data in (batch(), batch((9, 9), seed=3)):
        gradients = run(ours, data)[1], run(plain, data)[1]
    assert farthest(*gradients) < 1e-5


def test_an_adapters_columns_disturb_no_other() -> None:
    """With q's and v's B zero, k, which has no adapter, and both of them are what the base alone gives."""
    plain, ours = made(None, settings=adapters(QV)), made(FP32, settings=adapters(QV))
    with torch.no_grad():
        for model in (plain, ours):
            for layer in blocks(model):
                layer.self_attn.qkv_proj.adapters["q_proj"].lora_B.zero_()
                layer.self_attn.qkv_proj.adapters["v_proj"].lora_A.mul_(1e4)
    assert farthest(run(ours, batch())[1], run(plain, batch())[1]) < 1e-4


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (Form(torch.bfloat16, float8=False), adapters(lora_dropout=0.1)),
        (Form(torch.bfloat16, float8=True), adapters()),
        (Form(torch.bfloat16, float8=True), adapters(QV, r=5, lora_dropout=0.1)),
        (FP32, None),
    ],
    ids=["bf16, dropout", "float8", "float8, dropout", "full"],
)
def test_runs_on_fake_tensors(form: Form, settings: LoraSettings | None, recompute: fast.Recompute) -> None:
    real = batch()
    with FakeTensorMode() as mode:
        model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=form.dtype, device=CPU)
        if settings is not None:
            lora.install(model, settings)
        fast.install(model, form, recompute)
        fast.allocate(model, CPU)
        values = {name: getattr(real, name) for name in real.__dataclass_fields__}
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        loss = model.train()(type(real)(**fake))
        loss.backward()
    assert isinstance(loss, FakeTensor)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learning) in (12, 21, 42)
    for parameter in learning:
        gradient = parameter.grad
        assert isinstance(gradient, FakeTensor)
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)


class _Straight(torch.autograd.Function):
    """Rows rounded to float8 on the way there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        numbers, scale = float8.quantise_rows(x)
        return numbers.float() * scale[:, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Back(torch.autograd.Function):
    """The same on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Straight.forward(ctx, gradient)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain layers round their inputs, and their outputs' gradients, as float8 layers do."""
    exact, exact_product = Linear.split, Linear.product

    def split(self: Linear, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        if not self.adapters:
            return exact(self, x, keys)
        y = torch.cat(exact(self, _Straight.apply(x), keys), 1)
        return torch.split(_Back.apply(y), [part.stop - part.start for part in self.parts], 1)

    def product(self: Linear, x: Tensor) -> Tensor:
        if self.adapters or self.parts[0].name == "lm_head":
            return exact_product(self, x)
        y: Tensor = _Back.apply(exact_product(self, _Straight.apply(x)))
        return y

    monkeypatch.setattr(Linear, "split", split)
    monkeypatch.setattr(Linear, "product", product)
    return


@pytest.mark.parametrize(
    "settings",
    [adapters(), adapters(QV, r=5), adapters(QV, r=5, lora_dropout=0.3)],
    ids=["all", "q and v", "q and v, dropout"],
)
def test_float8_equals_a_twin_that_rounds_where_it_does(settings: LoraSettings, rounding: None) -> None:
    model = made(FLOAT8, settings=settings)
    ours, modules = run(model, batch()), dict(model.named_modules())
    twin = made(None, settings=settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = parameter.float()
            if parameter.dtype == float8.E4M3:
                values = values * modules[name.rpartition(".")[0]].weight_scale[0]
            twin.get_parameter(name).copy_(values)
    theirs = run(twin, batch())
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
    cosines = [torch.cosine_similarity(ours[1][n].flatten(), theirs[1][n].flatten(), 0).item() for n in ours[1]]
    # A number on the border between two of e4m3 falls to one side here and to the other there.
    assert min(cosines) > 0.98
    assert np.mean(cosines) > 0.995


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_float8_recomputed_gives_the_same_bits(recompute: fast.Recompute) -> None:
    kept, again = run(made(FLOAT8), batch()), run(made(FLOAT8, recompute), batch())
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_largest_numbers_of_adapters_are_those_of_this_forward(recompute: fast.Recompute) -> None:
    """One kernel finds all layers'; each layer for itself would find the same, also when adapters have grown."""
    together, alone = (made(FLOAT8, recompute) for _ in range(2))
    for layer in alone.model.layers:
        layer.fast.number = None
    for grows in (1.0, 1000.0):
        found = []
        for model in (together, alone):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(grows)
            found.append(run(model, batch()))
        (loss, gradients), (expected, theirs) = found
        assert torch.equal(loss, expected)
        assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


def test_only_what_no_kernel_of_ours_reads_gets_its_rows_scales_in_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v, the last product of a layer, and the gradient of attention's output."""
    calls = {"raw_product": 0, "product": 0}

    def counted(name: str) -> Any:
        exact = getattr(float8, name)

        def call(*arguments: Any) -> Tensor:
            calls[name] += 1
            return cast(Tensor, exact(*arguments))

        return call

    for name in calls:
        monkeypatch.setattr(float8, name, counted(name))
    run(made(FLOAT8), batch())
    layers = SHAPE["num_hidden_layers"]
    small = 8 * layers  # with A or B
    head = 1  # its gradient, of a chunk
    assert calls == {
        "raw_product": 5 * layers - 1 + small + head,
        "product": 3 * layers,
    }  # no gradient of the embedding


def test_a_float8_base_takes_a_byte_a_weight_and_is_near_the_values() -> None:
    model, plain = made(FLOAT8), made(None)
    for layer, exact in zip(blocks(model), blocks(plain), strict=True):
        linear, reference = layer.mlp.gate_up_proj, exact.mlp.gate_up_proj.weight
        assert linear.weight.element_size() == 1
        near = linear.weight.float() * linear.weight_scale[0]
        assert (near - reference).norm() / reference.norm() < 0.03
    assert not [name for name in model.state_dict() if "scale" in name]


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        (adapters(QV, modules_to_save=("o_proj",)), {}, "whole layers"),
        (adapters(QV, modules_to_save=("input_layernorm",)), {}, "weights of the base"),
        (adapters(), {"mlp_bias": True}, "bias"),
        (adapters(), {"intermediate_size": 90}, "multiple of 16"),
    ],
    ids=["saved part", "norm", "bias", "odd size"],
)
def test_what_does_not_fit_is_said(settings: LoraSettings, shape: dict[str, Any], words: str) -> None:
    assert words in str(fast.obstacle(bare(settings, **shape), CPU, FP32))


def test_a_float8_base_does_not_learn() -> None:
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=torch.float32, device=torch.device("meta"))
    assert fast.obstacle(model, CPU, FLOAT8) == "weights of the base are trained"
