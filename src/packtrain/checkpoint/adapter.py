"""A PEFT adapter's folder: adapter_config.json and adapter_model.safetensors, in and out.

read_adapter_config   the JSON, as it is
adapter_problems      everything in a saved adapter that does not fit the model
load_adapter          its rows into this rank's adapters
compare               a saved adapter with the live one, by each rank's own rows
save_adapter          gathered whole, written by one rank, read back and compared before it counts
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from packtrain.checkpoint.files import replacing, sweep, sync_folder, write_text
from packtrain.checkpoint.folder import count, link_problem, listed
from packtrain.checkpoint.hf import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from packtrain.checkpoint.tensorfile import DTYPES, BadFile, Slot, TensorWriter, read_header, unique_keys
from packtrain.distributed.parallelize import gather, local_rows
from packtrain.errors import Fault, UserError, raise_if
from packtrain.model.linear import layout
from packtrain.peft import adapter_tensors
from packtrain.peft.targets import ties
from packtrain.peft.tensors import PREFIX, LocalRows, Saved

_BASE = ".base_layer."


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder. Raises UserError if there is none or it is no JSON object."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder}: no {ADAPTER_CONFIG} there; expected an adapter's folder, saved by packtrain or peft"
        )
    try:
        if leads_out := link_problem(path, folder):
            raise ValueError(leads_out)
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save, copy or download the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object such as peft writes")
    return config


def adapter_problems(model: nn.Module, folder: Path) -> list[str]:
    """A sentence for all in a saved adapter that does not fit `model` (with its adapters installed, meta or not)."""
    try:
        return _fit(model, slots_of(folder), folder / ADAPTER_WEIGHTS)
    except UserError as error:
        return error.problems


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path, local_rows: LocalRows = local_rows) -> None:
    """Fill the model's adapters, and the layers trained whole beside them, with this rank's rows of a saved adapter.

    The base weights must be in place. Raises UserError with everything that is missing, unknown or misshaped.
    """
    raise_if(adapter_problems(model, folder))
    path = folder / ADAPTER_WEIGHTS
    parameters = dict(model.named_parameters())
    filled: dict[Saved, str] = {}
    with safe_open(str(path), framework="pt", device="cpu") as file:
        for name, saved in adapter_tensors(model).items():
            twin = filled.setdefault(saved, name)
            for place, ours in enumerate(saved.parameters):
                held = local_rows(parameters[ours])
                local, rows = _mine(file, name, saved, held, place)
                if twin == name:
                    local.copy_(rows)
                elif not torch.equal(rows, _mine(file, twin, saved, held, place)[1]):
                    raise UserError(
                        f"{path}: {twin} and {name} differ, and in this model they are one weight "
                        "(tie_word_embeddings); such an adapter, trained with the two apart, cannot be continued here"
                    )
        for name, saved in _base_copies(model, file.keys()).items():
            local, rows = _mine(file, name, saved, local_rows(parameters[saved.parameter]))
            if not torch.allclose(local.float().cpu(), rows.float(), rtol=2**-7, atol=1e-6):
                raise UserError(
                    f"{path}: {name} is not the base model's weight; the adapter belongs to another base model"
                )


@torch.no_grad()
def compare(model: nn.Module, folder: Path, local_rows: LocalRows = local_rows) -> None:
    """Open a saved adapter as a reader would, and compare every element of this rank's rows. Raises Fault."""
    path = folder / ADAPTER_WEIGHTS
    parameters = dict(model.named_parameters())
    table = adapter_tensors(model)
    with safe_open(str(path), framework="pt", device="cpu") as file:
        if missing := sorted(set(table) - set(file.keys())):
            raise Fault(f"{path}: the saved adapter lacks {listed(missing)}, which the model has")
        for name, saved in table.items():
            for place, ours in enumerate(saved.parameters):
                live, rows = _mine(file, name, saved, local_rows(parameters[ours]), place)
                if not torch.equal(live.float().cpu().view(torch.int32), rows.float().view(torch.int32)):
                    raise Fault(f"{path}: {name} is saved with other values than the model has; do not use this file")


def save_adapter(model: nn.Module, out: Path, config: Mapping[str, Any], *, leads: bool = True) -> None:
    """Write the adapter in PEFT's format, fp32; collective: every rank calls it, the one that `leads` writes.

    Raises Fault on the leader if the disk refuses or what was read back differs; an adapter in `out` is not damaged.
    """
    tensors = _gathered(model, leads)
    if not leads:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        with replacing(out / ADAPTER_WEIGHTS) as file:
            writer = TensorWriter(file, [(name, tuple(t.shape)) for name, t in tensors.items()], torch.float32)
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            file.flush()
            _compare(Path(file.name), tensors)
            _write_config(out, config)
    except OSError as error:
        raise Fault(f"{out}: the adapter could not be saved ({error})") from error


def _gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The adapter's tensors, fp32 on the CPU, gathered one parameter at a time; none where they are not kept."""
    parameters = dict(model.named_parameters())
    table = adapter_tensors(model)
    if not table:
        raise ValueError("the model has no adapter to save")
    names: dict[str, list[str]] = {}
    for name, saved in table.items():
        for ours in saved.parameters:
            names.setdefault(ours, []).append(name)
    columns: dict[str, list[Tensor]] = {}
    for ours, theirs in names.items():
        whole = gather(parameters[ours])
        for name in theirs if keep else ():
            columns.setdefault(name, []).append(whole[table[name].start : table[name].stop].float().cpu())
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for name, parts in columns.items()}


def _write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Another adapter's weights go before its configuration does: the two never mix."""
    path = out / ADAPTER_CONFIG
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    (out / ADAPTER_WEIGHTS).unlink(missing_ok=True)
    sync_folder(out)
    write_text(path, text)


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every bit of what is on the disk, through the library that others read it with."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        names = set(file.keys())
        if names != set(tensors):
            raise Fault(
                f"{path}: {len(names)} tensors were read back where {len(tensors)} were written; check the disk"
            )
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name).view(torch.int32), tensor.contiguous().view(torch.int32)):
                raise Fault(f"{path}: {name} was read back with other values than were written; check the disk")


def slots_of(folder: Path) -> dict[str, Slot]:
    """What tensors a saved adapter has. Raises UserError if it is pickled, leads out of its folder, or is damaged."""
    path = folder / ADAPTER_WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder}: its weights are pickled (adapter_model.bin); only {ADAPTER_WEIGHTS} is read, for a pickle can "
            "run code. If you trust it, load it with peft and save it again with save_pretrained"
        )
    try:
        if leads_out := link_problem(path, folder):
            raise BadFile(leads_out)
        return read_header(path)
    except (BadFile, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def _fit(model: nn.Module, slots: Mapping[str, Slot], path: Path) -> list[str]:
    table = adapter_tensors(model)
    parameters = dict(model.named_parameters())
    wanted = {name: _shape(saved, parameters) for name, saved in table.items()}
    copies = _base_copies(model, slots)
    wanted_copies = {name: tuple(parameters[s.parameter].shape) for name, s in copies.items()}
    missing = [name for name in wanted if name not in slots]
    unknown = [name for name in slots if name not in wanted and name not in copies]
    both = [(name, slots[name], shape) for name, shape in (wanted | wanted_copies).items() if name in slots]
    shapes = [
        f"{name} is {list(slot.shape)}, expected {list(shape)}" for name, slot, shape in both if slot.shape != shape
    ]
    kinds = [
        f"{name} is {slot.dtype}, expected {', '.join(DTYPES)}" for name, slot, _ in both if slot.dtype not in DTYPES
    ]
    found = [
        f"{count(names, what)}: {listed(names)}"
        for names, what in (
            (missing, "missing"),
            (unknown, "not of this adapter"),
            (shapes, "of the wrong shape"),
            (kinds, "of the wrong dtype"),
        )
        if names
    ]
    if not found:
        return []
    return [f"{path}: {'; '.join(found)}; the file must belong to {ADAPTER_CONFIG} beside it and to the base model"]


def _base_copies(model: nn.Module, names: Iterable[str]) -> dict[str, Saved]:
    """Frozen base weights that peft puts into the file where lm_head is a target -> our rows of them."""
    places = {piece.name: Saved(ours, piece.start, piece.stop) for ours, ps in layout(model).items() for piece in ps}
    parameters = dict(model.named_parameters())
    places |= {shared: Saved(own, 0, parameters[own].shape[0]) for shared, own in ties(model).items()}
    ours = adapter_tensors(model)  # a trained bias of a layer with a LoRA has such a name too
    found = {
        name: name.removeprefix(PREFIX).replace(_BASE, ".") for name in names if _BASE in name and name not in ours
    }
    return {name: places[theirs] for name, theirs in found.items() if theirs in places}


def _shape(saved: Saved, parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    rows, columns = saved.stop - saved.start, parameters[saved.parameter].shape[1:]
    return (rows, len(saved.parameters) * columns[0]) if saved.beside else (rows, *columns)


def _mine(file: Any, name: str, saved: Saved, held: tuple[Tensor, int], place: int = 0) -> tuple[Tensor, Tensor]:
    """The part of `held` (a rank's rows, the first one's number) that is the tensor's, and the file's values for it.

    `held` is of the tensor's parameter number `place`, from left to right.
    """
    local, first = held
    start = max(first, saved.start)
    stop = max(start, min(first + local.shape[0], saved.stop))
    mine = local[start - first : stop - first]
    if stop <= start:
        return mine, torch.empty(mine.shape)
    columns = (slice(place * mine.shape[1], (place + 1) * mine.shape[1]),) if saved.beside else ()
    return mine, file.get_slice(name)[(slice(start - saved.start, stop - saved.start), *columns)]
