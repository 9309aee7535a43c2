"""From one model to a sharded one, from the outside: recompute first, then shard.

    problems            what is wrong with a strategy and its group sizes
    parallelize         sets `recompute` on the blocks and wraps model and blocks in FSDP2, while still on meta
    materialise         memory for every tensor on meta
    set_gradient_sync, reduce_gradients     when gradients are summed over ranks (both do nothing where the other acts)
    sums_after      whether the second acts
    local_rows, gather  a parameter's rows on this rank, and the whole of it, sharded or not
    largest             of a value that each rank has of its rows of a parameter
    copies, reshard     ranks that hold the same gradient; back to shards after a forward without backward

Gradients are sums over ranks, never means: the step has divided each loss by all ranks' tokens already. Ranks of a
shard group are neighbours, so that by default they are on one machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from packtrain.distributed.collectives import sum_
from packtrain.distributed.place import Place
from packtrain.errors import raise_if

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")

BUCKET = 2**28
"""Elements of one all-reduce of unsharded gradients: 1 GiB of fp32, so that full fine-tuning is not held twice."""


def problems(
    world_size: int, local_world_size: int, strategy: str, shard_group: int | None, replica_group: int | None
) -> list[str]:
    """Sentences on what is wrong with a strategy and its group sizes (0 or None: by default) for so many ranks."""
    if strategy not in STRATEGIES:
        return [f"sharding_strategy {strategy!r} is unknown; there are {', '.join(STRATEGIES)}"]
    replicas, shards = group_sizes(world_size, local_world_size, strategy, shard_group, replica_group)
    if replicas * shards == world_size:
        return []
    return [
        f"sharding_group_size {shards} x replica_group_size {replicas} is {replicas * shards}, but there are "
        f"{world_size} ranks: give sizes whose product is {world_size}, or only one of them"
    ]


def group_sizes(
    world_size: int, local_world_size: int, strategy: str, shard_group: int | None, replica_group: int | None
) -> tuple[int, int]:
    """(copies of the model, ranks that share one copy)."""
    if strategy == "NO_SHARD":
        return world_size, 1
    if strategy != "HYBRID_SHARD":
        return 1, world_size
    shards = shard_group or (world_size // replica_group if replica_group else local_world_size)
    return replica_group or max(1, world_size // shards), shards


def parallelize(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    place: Place,
    strategy: str,
    *,
    shard_group: int | None = None,
    replica_group: int | None = None,
    recompute: bool,
    cpu_offload: bool = False,
) -> torch.device:
    """Prepare a model for this rank: `blocks` are recomputed in the backward if asked, and sharded one by one.

    Returns where to `materialise` it: this rank's device, or with `cpu_offload` the host, where shards then live (join
    with host collectives). One rank, and shard groups of one rank, leave the model unwrapped and where it computes.
    Raises UserError for group sizes that do not fit.
    """
    for block in blocks:
        block.recompute = recompute  # type: ignore[assignment]
    sizes = (place.world_size, place.local_world_size, strategy, shard_group, replica_group)
    raise_if(problems(*sizes))
    replicas, shards = group_sizes(*sizes)
    if shards == 1:
        return place.device
    mesh = _mesh(place.device.type, replicas, shards)
    frees = strategy != "SHARD_GRAD_OP"
    for block in blocks:
        _shard(block, mesh, frees, cpu_offload)
    # FSDP2's own choice for the root is to keep it gathered: its backward comes first, and the loss reads its head.
    _shard(model, mesh, None if frees else False, cpu_offload)
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other, and neither call reaches submodules
    return torch.device("cpu") if cpu_offload else place.device


def _mesh(device_type: str, replicas: int, shards: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _shard(module: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool | None, cpu_offload: bool) -> None:
    """Parameters keep their dtype when gathered (bf16 base beside fp32 adapters); gradients are reduced in fp32."""
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy(),
    )


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def materialise(model: nn.Module, device: torch.device, buffers: torch.device | None = None) -> None:
    """Give every tensor on meta memory on `device`, without values, and move the others there; pinned ones stay.

    Buffers are not sharded and do not come and go: if parameters are not where the model computes, they have `buffers`.
    """

    def placed(t: Tensor) -> Tensor:
        if t.is_meta:
            return torch.empty_like(t, device=device)
        on_purpose = t.device.type == "cpu" and device.type != "cpu" and t.is_pinned()  # model/streaming.py
        return t if on_purpose else t.to(device)

    model._apply(placed)  # type: ignore[no-untyped-call]
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(buffers or device))


def set_gradient_sync(model: nn.Module, last: bool, every: bool | None = None) -> None:
    """Say before a micro-batch whether its backward reduces gradients; nothing to say to an unwrapped model.

    The `last` one always does. With `every` each one does, and copies of the model are summed at the last: by default
    where most of the model learns, since unreduced gradients would be as large as that, and not for adapters.
    """
    if not isinstance(model, FSDPModule):
        return
    if every is None:
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        every = 2 * learning > sum(p.numel() for p in model.parameters())
    model.set_requires_gradient_sync(last or every)
    model.set_requires_all_reduce(last)  # after the call above, which sets it too


def sums_after(model: nn.Module, place: Place) -> bool:
    """Whether gradients of several ranks are left for `reduce_gradients` to sum: then they have to be fp32."""
    return place.world_size > 1 and not isinstance(model, FSDPModule)


@torch.no_grad()
def reduce_gradients(model: nn.Module, gradients: Sequence[Tensor], place: Place) -> None:
    """Sum an unwrapped model's fp32 gradients over all ranks, in place and flat; FSDP2 has summed a wrapped one's."""
    if not sums_after(model, place):
        return
    for bucket in _buckets(gradients):
        flat = sum_(torch.cat([gradient.flatten() for gradient in bucket]), place)
        parts = torch.split(flat, [gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(Tensor.numel, bucket)) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def copies(model: nn.Module, place: Place) -> int:
    """How many ranks hold the same reduced gradient (so that a norm over all ranks counts each once)."""
    if not isinstance(model, FSDPModule):
        return place.world_size
    sharded = next(p for p in model.parameters() if isinstance(p, DTensor))
    return prod(sharded.device_mesh.size(axis) for axis, how in enumerate(sharded.placements) if not how.is_shard())


def reshard(model: nn.Module) -> None:
    """Give back what a forward without backward left gathered; before parameters are written, or memory is short."""
    for module in _fsdp_modules(model):
        module.reshard()


@torch.no_grad()
def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """(this rank's rows as a plain tensor that shares the parameter's storage, the first one's place in the whole)."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    first, length = 0, rows
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            chunk = -(-length // mesh.size(axis))  # as torch.chunk: all equal but the last ones
            first += min(mesh.get_local_rank(axis) * chunk, length)
            length = chunk
    return parameter.to_local(), min(first, rows)


@torch.no_grad()
def largest(parameter: Tensor, value: Tensor) -> Tensor:
    """The largest of a 0-dim `value` that every rank has of its rows of a parameter; collective if it is sharded."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, found = parameter.device_mesh, value.clone()
    if mesh.device_type == "cuda":
        found = found.cuda()
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return found.to(value.device)


@torch.no_grad()
def gather(parameter: Tensor) -> Tensor:
    """The whole parameter as a plain tensor on every rank; collective if it is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
