"""Llama, every text generation of it, on packed rows.

    LlamaForCausalLM(config, dtype=, device=)    the model; called with a Batch it gives the sum of token losses
    blocks(model)                                the units to shard and to recompute
    draw(model, seed)                            random weights, each a function of (seed, Hugging Face's name)

Modules are named as Hugging Face names them, except that q, k, v and gate, up are one layer each (model/linear.py).
Inside, tokens are one axis: T = R * L tokens of a batch's R rows of L. Activations have the dtype the model was made
with; parameters that train may be fp32, and are cast where they are used.

The model reads no file, asks the device for nothing and keeps no buffers.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from packtrain.batch import Batch
from packtrain.kernels.attention import Kernel, attention, prepared
from packtrain.kernels.elementwise import rms_norm, swiglu, turn
from packtrain.kernels.head import HeadScale
from packtrain.kernels.loss import linear_cross_entropy
from packtrain.model.config import LlamaConfig
from packtrain.model.linear import Linear, Piece, TiedLinear, layout
from packtrain.model.rope import cos_sin
from packtrain.model.staging import Largest, Target, alone, staged

__all__ = ["LlamaConfig", "LlamaDecoderLayer", "LlamaForCausalLM", "blocks", "draw"]

Rope = tuple[Tensor, Tensor]
"""A batch's cosines and sines, [T, 1, head_dim / 2]."""


class LlamaForCausalLM(nn.Module):
    """The whole model. Parameters are made empty: load or `draw` them."""

    def __init__(self, config: LlamaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, dtype, device)
        self.lm_head: Linear
        if config.tie_word_embeddings:
            self.lm_head = TiedLinear("lm_head", self.model.embed_tokens)
        else:
            head = [("lm_head", config.vocab_size)]
            self.lm_head = Linear(config.hidden_size, head, bias=False, dtype=dtype, device=device)
        self.fast_norm: Callable[[Any, RMSNorm, Tensor | None], Tensor] | None = None
        """The last norm of a stream as fast layers leave it (model/fast.py)."""
        self.head_scale: HeadScale | None = None
        """Of layers whose products are float8: the gradient through a frozen head is one too."""

    def forward(self, batch: Batch, logits: bool = False) -> Tensor:
        """Sum over the labelled tokens of -log p, 0-dim fp32; or, if asked, all logits [R, L, V]."""
        hidden, keys = self.model(batch), batch.keys.view(-1)
        if logits:
            return cast(Tensor, self.lm_head(self._norm(hidden, None), keys)).view(*batch.ids.shape, -1)
        return self._loss(self._norm(hidden, batch.index), keys.index_select(0, batch.index), batch.targets)

    def _norm(self, hidden: Any, index: Tensor | None) -> Tensor:
        """The last norm of the rows of `index`, or of all."""
        if self.fast_norm is not None:
            return self.fast_norm(hidden, self.model.norm, index)
        return cast(Tensor, self.model.norm(hidden if index is None else hidden.index_select(0, index)))

    def _loss(self, hidden: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
        """The head is not called: its weight, or what an adapter makes of it, goes into the loss kernel."""
        weight: Tensor = self.lm_head.weight
        low_rank = scale = None
        if "lm_head" in self.lm_head.adapters:
            adapter: Any = self.lm_head.adapters["lm_head"]
            if hasattr(adapter, "columns"):
                low_rank = adapter.columns(hidden, keys), adapter.lora_B
            else:
                weight = adapter.weight
        elif self.head_scale is not None and hidden.requires_grad and not weight.requires_grad:
            scale = self.head_scale(weight)
        return linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, low_rank=low_rank, scale=scale)


class LlamaModel(nn.Module):
    """Embedding and decoder layers. `norm` belongs here by name; the head applies it, to the tokens it needs."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        rows, width = config.vocab_size, config.hidden_size
        table = torch.empty(rows, width, dtype=dtype, device=device)
        self.embed_tokens = nn.Embedding(rows, width, config.padding_row, _weight=table)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, dtype, device) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, dtype, device)
        self.first_position = 0
        """Position of a document's first token: not 0 where something learned stands before it."""
        self.kernel: Kernel = "auto"
        """Which attention the layers use."""

    def forward(self, batch: Batch) -> Tensor:
        """The residual stream after the last layer, [T, D]."""
        config = self.config
        shape = config.rope_parameters, config.head_dim, config.max_position_embeddings
        rope = cos_sin(*shape, batch, self.dtype, first_position=self.first_position)
        batch = prepared(batch, self.kernel, self.first_position, self.dtype, config.head_dim)
        x = self.embed_tokens(batch.ids.view(-1)).to(self.dtype)
        for layer in self.layers:
            x = layer(x, rope, batch)
        return cast(Tensor, x)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, dtype, device)
        self.self_attn = LlamaAttention(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(config, dtype, device)
        self.mlp = LlamaMLP(config, dtype, device)
        self.recompute = False
        """Keep only the layer's input for the backward, and compute the rest again there."""
        self.keeps_attention = False
        """Of a layer that is recomputed, keep attention's inputs and output too: it is not computed twice."""
        self.fast: Callable[[LlamaDecoderLayer, Any, Rope, Batch], Any] | None = None
        """Another form of the same computation, over few kernels (model/fast.py)."""
        self.away: Callable[[Any], AbstractContextManager[None]] | None = None
        """What keeps the layer's input elsewhere until the backward (model/offload.py)."""

    def forward(self, x: Tensor, rope: Rope, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]."""
        if self.away is None or not self.training:
            return self._formed(x, rope, batch)
        with self.away(x):
            return self._formed(x, rope, batch)

    def _formed(self, x: Tensor, rope: Rope, batch: Batch) -> Tensor:
        if self.fast is not None:
            return cast(Tensor, self.fast(self, x, rope, batch))
        if not (self.recompute and self.training):
            return self._forward(x, rope, batch)
        if not self.keeps_attention:
            return cast(Tensor, _again(self._forward, x, rope, batch))
        q, k, v = _again(self._before, x, rope, batch)
        return cast(Tensor, _again(self._after, x, self.self_attn.mix(q, k, v, batch), batch))

    def _forward(self, x: Tensor, rope: Rope, batch: Batch) -> Tensor:
        return self._after(x, self.self_attn.mix(*self._before(x, rope, batch), batch), batch)

    def _before(self, x: Tensor, rope: Rope, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the residual stream."""
        return self.self_attn.project(self.input_layernorm(x), rope, batch)

    def _after(self, x: Tensor, mixed: Tensor, batch: Batch) -> Tensor:
        """The stream after the layer, from that before it and what attention made."""
        x = x + cast(Tensor, self.self_attn.o_proj(mixed.flatten(1), batch.keys.view(-1)))
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x), batch))


def _again(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function` of the inputs, computed again in the backward instead of kept."""
    # Dropout is a function of the batch's keys, so there is no random state to bring back.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Prompt(Protocol):
    """What fills an attention's slot: attends in its stead, to the document and to something learned.

    q [T, Hq, d], k and v [T, Hkv, d], turned by rope; the layer's own projections, for what has the width of x.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, qkv_proj: Linear) -> Tensor: ...


class LlamaAttention(nn.Module):
    """Grouped-query attention with rope: `project`, `mix`, and then `o_proj`, which the layer calls."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
        self.qkv_proj = Linear(config.hidden_size, parts, config.attention_bias, dtype=dtype, device=device)
        output = [("o_proj", config.hidden_size)]
        self.o_proj = Linear(queries, output, config.attention_bias, dtype=dtype, device=device)
        self.prompt: nn.Module | None = None
        """The slot for a `Prompt`."""

    def project(self, x: Tensor, rope: Rope, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, Hq, d], k and v [T, Hkv, d]."""
        parts = self.qkv_proj.split(x, batch.keys.view(-1))
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in parts)
        # Attention keeps v for its backward: as a view it would keep q and k from before their rotation as well.
        return turn(q, *rope), turn(k, *rope), v.contiguous()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """-> [T, Hq, d]."""
        if self.prompt is None:
            return attention(q, k, v, batch)
        return cast(Prompt, self.prompt)(q, k, v, batch, self.qkv_proj)


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parts = [("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)]
        self.gate_up_proj = Linear(config.hidden_size, parts, config.mlp_bias, dtype=dtype, device=device)
        output = [("down_proj", config.hidden_size)]
        self.down_proj = Linear(config.intermediate_size, output, config.mlp_bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]."""
        keys = batch.keys.view(-1)
        if self.gate_up_proj.adapters:
            gate, up = self.gate_up_proj.split(x, keys)
            gated = F.silu(gate) * up
        else:
            gated = swiglu(self.gate_up_proj.product(x))
        return cast(Tensor, self.down_proj(gated, keys))


class RMSNorm(nn.Module):
    """x over its root mean square, in fp32 and back, then times the weight: Hugging Face's order of casts."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D] in x's dtype."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not self.weight.requires_grad:
            return rms_norm(x, self.weight, self.eps)
        return (self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)).to(x.dtype)


def blocks(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    """The units to shard, compile and recompute; what is not in one belongs to the model itself."""
    return [cast(LlamaDecoderLayer, layer) for layer in model.model.layers]


def _whole(parameter: Tensor) -> tuple[Tensor, int]:
    return parameter, 0


_DRAWN_ROWS = 4096
"""Rows drawn from one seed: a rank draws the blocks its rows are in, never a whole embedding."""

_DRAWN_AHEAD = 8
"""Parameters that are drawn at a time: most have few blocks for a machine's cores."""


@torch.no_grad()
def draw(
    model: LlamaForCausalLM,
    seed: int,
    local_rows: Callable[[Tensor], tuple[Tensor, int]] = _whole,
    copies: Mapping[str, tuple[Piece, ...]] | None = None,
    largest: Largest = alone,
) -> None:
    """Fill the base parameters: weights normal(0, initializer_range), norms one, biases zero.

    `local_rows` gives a parameter's rows on this rank and the number of the first, for sharded ones. Every value is
    a function of (seed, Hugging Face's name, place), drawn on the CPU: the same on any number of ranks. `copies`
    names further parameters and the tensors that they begin as. `largest` joins the scales of sharded float8 weights.
    """
    pending: deque[tuple[ExitStack, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for name, pieces in {**layout(model), **(copies or {})}.items():
            local, first = local_rows(model.get_parameter(name))
            if local.dim() == 1:
                local.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            stage = ExitStack()
            target = stage.enter_context(staged(model, name, local, local_rows, largest))
            spans = _drawn_blocks(pieces, first, first + local.shape[0])
            fill = partial(_draw_rows, target, first, seed, model.config.initializer_range)
            pending.append((stage, [pool.submit(fill, *block) for block in spans]))
            if len(pending) > _DRAWN_AHEAD:
                _settle(*pending.popleft())
        while pending:
            _settle(*pending.popleft())


def _settle(stage: ExitStack, drawn: list[Future[None]]) -> None:
    """Wait for a parameter's rows, and put them in place."""
    for rows in drawn:
        rows.result()
    stage.close()


def _drawn_blocks(pieces: Sequence[Piece], first: int, last: int) -> list[tuple[Piece, int, int]]:
    """(piece, top, bottom) of every block of rows that is drawn as one and meets rows [first, last)."""
    return [
        (piece, top, min(top + _DRAWN_ROWS, piece.stop))
        for piece in pieces
        for top in range(piece.start, piece.stop, _DRAWN_ROWS)
        if top < last and min(top + _DRAWN_ROWS, piece.stop) > first
    ]


def _draw_rows(target: Target, first: int, seed: int, spread: float, piece: Piece, top: int, bottom: int) -> None:
    """Rows [top, bottom) of a parameter, of which `target` has those from `first` on. Drawing is most of the time."""
    values = torch.empty(bottom - top, target.shape[1], dtype=torch.float32, device="cpu")
    values.normal_(0.0, spread, generator=_generator(f"{seed} {piece.name} {top - piece.start}"))
    low, high = max(top, first), min(bottom, first + target.shape[0])
    with torch.no_grad():
        target[low - first : high - first] = values[low - top : high - top].to(target.dtype)


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
