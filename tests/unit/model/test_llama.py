"""The model as others use it: tied weights, recompute, adapters, random weights, sharding, fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from packtrain.model import llama
from packtrain.model.linear import layout, linear_parts
from packtrain.model.llama import LlamaForCausalLM, blocks, draw

CPU, META = torch.device("cpu"), torch.device("meta")
TIED = {"tie_word_embeddings": True}


@pytest.fixture
def batch(tools: Any) -> Any:
    return tools.batch_of([[tools.some_ids(9), tools.some_ids(5, 1)], [tools.some_ids(14, 2)]], masked=2)


def with_lora(tools: Any, p: float, names: tuple[str, ...] = ("q_proj", "v_proj", "up_proj", "down_proj")) -> Any:
    """A frozen model with small adapters on some parts of each layer."""
    model = tools.ours().requires_grad_(False)
    for name, layer, part in linear_parts(model):
        if part.name in names:
            layer.adapters[part.name] = tools.fake_lora(name, layer.in_features, part.stop - part.start, p)
    return model


@pytest.mark.parametrize("keeps_attention", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_recompute_changes_no_bit(
    tools: Any, batch: Any, lora: bool, keeps_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[int] = []
    kernel = llama.attention
    monkeypatch.setattr(llama, "attention", lambda *inputs: attended.append(1) or kernel(*inputs))
    found = []
    for recompute in (False, True):
        model = with_lora(tools, p=0.3) if lora else tools.ours()
        for block in blocks(model):
            block.recompute, block.keeps_attention = recompute, keeps_attention
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        attended.clear()
        loss = model(batch)
        loss.backward()
        assert len(calls) == 1 + recompute
        assert len(attended) == len(blocks(model)) * (1 + (recompute and not keeps_attention))
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in trained.values())
        found.append((loss, trained))
    (loss, plain), (loss_again, recomputed) = found
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_dropout_follows_the_row_and_not_its_place(tools: Any) -> None:
    model = with_lora(tools, p=0.3)
    first, second = tools.some_ids(9), tools.some_ids(12, 1)
    one = model(tools.batch_of([[first, second]], numbers=[4, 5]))
    other = model(tools.batch_of([[second], [first]], numbers=[5, 4], length=16))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)
    another_step = model(tools.batch_of([[first, second]], numbers=[4, 5], step=1))
    assert one.item() != pytest.approx(another_step.item(), rel=1e-4)
    model.eval()
    assert one.item() != pytest.approx(model(tools.batch_of([[first, second]])).item(), rel=1e-4)


def token_loss(model: Any, batch: Any) -> torch.Tensor:
    """The loss from all logits, plainly."""
    logits = model(batch, logits=True).flatten(0, 1)[batch.index]
    return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_on_the_head_is_the_same_in_loss_and_logits(tools: Any, batch: Any, tied: bool, p: float) -> None:
    model = tools.ours({"tie_word_embeddings": tied}).requires_grad_(False)
    model.lm_head.adapters["lm_head"] = tools.fake_lora("lm_head", 48, 97, p)
    found = []
    for loss in (model(batch), token_loss(model, batch)):
        loss.backward()
        found.append((loss, tools.gradients(model.lm_head.adapters)))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-6)
    assert all(tools.distance(found[0][1][name], gradient) < 1e-5 for name, gradient in found[1][1].items())
    del model.lm_head.adapters["lm_head"]
    assert model(batch).item() != pytest.approx(found[0][0].item(), rel=1e-3)


class Replacement(nn.Module):
    """A trainable copy of the head's weight, as modules_to_save makes it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float() * 1.5)

    def forward(self, x: torch.Tensor, y: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_head_replaces_the_weight(tools: Any, batch: Any, dtype: torch.dtype) -> None:
    model = tools.ours(dtype=dtype).requires_grad_(False)
    model.lm_head.adapters["lm_head"] = saved = Replacement(model.lm_head.weight)
    losses = [model(batch), token_loss(model, batch)]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    losses[0].backward()
    assert saved.weight.grad is not None
    assert saved.weight.grad.dtype == torch.float32
    assert saved.weight.grad.any()


def test_parameters_that_train_may_be_fp32_in_a_bf16_model(tools: Any, batch: Any) -> None:
    model = tools.ours({"attention_bias": True}, dtype=torch.bfloat16)
    plain = model(batch, logits=True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "bias" or parameter.dim() == 1 or module is model.model.embed_tokens:
                setattr(module, name, nn.Parameter(parameter.detach().float()))
    assert torch.equal(model(batch, logits=True), plain)
    model(batch).backward()
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32


def test_a_tied_head_has_no_parameter_and_cannot_be_parted(tools: Any, batch: Any) -> None:
    model = LlamaForCausalLM(tools.ours(TIED).config, dtype=torch.float32, device=META)
    assert "lm_head.weight" not in dict(model.named_parameters(remove_duplicate=False))
    assert next(iter(layout(model))) == "model.embed_tokens.weight"
    assert "lm_head" in {name for name, _, _ in linear_parts(model)}
    model.to_empty(device=CPU)
    draw(model, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(batch), tools.ours(TIED)(batch))
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    model.model.embed_tokens.weight = nn.Parameter(torch.zeros(97, 48))
    assert not model.lm_head.weight.any()


@pytest.fixture
def one_rank() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_by_blocks_and_root(tools: Any, batch: Any, one_rank: Any, tied: bool, recompute: str) -> None:
    config = tools.ours({"tie_word_embeddings": tied, "attention_bias": True}).config
    plain = LlamaForCausalLM(config, dtype=torch.float32, device=CPU)
    draw(plain, 3)
    sharded = LlamaForCausalLM(config, dtype=torch.float32, device=META)
    for block in blocks(sharded):
        block.recompute, block.keeps_attention = recompute != "none", recompute == "selective"
        fully_shard(block, mesh=one_rank)
    fully_shard(sharded, mesh=one_rank)
    sharded.to_empty(device=CPU)
    draw(sharded, 3, local_rows=lambda parameter: (parameter.to_local(), 0))
    losses = [model(batch) for model in (plain, sharded)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    gathered = {name: g.full_tensor() for name, g in tools.gradients(sharded).items() if isinstance(g, DTensor)}
    for name, gradient in tools.gradients(plain).items():
        assert torch.equal(gathered[name], gradient), name
    with torch.no_grad():
        assert torch.equal(plain(batch, logits=True), sharded(batch, logits=True))


def test_draw_is_by_name_and_place(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packtrain.model.llama._DRAWN_ROWS", 40)
    whole = tools.ours({"attention_bias": True})
    weights = dict(whole.named_parameters())
    for ranks in (2, 3, 5):
        for rank in range(ranks):
            model = tools.ours({"attention_bias": True}, seed=1)
            shards = {id(p): share(p, rank, ranks) for p in model.parameters()}
            draw(model, 0, local_rows=lambda p: shards[id(p)])  # noqa: B023
            for name, parameter in model.named_parameters():
                local, first = shards[id(parameter)]
                assert torch.equal(local, weights[name][first : first + len(local)]), name
    q, k = (weights["model.layers.0.self_attn.qkv_proj.weight"][a:b] for a, b in ((0, 48), (48, 72)))
    fewer_heads = tools.ours({"num_key_value_heads": 1}).get_parameter("model.layers.0.self_attn.qkv_proj.weight")
    assert torch.equal(fewer_heads[:48], q)
    assert not torch.equal(k, q[:24])


def share(parameter: torch.Tensor, rank: int, ranks: int) -> tuple[torch.Tensor, int]:
    """Rows of a rank, as FSDP cuts them."""
    rows = -(-len(parameter) // ranks)
    return parameter.detach()[rank * rows : (rank + 1) * rows], min(rank * rows, len(parameter))


def test_draw_gives_the_distribution(tools: Any) -> None:
    model = tools.ours({"attention_bias": True, "mlp_bias": True, "initializer_range": 0.05, "vocab_size": 5000})
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
    embedding = model.model.embed_tokens.weight
    assert abs(embedding.mean().item()) < 5e-4
    assert not torch.equal(embedding, model.lm_head.weight)
    assert not torch.equal(
        embedding, tools.ours({"vocab_size": 5000, "initializer_range": 0.05}, seed=1).lm_head.weight
    )


def test_runs_on_fake_tensors(tools: Any, batch: Any) -> None:
    config = tools.ours(TIED).config
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = LlamaForCausalLM(config, dtype=torch.bfloat16, device=CPU)
        for name, layer, part in list(linear_parts(model)):
            layer.adapters[part.name] = tools.fake_lora(name, layer.in_features, part.stop - part.start, 0.1)
        for block in blocks(model):
            block.recompute = True
        fake = type(batch)(**{f: convert(mode, getattr(batch, f)) for f in batch.__dataclass_fields__})
        loss = model(fake)
        loss.backward()
        assert loss.shape == ()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def convert(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
