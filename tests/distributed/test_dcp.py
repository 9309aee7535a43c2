"""Checkpoints from 2 ranks, loaded by 1, 3 and 4, where rows do not divide: every tensor has the same bits.

What a checkpoint holds is judged by the safetensors library and json alone, against tensors gathered from the live
model and optimizer on two ranks, cut into Hugging Face's by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import apart
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM as TheirLlama

import tiny
from packtrain import building, log, preflight
from packtrain.checkpoint import dcp
from packtrain.checkpoint.dcp_folder import StepFolder, complete, verify
from packtrain.checkpoint.tensorfile import read_header
from packtrain.configs.parse import build
from packtrain.distributed.place import Place
from packtrain.errors import Fault
from packtrain.model.llama import LlamaForCausalLM
from packtrain.optim import Optimizer
from packtrain.optim.rules import has_torchao
from packtrain.train.step import step_vector, train_step

SIZES = {"vocab_size": 391, "hidden_size": 32, "intermediate_size": 44, "attention_bias": True}
"""q, k and v have 32, 16 and 16 rows: the fused 64 are cut elsewhere by 2, 3 and 4 ranks. 391 divides by none."""

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, tied, masters": {"tied": True, "fsdp_config.pure_bf16": True},
    "full, 8 bits": {"fsdp_config.pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit"},
    "full, copies": {"fsdp_config.sharding_strategy": "NO_SHARD"},
    "lora": {
        "use_peft": True,
        "lora_config": {
            "r": 3,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "modules_to_save": ["k_proj", "norm", "embed_tokens"],
        },
    },
    "prefix": {"use_peft": True, "peft_method": "prefix", "num_virtual_tokens": 5},
}
if has_torchao():
    CASES["full, 8-bit moments"] = {"fsdp_config.optimizer": "adamw8bit"}
KINDS: tuple[dcp.Kind, ...] = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    for tied in (False, True):
        tiny.model(folder / f"base-{tied}", tie_word_embeddings=tied, **SIZES)
    tiny.grammar(folder / "rows.csv", 8)
    return folder


def built(place: Place, root: Path, case: str, **flags: Any) -> tuple[LlamaForCausalLM, Optimizer, Any]:
    """A run's model, optimizer and first batches."""
    torch.compiler.set_stance("force_eager")  # torchao compiles its update, which takes a minute on a CPU
    settings = dict(CASES[case])
    data = str(root / "rows.csv")
    cfg = build(
        model_name=str(root / f"base-{settings.pop('tied', False)}"),
        dataset="grammar_dataset",
        grammar_dataset={"train_split": data, "test_split": data},
        batching_strategy="padding",
        lr=0.02,
        **settings,
        **flags,
    )
    inputs = preflight.inputs(cfg, apart(place, case))
    model = building.build(cfg, inputs, place)
    loader, _ = building.loaders(cfg, inputs, place)
    return model, building.optimizer_of(cfg, model, 1, 1)[0], loader.step(0)


def rows_in(model: LlamaForCausalLM, optimizer: Optimizer, case: str) -> dict[str, dcp.Rows]:
    return dcp.rows_of(model, optimizer, adapter="use_peft" in CASES[case])


def nothing(folder: StepFolder) -> None:
    """The small files of these checkpoints."""


def whole_states(model: LlamaForCausalLM, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Our name -> the parameter ("") and each of its states, gathered by torch."""
    parameters, found = dict(model.named_parameters()), {}
    for name, state in optimizer.state().items():
        parameter = parameters[name]
        found[name] = {"": gathered(parameter)}
        for kind, tensor in state.items():
            like = tensor.ndim > 0 and isinstance(parameter, DTensor)
            found[name][kind] = gathered(sharded_like(tensor, parameter)) if like else tensor.clone()
    return found


def gathered(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        known = tensor.int() if tensor.dtype == torch.int16 else tensor  # gloo gathers no int16
        return known.full_tensor().detach().to(tensor.dtype, copy=True)
    return tensor.detach().clone()


def sharded_like(local: Tensor, parameter: DTensor) -> DTensor:
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def saved_on_two(place: Place, root: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Each case after one step, saved in both kinds; its tensors, whole."""
    log.quiet()
    group, found = dcp.saving_group(), {}
    for case, settings in CASES.items():
        model, optimizer, batches = built(place, root, case)
        agreed = step_vector(batches, False, place.device)
        train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
        rows = rows_in(model, optimizer, case)
        for kind in KINDS:
            name = "adapter_model" if "use_peft" in settings else "model"
            dcp.save(root / case / kind, 1, rows, nothing, group=group, kind=kind, weights=name)
        found[case] = whole_states(model, optimizer)
    return found


@pytest.fixture(scope="module")
def live(root: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    first, second = run_ranks(saved_on_two, 2, root, timeout=120)
    assert all(torch.equal(t, second[c][n][k]) for c, a in first.items() for n, b in a.items() for k, t in b.items())
    return first


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, put together from its JSON and its safetensors."""
    index = json.loads((folder / "index.json").read_text())["tensors"]
    files = {path.name: safe_open(str(path), framework="pt") for path in folder.glob("*.safetensors")}
    found = {}
    for name, entry in index.items():
        whole, written = torch.empty(entry["shape"]), torch.zeros(entry["shape"], dtype=torch.int32)
        for box in entry["boxes"]:
            part = files[box["file"]].get_tensor(box["key"])
            whole = whole.to(part.dtype)
            place = tuple(slice(a, a + n) for a, n in zip(box["offset"], box["size"], strict=True))
            whole[place], written[place] = part, written[place] + 1
        assert (written == 1).all(), name
        found[name] = whole
    return found


HEADS = {
    "qkv_proj": (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)),
    "gate_up_proj": (("gate_proj", 44), ("up_proj", 44)),
}


def theirs(ours: str, tensor: Tensor, scalar: bool) -> dict[str, Tensor]:
    """Our parameter (or state) -> Hugging Face's, cut by hand."""
    for fused, parts in HEADS.items():
        if f".{fused}." in ours:
            names = [ours.replace(fused, part) for part, _ in parts]
            pieces = [tensor] * len(parts) if scalar else torch.split(tensor, [rows for _, rows in parts])
            return dict(zip(names, pieces, strict=True))
    return {ours: tensor}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["full", "full, tied, masters", "full, copies"])
def test_a_checkpoint_holds_the_live_tensors(case: str, kind: str, root: Path, live: Any) -> None:
    folder = root / case / kind / "step-1"
    assert verify(folder) == []
    found, expected = tensors_in(folder), {}
    for ours, states in live[case].items():
        for state, tensor in states.items():
            scalar = tensor.ndim == 0
            for name, part in theirs(ours, tensor.view(1) if scalar else tensor, scalar).items():
                expected[f"optimizer.{state}.{name}" if state else name] = part
    assert found.keys() == expected.keys()
    assert {"master", "exp_avg", "exp_avg_sq", "step"} >= {n.split(".")[1] for n in found if n.startswith("optimizer.")}
    assert ("optimizer.master.model.norm.weight" in found) == ("masters" in case)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    assert found["optimizer.step.model.norm.weight"].item() == 1


def test_a_gathered_one_is_transformers_own(root: Path, live: Any) -> None:
    folder = root / "full/FULL_STATE_DICT/step-1"
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["model.safetensors", "optimizer.safetensors"]
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        model = TheirLlama.from_pretrained(root / "base-False")
        assert set(file.keys()) == set(model.state_dict())
    adapter = root / "lora/FULL_STATE_DICT/step-1/adapter_model.safetensors"
    with safe_open(str(adapter), framework="pt") as file:
        assert "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight" in file.keys()  # noqa: SIM118


def test_every_byte_is_a_tensors_or_jsons(root: Path, live: Any) -> None:
    """So that there is no pickle anywhere: tensors tile their files, and the rest is JSON."""
    files = [path for case in CASES for path in (root / case).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ""}
    for path in files:
        if path.suffix == ".safetensors":
            assert read_header(path)
        else:
            assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


def loaded_and_saved_again(place: Place, root: Path, kind: dcp.Kind) -> None:
    """Another model, of the wrong values everywhere, takes the checkpoint and writes one of its own."""
    log.quiet()
    group = dcp.saving_group()
    for case in CASES:
        model, optimizer, _ = built(place, root, case)
        rows = rows_in(model, optimizer, case)
        for part in (part for row in rows.values() for part in row.boxes.values()):
            part.fill_(7)
        dcp.load(root / case / kind / "step-1", rows, group=group)
        dcp.save(root / case / f"{kind}-{place.world_size}", 1, rows, nothing, group=group)


@pytest.mark.parametrize(("world", "kind"), [(1, KINDS[0]), (3, KINDS[0]), (4, KINDS[0]), (3, KINDS[1])])
def test_another_number_of_ranks_loads_the_same_bits(world: int, kind: dcp.Kind, root: Path, live: Any) -> None:
    run_ranks(loaded_and_saved_again, world, root, kind, timeout=120)
    for case, settings in CASES.items():
        before, after = (tensors_in(root / case / name / "step-1") for name in (kind, f"{kind}-{world}"))
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), (case, name)
        files = {path.name for path in (root / case / f"{kind}-{world}/step-1").glob("*.safetensors")}
        assert files <= {f"rank-{rank:05d}.safetensors" for rank in range(world)}
        assert len(files) == world or "use_peft" in settings  # too few rows for the last of 4 ranks


def wrong_loads(place: Place, root: Path) -> list[str]:
    log.quiet()
    group, said = dcp.saving_group(), []
    model, optimizer, _ = built(place, root, "full")
    for rows, folder in (
        (rows_in(model, optimizer, "full"), "full, tied, masters"),
        (rows_in(model, None, "full"), "full"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Fault) as error:
            dcp.load(root / folder / KINDS[0] / "step-1", rows, group=group)
        said.append(str(error.value))
    return said


def test_a_checkpoint_of_another_model_is_refused(root: Path, live: Any) -> None:
    for said in run_ranks(wrong_loads, 2, root):
        assert re.search(r"not of this run: optimizer.master", said[0])
        assert re.search(r"not of this run: optimizer.exp_avg", said[1])


def full_disk(place: Place, root: Path) -> str:
    """Rank 1, or with a gathered set the leader, cannot write: all ranks are told, nothing is left, and it goes on."""
    log.quiet()
    group = dcp.saving_group()
    model, optimizer, _ = built(place, root, "full")
    rows = rows_in(model, optimizer, "full")
    said = []
    for kind, failing in zip(KINDS, (1, 0), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            if place.rank == failing:
                patch.setattr("packtrain.checkpoint.dcp_file.TensorWriter.add", no_space)
            with pytest.raises(Fault) as error:
                dcp.save(root / "disk", 3, rows, nothing, group=group, kind=kind)
        said.append(str(error.value))
        dcp.save(root / f"disk-{kind}", 3, rows, nothing, group=group, kind=kind)
    return "\n".join(said)


def no_space(self: Any, name: str, tensor: Tensor) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_by_all_and_leaves_nothing(root: Path) -> None:
    for said in run_ranks(full_disk, 2, root):
        assert "the checkpoint of step 3 could not be saved (rank 1: [Errno 28] No space left" in said.splitlines()[0]
        assert "the checkpoint of step 3 could not be saved ([Errno 28] No space left" in said.splitlines()[1]
    assert list((root / "disk").iterdir()) == []
    assert all(list(complete(root / f"disk-{kind}")) == [3] for kind in KINDS)
