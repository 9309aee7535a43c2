"""How many floating-point operations a step is, and how fast they are done: --flop_counter.

    Cost            FLOPs a token, a labelled token and an attending pair cost a model, from its layers
    Work            how many of those batches hold: all that is computed, or what is no padding
    Count           what torch's FlopCounterMode sees while a step runs
    FlopCounter     the watch that puts them together, and model FLOPs over time and peak (MFU)

Model FLOPs are what the mathematics needs, two for a multiplication and its addition. A linear layer costs 2 for each
weight and token forward, 2 for the gradient of its input if anything below learns, 2 for its own gradient if it
learns: 6 where everything does, 4 for a frozen base under LoRA and 6 for the adapters. The head is for labelled
tokens only. Attention counts pairs that may see each other (causal, within documents): 4 for each value of the query
heads forward, and 2.5 times that backward, where every fused kernel makes the scores again (Dao 2023). Nothing else
that is recomputed counts, nor does padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from packtrain import log
from packtrain.batch import Batch
from packtrain.distributed.collectives import sum_
from packtrain.distributed.place import Place
from packtrain.kernels.operations import is_again
from packtrain.model.linear import Linear
from packtrain.model.llama import LlamaForCausalLM, blocks
from packtrain.peft.llama_adapter import AdaptionPrompt
from packtrain.peft.prefix import Prefix
from packtrain.train.watch import Watch

ATTENTION_BACKWARD = 2.5
"""Over its forward: five products where that has two."""

PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.4,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 311.9,
    "A800": 311.9,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 35.6,
}
"""Part of torch's name for a device -> dense 16-bit TFLOP/s with fp32 sums, from NVIDIA's data sheets."""


def peak(name: str) -> float | None:
    """TFLOP/s of the device that torch calls `name`; None if the table does not know it."""
    words = f" {name} "
    known = [key for key in PEAKS if f" {key} " in words or f" {key}-" in words]
    return PEAKS[max(known, key=len)] if known else None


class Work(NamedTuple):
    """What batches hold; cost is linear in it."""

    tokens: int
    labels: int
    pairs: int
    """Of a token and one that it sees, itself included."""

    @classmethod
    def computed(cls, batches: Sequence[Batch]) -> Work:
        """All of it, padding too, as SDPA computes attention: rows of one document to their ends."""
        pairs = 0
        for batch in batches:
            rows, length = batch.ids.shape
            pairs += _pairs([length] * rows if batch.whole_rows else batch.lengths)
        return cls(sum(b.ids.numel() for b in batches), sum(b.count for b in batches), pairs)

    @classmethod
    def useful(cls, batches: Sequence[Batch]) -> Work:
        """Without padding, which is the documents that have no label. Waits for the device."""
        pairs = 0
        for batch in batches:
            labelled = set(batch.documents.flatten()[batch.index].tolist())
            pairs += _pairs([length for number, length in enumerate(batch.lengths) if number in labelled])
        return cls(sum(b.tokens for b in batches), sum(b.count for b in batches), pairs)


def _pairs(lengths: Sequence[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


class Cost(NamedTuple):
    """FLOPs of a step, forward and backward, for each token, labelled token and pair."""

    token: int
    label: int
    pair: float

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Cost:
        """From the layers' sizes and what of them learns; sharded or not, quantised or not."""
        token, pair = 0, 0.0
        learns = _learns(model.model.embed_tokens)  # whether anything so far does, so that gradients go down to here
        for layer in blocks(model):
            attention, mlp = layer.self_attn, layer.mlp
            learns |= _learns(layer.input_layernorm)
            token += _linear(attention.qkv_proj, learns)
            learns |= _learns(attention.qkv_proj)
            query = attention.qkv_proj.parts[0]
            forward = 4 * (query.stop - query.start)
            pair += forward * (1 + ATTENTION_BACKWARD * (learns or isinstance(attention.prompt, Prefix)))
            learns |= attention.prompt is not None
            token += int(forward * (1 + ATTENTION_BACKWARD * learns)) * _places(attention.prompt)
            token += _linear(attention.o_proj, learns)
            learns |= _learns(attention.o_proj) or _learns(layer.post_attention_layernorm)
            token += _linear(mlp.gate_up_proj, learns)
            learns |= _learns(mlp.gate_up_proj)
            token += _linear(mlp.down_proj, learns)
            learns |= _learns(mlp.down_proj)
        return cls(token, _linear(model.lm_head, learns or _learns(model.model.norm)), pair)

    def flops(self, work: Work) -> float:
        """Of so much work."""
        return self.token * work.tokens + self.label * work.labels + self.pair * work.pairs


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _linear(layer: Linear, learns_below: bool) -> int:
    """FLOPs a token of a linear layer and its adapters, every matrix of which learns."""
    flops = 2 * layer.in_features * layer.out_features * (1 + learns_below + layer.weight.requires_grad)
    for adapter in layer.adapters.values():
        for matrix in (p for p in adapter.parameters() if p.dim() == 2):
            reads_input = matrix.shape[1] == layer.in_features
            flops += 2 * matrix.numel() * (3 if learns_below or not reads_input else 2)
    return flops


def _places(prompt: nn.Module | None) -> int:
    """How many learned keys every token of a layer sees."""
    if isinstance(prompt, AdaptionPrompt):
        return prompt.adaption_prompt.shape[1]
    return prompt.past_key_values.shape[0] if isinstance(prompt, Prefix) else 0


class Count:
    """FLOPs of what runs inside `with Count() as count`, by torch's FlopCounterMode: matrix products and attention.

    Causal attention counts for the pairs it has, which torch's own formulas count twice, and the products done in
    place and the CPU's attention count, which those leave out. Our own kernels count where they multiply.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.recomputed = 0
        """Of these, what torch.utils.checkpoint did again."""
        self._mode = FlopCounterMode(
            display=False, custom_mapping={op: self._noting(formula) for op, formula in _formulas().items()}
        )

    def __enter__(self) -> Count:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        self.flops = self._mode.get_total_flops()

    def _noting(self, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            flops = formula(*args, **kwargs)
            # A backward runs without gradients; a forward within it has them, or the fused layers say so.
            if torch._C._current_graph_task_id() != -1 and (torch.is_grad_enabled() or is_again()):
                self.recomputed += flops
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return count


def _formulas() -> dict[Any, Callable[..., int]]:
    """Operation -> (arguments, out_val) -> FLOPs: torch's, and those it has not or counts another way."""
    aten = torch.ops.aten
    formulas = dict(flop_registry)
    formulas[aten.addmm_] = formulas[aten.addmm] = _addmm
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        forward = getattr(aten, f"_scaled_dot_product_{name}")
        backward = getattr(aten, f"_scaled_dot_product_{name}_backward")
        formulas[forward] = _attention(forward, first=0, ratio=1.0)
        formulas[backward] = _attention(backward, first=1, ratio=ATTENTION_BACKWARD)
    return formulas


def _addmm(summed: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """torch's own formula takes the dtype of a sum in fp32, which stands fourth, for the result's shape."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _attention(op: Any, first: int, ratio: float) -> Callable[..., int]:
    """The formula of an SDPA kernel whose query is argument number `first`, key and value the next."""
    causal_at = [argument.name for argument in op.default._schema.arguments].index("is_causal")

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        query, key, value = args[first : first + 3]
        rows, keys = query.shape[2], key.shape[2]
        causal = args[causal_at] if len(args) > causal_at else kwargs.get("is_causal", False)
        pairs = rows * (rows + 1) // 2 if causal and rows == keys else rows * keys
        return int(2 * prod(query.shape[:2]) * pairs * (query.shape[3] + value.shape[3]) * ratio)

    return count


class FlopCounter(Watch):
    """Counts the step after `start` others, and times the next one, undisturbed, from idle device to idle device.

    Where there is no next one the counted step is timed, which is slower than others. While it counts, attention is
    SDPA's, whose operations torch can count. Ranks are alike; figures are of one of them.
    """

    def __init__(self, model: LlamaForCausalLM, place: Place, *, start: int, total_steps: int) -> None:
        self._model, self._place = model, place
        self._start, self._total_steps = start, total_steps
        self._seen = 0
        self._count: tuple[Count, float, int] | None = None
        self._found: dict[str, Any] = {"model_tflops": None}

    def step(self, number: int, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """Counts or times the step if it is its turn."""
        self._seen += 1
        counts = self._seen == self._start + 1
        times = self._seen == self._start + 2 or (counts and number == self._total_steps)
        return self._measured(number, batches, counts, times) if counts or times else super().step(number, batches)

    def finish(self) -> dict[str, Any]:
        """model_tflops (a rank, None if the run was too short), mfu, model_flops, counted_flops, recomputed_flops."""
        if self._found["model_tflops"] is None:
            log.warn(f"--flop_counter: the run had {self._seen} steps, and only what comes after {self._start} counts")
        return self._found

    @contextmanager
    def _measured(self, number: int, batches: Sequence[Batch], counts: bool, times: bool) -> Iterator[None]:
        model_flops = Cost.of(self._model).flops(Work.useful(batches))
        _wait(self._place.device)
        began = time.perf_counter()
        if counts:
            with self._countable(), Count() as count:
                yield
            self._count = count, model_flops, number
        else:
            yield
        _wait(self._place.device)
        if times:
            self._report(number, model_flops, time.perf_counter() - began)

    @contextmanager
    def _countable(self) -> Iterator[None]:
        llama = self._model.model
        kernel = llama.kernel
        llama.kernel = "sdpa" if kernel in ("auto", "flash", "flex") else kernel
        try:
            yield
        finally:
            llama.kernel = kernel

    def _report(self, number: int, model_flops: float, seconds: float) -> None:
        """`model_flops` of this rank; those of all are summed."""
        assert self._count is not None
        count, model_flops_then, counted = self._count
        total = torch.tensor([model_flops], dtype=torch.float64, device=self._place.device)
        total_flops = float(sum_(total, self._place).item())
        rate = total_flops / self._place.world_size / seconds / 1e12
        name, top = _device(self._place.device, self._model.model.dtype)
        mfu = rate / top if top else None
        self._found = {
            "model_tflops": rate,
            "mfu": mfu,
            "model_flops": total_flops,
            "counted_flops": count.flops,
            "recomputed_flops": count.recomputed,
        }
        log.say(
            f"FLOPs: the model needs {_tera(model_flops)} TFLOP in step {number}, padding and recomputation left out; "
            f"torch counted {_tera(count.flops)} in step {counted}, {_tera(count.recomputed)} of them recomputed"
        )
        all_rate = count.flops * (model_flops / model_flops_then if model_flops_then else 0.0) / seconds
        slow = ", slowed down by counting, as no step came after it" if number == counted else ""
        share = f"MFU {mfu:.1%} of the {top:.4g} TFLOP/s of {name}" if mfu else f"no peak is known for {name}: no MFU"
        log.say(
            f"FLOPs: {rate:.4g} TFLOP/s of the model a rank, {_tera(all_rate)} with all that was counted "
            f"({seconds:.4g} s{slow}); {share}"
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(device: torch.device, dtype: torch.dtype) -> tuple[str, float | None]:
    """(name, its peak in 16 bits, if that is what the model computes in)."""
    if device.type != "cuda":
        return f"a {device.type}", None
    name = torch.cuda.get_device_name(device)
    if dtype == torch.float32:
        return f"{name} in fp32", None
    return name, peak(name)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"
