"""The fused layer: parts, adapters, names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packtrain.model.linear import Linear, Piece, layout, linear_parts


class Plus(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor([amount]))

    def forward(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        return y + self.amount * keys.unsqueeze(1)


def layer() -> Linear:
    made = Linear(3, [("q_proj", 4), ("k_proj", 2)], bias=True, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_parts_are_rows_of_one_product() -> None:
    fused, x, keys = layer(), torch.randn(5, 3), torch.arange(5)
    expected = x @ fused.weight.T + fused.bias
    q, k = fused.split(x, keys)
    assert torch.equal(torch.cat([q, k], dim=1), fused(x, keys))
    torch.testing.assert_close(fused(x, keys), expected)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_an_adapter_changes_its_own_part() -> None:
    fused, x, keys = layer(), torch.randn(5, 3), torch.arange(5)
    plain = fused(x, keys)
    fused.adapters["k_proj"] = Plus(2.0)
    changed = fused(x, keys)
    assert torch.equal(changed[:, :4], plain[:, :4])
    assert torch.equal(changed[:, 4:], plain[:, 4:] + 2.0 * keys.unsqueeze(1))


def test_layout_tiles_every_parameter_with_hugging_faces_names(tools: Any) -> None:
    model = tools.ours({"attention_bias": True, "head_dim": 10})
    before = layout(model)
    assert before["model.layers.1.self_attn.qkv_proj.weight"] == (
        Piece("model.layers.1.self_attn.q_proj.weight", 0, 40),
        Piece("model.layers.1.self_attn.k_proj.weight", 40, 60),
        Piece("model.layers.1.self_attn.v_proj.weight", 60, 80),
    )
    for name, pieces in before.items():
        edges = [edge for piece in pieces for edge in (piece.start, piece.stop)]
        assert edges[0] == 0
        assert edges[-1] == model.get_parameter(name).shape[0]
        assert edges[1:-1:2] == edges[2::2]
    names = {piece.name.removesuffix(".weight") for pieces in before.values() for piece in pieces}
    parts = {name for name, _, _ in linear_parts(model)}
    assert parts <= names
    assert len(parts) == 2 * 7 + 1
    model.layers = None
    model.model.layers[0].mlp.gate_up_proj.adapters["up_proj"] = Plus(1.0)
    assert layout(model) == before
