"""Decoder layers as one operation each: forward and backward written out over few kernels.

    obstacle            why a model cannot take this form, or None
    install             gives it to every layer; before sharding, on meta
    allocate            memory for the weights of an unsharded model, with room for the adapters' columns; not for a
                        quantised base, whose weights are made for each use
    final_norm          the last norm, of the rows that the loss needs

What it computes is what model/llama.py's layers compute; those stay, as its definition and for all that does not fit.
Why it is faster: adapters ride in the base's products (kernels/lowrank.py), everything between two products is one
kernel a row (kernels/rows.py), the base may be float8 (kernels/float8.py), and a layer can be recomputed from its
input and its attention's output alone, without its last product.

The residual stream between layers is a pair (x, delta) whose sum it is: the next norm's kernel adds them. Nothing here
asks the device.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from packtrain.kernels import float8, rows
from packtrain.kernels.head import HeadScale
from packtrain.kernels.lowrank import Plan, Span, storage
from packtrain.kernels.rows import Form, Raw
from packtrain.model.fast_layer import FastLayer, Recompute, Stream
from packtrain.model.linear import Linear
from packtrain.model.long_rows import LongLayer
from packtrain.model.quantised import QuantisedLinear
from packtrain.model.shared import Shared, linears

__all__ = ["FastLayer", "Recompute", "allocate", "final_norm", "install", "obstacle"]


def obstacle(model: nn.Module, device: torch.device, form: Form) -> str | None:
    """What of a model (adapters installed, meta or not) this form cannot do, in a few words."""
    if not rows.HAS_TRITON and device.type == "cuda":
        return "Triton is not installed"
    if device.type == "cuda" and form.dtype not in {torch.bfloat16, torch.float16}:
        return f"{form.dtype} is computed by other kernels"
    for layer in _layers(model):
        learning = [parameter.requires_grad for parameter in _base(layer)]
        if any(learning) and (form.float8 or not all(learning)):
            return "weights of the base are trained" + ("" if form.float8 else ", but not all of a layer's")
        if getattr(layer.self_attn, "prompt", None) is not None:
            return "an adapter takes part in attention"
        for linear in linears(layer):
            if linear.bias is not None:
                return "linear layers have a bias"
            if isinstance(linear, QuantisedLinear) and linear.dtype != form.dtype:
                return f"products of the quantised base are in {linear.dtype}, all else in {form.dtype}"
            if linear.out_features % 16 or linear.in_features % 16:
                return "a linear layer's size is no multiple of 16"
            if found := _adapters_obstacle(linear):
                return found
    return None


def _adapters_obstacle(linear: Linear) -> str | None:
    adapters: list[Any] = list(linear.adapters.values())
    if not all(hasattr(adapter, "lora_A") for adapter in adapters):
        return "whole layers are trained beside the adapters"
    if len({(adapter.lora_A.shape[0], adapter.scale, adapter.dropout) for adapter in adapters}) > 1:
        return "adapters of one layer differ in rank"
    return None


def _layers(model: nn.Module) -> list[Any]:
    return list(cast(Any, model).model.layers)


def _base(layer: Any) -> list[nn.Parameter]:
    norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    return [linear.weight for linear in linears(layer)] + norms


def install(model: nn.Module, form: Form, recompute: Recompute) -> None:
    """Let every layer take this form. A float8 base changes its weights' dtype, and gets their scales as buffers."""
    shared = Shared(form, keeps_transposed=recompute == "none")
    for layer in _layers(model):
        products = linears(layer)
        if form.float8:
            for linear in products:
                device = linear.weight.device
                empty = torch.empty(linear.weight.shape, dtype=float8.E4M3, device=device)
                linear.weight = nn.Parameter(empty, requires_grad=False)
                most = max(linear.weight.shape)  # the one scale, for as many rows as the weight or its transpose has
                linear.register_buffer("weight_scale", torch.empty(most, dtype=torch.float32, device=device), False)
        adapters: list[list[Any]] = [_adapters(linear) for linear in products]
        layer.fast = LongLayer(
            shared,
            tuple(map(plan_of, products)),
            recompute,
            trains=all(parameter.requires_grad for parameter in _base(layer)),
            names=tuple(tuple(adapter.name for adapter in some) for some in adapters),
            dropout=max((adapter.dropout for some in adapters for adapter in some), default=0.0),
        )
    cast(Any, model).fast_norm, cast(Any, model).head_scale = final_norm, HeadScale() if form.float8 else None


def _adapters(linear: Linear) -> list[Any]:
    return [linear.adapters[part.name] for part in linear.parts if part.name in linear.adapters]


def plan_of(linear: Linear) -> Plan:
    """Shapes of a layer and its adapters."""
    adapted = [part for part in linear.parts if part.name in linear.adapters]
    if not adapted:
        return Plan(linear.out_features, linear.in_features, (), 0, 1.0)
    first: Any = linear.adapters[adapted[0].name]
    rank = first.lora_A.shape[0]
    spans = tuple(Span(part.start, part.stop, i * rank) for i, part in enumerate(adapted))
    return Plan(linear.out_features, linear.in_features, spans, rank, float(first.scale))


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for the fast layers' weights, without values, where they have none; for a model that is not sharded."""
    for layer in _layers(model):
        fast: FastLayer = layer.fast
        if fast.shared.form.float8 or not fast.trains:
            fast.number = len(fast.shared.layers)
            fast.shared.layers.append(layer)
        if not linears(layer)[0].weight.is_meta:
            continue  # it is on the host (model/streaming.py)
        for linear, plan in zip(linears(layer), fast.plans, strict=True):
            whole = storage(plan, fast.shared.form, device)
            linear.weight = nn.Parameter(whole[: plan.n, : plan.k], requires_grad=linear.weight.requires_grad)
        fast.lasting = True


def final_norm(stream: Stream, norm: Any, index: Tensor | None) -> Tensor:
    """The norm of the stream's rows of `index` int64 [N], or of all: [N, D]."""
    x, delta = stream if isinstance(stream, tuple) else (stream, None)
    return cast(Tensor, _FinalNorm.apply(x, delta, norm.weight, norm.eps, index))  # type: ignore[no-untyped-call]


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, index: Tensor | None) -> Tensor:
        change = None if delta is None else Raw(delta)
        z, rstd, y = rows.add_norm(x, change, weight, eps, Form(x.dtype, float8=False), 0, index)
        ctx.save_for_backward(z, weight, rstd, index)
        ctx.count = x.shape[0]
        return y.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, rstd, index = ctx.saved_tensors
        dy = dy.contiguous()
        if index is None:
            dz, _, dweight = rows.norm_backward(Raw(dy), z, weight, rstd, None, Form(z.dtype, float8=False), 0)
        else:
            dz, dweight = rows.norm_backward_at(dy, z, weight, rstd, index, ctx.count)
        dweight = None if dweight is None else dweight.to(weight.dtype)
        return dz, dz if ctx.needs_input_grad[1] else None, dweight, None, None
