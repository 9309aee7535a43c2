"""Out of memory: what is in it, in words, and the one or two flags that would need less.

    Shortage(...).fault(doing, error, batches)      the error that a user sees

Sizes are told from shapes: when memory is gone nothing is left to measure with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from packtrain.batch import Batch
from packtrain.configs.run import RunConfig
from packtrain.distributed.parallelize import local_rows, sums_after
from packtrain.distributed.place import Place
from packtrain.errors import Fault
from packtrain.kernels.loss import CHUNK_LOGITS
from packtrain.model.activations import kept_bytes
from packtrain.model.streaming import streamable
from packtrain.optim import Optimizer
from packtrain.peft.trainable import trainable

GIB = 2**30
FLAGS = 2
"""Ways out that are named."""


class Shortage:
    """Of one run on one rank."""

    def __init__(self, cfg: RunConfig, model: nn.Module, optimizer: Optimizer, place: Place) -> None:
        self._cfg, self._model, self._optimizer, self._place = cfg, model, optimizer, place

    def fault(self, doing: str, error: Exception, batches: Sequence[Batch]) -> Fault:
        """Names the step, the micro-batch, the largest tensors, and what would fit."""
        tokens = max((batch.ids.numel() for batch in batches), default=0)
        shape = next((tuple(batch.ids.shape) for batch in batches if batch.ids.numel() == tokens), None)
        sizes = sorted(self._sizes(tokens, batches), key=lambda pair: -pair[1])
        listed = ", ".join(f"{what} {size / GIB:.2f} GiB" for what, size in sizes if size > 0.01 * sizes[0][1])
        over = f", in a micro-batch of {shape[0]} rows x {shape[1]} tokens" if shape else ""
        ways = "; or ".join(self._ways(sizes[0][0], batches)[:FLAGS])
        if self._cfg.train_config.on_oom == "split" and isinstance(self._model, FSDPModule):
            ways += ". --on_oom split can do nothing here: ranks that share weights wait for one another in every layer"
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Fault(
            f"{doing}: rank {self._place.rank} is out of memory{over} ({said}). There by its shapes: {listed}. "
            f"What needs less: {ways}"
        )

    def _sizes(self, tokens: int, batches: Sequence[Batch]) -> Iterator[tuple[str, int]]:
        """(what, bytes on this rank)."""
        model, learns = self._model, trainable(self._model)
        held = [*(local_rows(p)[0] for p in model.parameters()), *model.buffers()]
        yield "weights", _bytes(tensor for tensor in held if tensor.device.type == self._place.device.type)
        yield "gradients", sum(self._gradient_bytes(name, parameter) for name, parameter in learns.items())
        yield "optimizer state", _bytes(t for state in self._optimizer.state().values() for t in state.values())
        if tokens:
            layers = cast(Any, model).model.layers
            kind = self._recompute
            rest = "inputs" if kind in {"full", "offload"} else "activations"
            form = None if layers[0].fast is None else layers[0].fast.shared.form
            yield f"{rest} of {len(layers)} layers", kept_bytes(model, tokens, kind, form)
            vocabulary = cast(Any, model).config.vocab_size
            if form is not None and form.float8:
                yield "the head in float8", vocabulary * cast(Any, model).config.hidden_size
            labels = max(batch.count for batch in batches)
            yield "logits", 8 * vocabulary * min(labels, max(1, CHUNK_LOGITS // vocabulary))

    def _gradient_bytes(self, name: str, parameter: nn.Parameter) -> int:
        """fp32 of what is a sum or goes to a master; else as it comes."""
        summed = self._cfg.train_config.gradient_accumulation_steps > 1 or sums_after(self._model, self._place)
        wide = summed or "master" in self._optimizer.state()[name]
        return local_rows(parameter)[0].numel() * (4 if wide else parameter.itemsize)

    @property
    def _recompute(self) -> Any:
        """As the layers were made, whatever auto chose."""
        layer = cast(Any, self._model).model.layers[0]
        if layer.away is not None:
            return "offload"
        if layer.fast is not None:
            return layer.fast.recompute
        if not layer.recompute:
            return "none"
        return "selective" if layer.keeps_attention else "full"

    def _ways(self, largest: str, batches: Sequence[Batch]) -> list[str]:
        """Flags that need less, the most to the point first."""
        train, ways = self._cfg.train_config, []
        rows = train.batch_size_training
        grows = largest == "logits" or "layers" in largest
        if batches and self._recompute not in {"full", "offload"}:
            ways.append("--activation_checkpointing full (a third more computing)")
        elif batches and self._recompute == "full" and self._place.device.type == "cuda":
            ways.append("--activation_checkpointing offload (the host's memory takes the layers' inputs)")
        if batches and rows > 1:
            half, twice = rows // 2, 2 * train.gradient_accumulation_steps
            same = "the same numbers" if rows % 2 == 0 else f"steps of {half * twice} rows a worker instead of {rows}"
            ways.append(f"--batch_size_training {half} --gradient_accumulation_steps {twice} ({same})")
        elif batches and train.batching_strategy == "packing":
            ways.append(f"--context_length {train.context_length // 2}, if your samples are no longer")
        if batches and train.on_oom == "stop" and not isinstance(self._model, FSDPModule):
            ways.append("--on_oom split, which parts micro-batches when it has to")
        held = self._less_held()
        return [*ways, *held] if grows else [*held, *ways]

    @property
    def _could_stream(self) -> bool:
        """Whether layers could live on the host as they are, one process's."""
        on_gpu = self._place.device.type == "cuda" and not isinstance(self._model, FSDPModule)
        return on_gpu and cast(Any, self._model).model.layers[0].fast is not None and bool(streamable(self._model))

    def _less_held(self) -> list[str]:
        """Ways to keep less from step to step."""
        train, fsdp, ways = self._cfg.train_config, self._cfg.fsdp_config, []
        if not train.use_peft:
            ways.append("--use_peft, which trains an adapter instead of every weight")
        elif train.quantization is None:
            ways.append("--quantization 4bit")
        if self._place.world_size > 1 and fsdp.sharding_strategy == "NO_SHARD":
            ways.append("--sharding_strategy FULL_SHARD")
        elif isinstance(self._model, FSDPModule) and not fsdp.fsdp_cpu_offload:
            ways.append("--fsdp_cpu_offload (slow)")
        elif self._could_stream and not fsdp.fsdp_cpu_offload:
            ways.append("--fsdp_cpu_offload, which keeps what does not fit of the frozen base on the host")
        if train.gpu_memory_limit:
            ways.append("a higher --gpu_memory_limit")
        if not train.use_peft and not fsdp.pure_bf16:
            ways.append("--pure_bf16 --optimizer anyprecision --moments 8bit, 6 bytes a weight instead of 14")
        elif not train.use_peft and fsdp.optimizer == "anyprecision" and fsdp.moments == "bf16":
            ways.append("--moments 8bit, 6 bytes a weight instead of 8")
        return ways or ["a smaller model, or more GPUs"]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all, storage that is shared once."""
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"}
    return sum(seen.values())
