"""Out of memory: what the user is told, and the same step in smaller micro-batches.

A device with too little memory is played by a model that refuses batches of more than so many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import column, lines, train
from safetensors.torch import load_file
from torch import Tensor

import tiny
from packtrain import building, preflight
from packtrain.batch import Batch
from packtrain.configs.parse import build
from packtrain.data.loader import Loader
from packtrain.distributed.place import Place, is_out_of_memory
from packtrain.errors import Fault
from packtrain.model.llama import LlamaForCausalLM

ROWS = 12
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3}
DROPOUT = {"use_peft": True, "lora_config": {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.model(folder / "base", **SIZES)
    tiny.grammar(folder / "rows.csv", ROWS)
    return folder


def flags_of(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "run_validation": False,
        "batching_strategy": "padding",
        "batch_size_training": 4,
        "context_length": 128,
        "num_epochs": 1,
        "lr": 0.01,
        "seed": 5,
        "output_dir": str(root / out),
        **changes,
    }


@contextmanager
def room_for(tokens: int, where: str = "forward") -> Iterator[None]:
    """A device whose memory is enough for batches of so many tokens."""
    whole = LlamaForCausalLM.forward

    def lacking(gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nMore of it.")

    def forward(self: LlamaForCausalLM, batch: Batch, logits: bool = False) -> Tensor:
        loss = whole(self, batch, logits)
        if batch.ids.numel() > tokens:
            if where == "backward":
                loss.register_hook(lacking)
            else:
                lacking(loss)
        return loss

    LlamaForCausalLM.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlamaForCausalLM.forward = whole  # type: ignore[method-assign]


CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "one row at a time": (1, 70, "forward", DROPOUT),
    "in the backward, accumulated": (1, 140, "backward", DROPOUT | {"gradient_accumulation_steps": 2}),
    "packs are taken apart": (1, 70, "forward", {"batching_strategy": "packing", "batch_size_training": 2}),
    "on one rank of two": (2, 70, "backward", {"sharding_strategy": "NO_SHARD"}),
}
"""Ranks, tokens that the last rank has room for, where it runs out, flags."""


def both(place: Place, root: Path, case: str) -> None:
    """The same run with room for all, and without on the last rank."""
    _, tokens, where, changes = CASES[case]
    train(place, "whole", flags_of(root, f"{case}/whole", **changes))
    with room_for(tokens if place.rank == place.world_size - 1 else 10**9, where):
        train(place, "split", flags_of(root, f"{case}/split", on_oom="split", **changes))


@pytest.mark.parametrize("case", CASES)
def test_a_split_step_has_the_same_numbers(case: str, root: Path) -> None:
    run_ranks(both, CASES[case][0], root, case)
    whole, split = lines(root / case / "whole"), lines(root / case / "split")
    assert column(split, "step") == column(whole, "step")
    for key in ("loss", "grad_norm"):
        assert column(split, key) == pytest.approx(column(whole, key), rel=1e-6), key
    assert column(split, "tokens") == column(whole, "tokens")
    name = "adapter_model.safetensors" if "use_peft" in CASES[case][3] else "model.safetensors"
    ours, theirs = (load_file(root / case / how / name) for how in ("split", "whole"))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)  # it was split
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=3e-4)


def test_pieces_are_the_same_rows(root: Path) -> None:
    for changes in ({}, {"batching_strategy": "packing", "batch_size_training": 2}):
        cfg = build(**flags_of(root, "none", **changes))
        alone = Place(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            machine=0,
            device=torch.device("cpu"),
            store=torch.distributed.HashStore(),
        )
        loader, _ = building.loaders(cfg, preflight.examine(cfg, writes=False).inputs, alone)
        for pieces in (1, 2, 4, 8):
            batches = loader.step(0, pieces)
            assert len(batches) == pieces * loader.micro_batches(0)
            assert sorted(row for batch in batches for row in batch.rows) == sorted(loader.rows_of(0)[0][0])
        assert loader.most_rows(0) == len(loader.rows_of(0)[0][0])


def lacking(place: Place, root: Path, name: str, changes: dict[str, Any], tokens: int, last_only: bool) -> list[str]:
    """(what is said, whether the cause is known)."""
    with room_for(10**9 if last_only and place.rank == 0 else tokens):
        try:
            train(place, name, flags_of(root, name, **changes))
        except Fault as fault:
            return [str(fault), str(is_out_of_memory(fault))]
        except Exception as error:
            return [type(error).__name__, "echo"]
    return []


def test_the_user_is_told_what_is_large_and_what_would_fit(root: Path) -> None:
    ((said, known),) = run_ranks(lacking, 1, root, "told", {}, 70, False)
    assert said.startswith("step 1: rank 0 is out of memory, in a micro-batch of 4 rows x ")
    assert "(CUDA out of memory. Tried to allocate 1.00 GiB.)" in said
    assert "More of it" not in said
    sizes = said.partition("There by its shapes: ")[2]
    assert sizes.startswith("activations of 2 layers 0.00 GiB, optimizer state 0.00 GiB, ")
    assert "weights" in sizes
    assert known == "True"  # the launcher starts no run again that would run out again
    assert json.loads((root / "told/run/result.json").read_text())["reason"] == said
    assert not (root / "told/model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_peft": True}, ["--quantization 4bit; or --activation_checkpointing full"]),
        ({}, ["--use_peft, which trains an adapter", "--pure_bf16 --optimizer anyprecision"]),
    ],
)
def test_the_advice_fits_what_is_largest(changes: dict[str, Any], expected: list[str], root: Path) -> None:
    """A model that is nearly all weights: what is held is named first."""
    name = "/".join(["advice", *changes])
    ((said, _),) = run_ranks(lacking, 1, root, name, {**changes, "batch_size_training": 1}, 5, False)
    ways = said.partition("What needs less: ")[2]
    assert all(way in ways for way in expected), said


def test_no_row_is_left_to_part(root: Path) -> None:
    ((said, _),) = run_ranks(lacking, 1, root, "least", {"on_oom": "split"}, 5, False)
    assert "in a micro-batch of 1 rows x " in said


def test_sharded_ranks_end_with_the_advice(root: Path) -> None:
    """One of two ranks runs out in the middle of a layer's collectives: it says so, and the other does not go on."""
    flags = {"on_oom": "split", "batch_size_training": 2}
    other, (said, known) = run_ranks(lacking, 2, root, "sharded", flags, 60, True)
    assert said.startswith("step 1: rank 1 is out of memory, in a micro-batch of 2 rows x ")
    assert "--on_oom split can do nothing here" in said
    assert known == "True"
    assert other[1] == "echo" or other[0] == f"rank 1 failed: {said}"


def test_a_lost_row_would_be_seen(root: Path) -> None:
    """What the comparison above must be able to see."""
    run_ranks(losing, 1, root)
    whole, lossy = (column(lines(root / name), "loss") for name in ("lossless", "lossy"))
    assert lossy != pytest.approx(whole, rel=1e-6)


def losing(place: Place, root: Path) -> None:
    train(place, "lossless", flags_of(root, "lossless", max_train_step=1))
    whole = Loader._taken
    Loader._taken = lambda self, items, rank: whole(self, items, rank)[:-1]  # type: ignore[method-assign]
    with room_for(70):
        train(place, "lossy", flags_of(root, "lossy", max_train_step=1, on_oom="split"))
