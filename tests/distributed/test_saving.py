"""What a run leaves behind, from 1, 2 and 4 ranks: whole, and the same model in transformers and peft.

Each case trains one step the way a run does, saves through finetuning's Saver, and is judged by the logits that
transformers' (and peft's) model gives after reading the folder, against those of the sharded model that wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from runs import apart, column, lines, rows, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers import LlamaForCausalLM as TheirLlama

import tiny
from packtrain import building, log, preflight
from packtrain.configs.parse import build
from packtrain.data.collate import make_batch
from packtrain.distributed.parallelize import gather, local_rows, reshard
from packtrain.distributed.place import Place
from packtrain.finetuning import Saver
from packtrain.peft.trainable import trainable
from packtrain.train.step import step_vector, train_step

PATIENCE = 240.0
BOUND = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
NEW = 7
"""Tokens of the longer tokenizer that the model's table has no row for."""
SIZES = {"vocab_size": 391, "hidden_size": 32, "intermediate_size": 44, "initializer_range": 0.2}
SIZES |= {"attention_bias": True, "mlp_bias": True}

SHOWN = (1, 4, 9)
"""Rows whose logits are compared."""

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, tied": {"tied": True},
    "full, grown": {"grown": True},
    "full, tied, grown": {"tied": True, "grown": True},
    "lora": {"lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]}},
    "lora, tied": {"tied": True, "lora": {"target_modules": "all-linear", "use_rslora": True}},
    "lora beside whole layers": {"lora": {"modules_to_save": ["k_proj", "up_proj", "norm"]}},
    "lora, tied, beside its table": {"tied": True, "lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "lora, grown": {"grown": True, "lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
}


@pytest.fixture(scope="module")
def place_of_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saving")
    for tied in (False, True):
        tiny.model(root / f"base-{tied}", tie_word_embeddings=tied, shard_size="40KB", **SIZES)
    tiny.tokenizer(SIZES["vocab_size"] - tiny.VOCABULARY + NEW).save_pretrained(root / "longer")
    tiny.grammar(root / "rows.csv", 10)
    return root


def base_of(root: Path, case: str) -> Path:
    return root / f"base-{CASES[case].get('tied', False)}"


def flags_of(root: Path, case: str, **flags: Any) -> dict[str, Any]:
    settings = CASES[case]
    data = str(root / "rows.csv")
    given: dict[str, Any] = {
        "model_name": str(base_of(root, case)),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 10,
        "lr": 0.02,
    }
    if settings.get("grown"):
        given |= {"tokenizer_name": str(root / "longer")}
    if "lora" in settings:
        given |= {"use_peft": True, "lora_config": {"r": 4, "lora_dropout": 0.0} | settings["lora"]}
    return given | flags


def saved_after_a_step(place: Place, root: Path) -> dict[str, Tensor]:
    """Each case saved to root/ranks/case; the logits [3, L, V] of the model that was saved."""
    log.quiet()
    logits = {}
    for case in CASES:
        cfg = build(**flags_of(root, case, batch_size_training=-(-10 // place.world_size)))
        own = apart(place, case)
        inputs = preflight.inputs(cfg, own)
        model = building.build(cfg, inputs, place)
        loader, _ = building.loaders(cfg, inputs, place)
        optimizer, _ = building.optimizer_of(cfg, model, 1, 1)
        batches = loader.step(0)
        agreed = step_vector(batches, False, place.device)
        train_step(model, batches, agreed, optimizer, place, clip=None, memory=lambda: 0.0)
        saver = Saver(cfg, model, inputs, root / str(place.world_size) / case, own)
        saver.save(best=False)
        batch = make_batch(inputs.train, [np.array([row]) for row in SHOWN], seed=0, step=0, pad_id=0)
        with torch.no_grad():
            logits[case] = model.eval()(batch, logits=True)
        reshard(model)
        saver.save(best=True)
    return logits


@pytest.fixture(scope="module")
def logits(place_of_work: Path) -> dict[int, dict[str, Tensor]]:
    """Ranks -> case -> the logits of rank 0."""
    return {world: run_ranks(saved_after_a_step, world, place_of_work, timeout=PATIENCE)[0] for world in (1, 2, 4)}


def read_back(root: Path, case: str, folder: Path) -> nn.Module:
    """What a user of transformers and peft gets; nothing may be missing or left over."""
    if "lora" not in CASES[case]:
        model, found = TheirLlama.from_pretrained(folder, output_loading_info=True)
        assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()
    model = TheirLlama.from_pretrained(base_of(root, case))
    if CASES[case].get("grown"):
        model.resize_token_embeddings(SIZES["vocab_size"] + NEW)
    return PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_model(case: str, place_of_work: Path, logits: Any) -> None:
    texts = [ids for ids, _ in rows(place_of_work / "rows.csv")]
    untrained = TheirLlama.from_pretrained(base_of(place_of_work, case)).eval()
    for world, ours in logits.items():
        model = read_back(place_of_work, case, place_of_work / str(world) / case)
        assert ours[case].shape[-1] == SIZES["vocab_size"] + NEW * CASES[case].get("grown", False)
        assert (ours[case] - logits[1][case]).abs().max() < 1e-3  # the same from any number of ranks
        for row, whole in zip(SHOWN, ours[case], strict=True):
            mine = whole[: texts[row].shape[1]]
            with torch.no_grad():
                theirs, before = model(texts[row]).logits[0], untrained(texts[row]).logits[0]
            assert (mine - theirs).abs().max() <= BOUND * max(1.0, float(theirs.abs().max())), world
            assert (mine[:, : before.shape[1]] - before).abs().max() > 100 * BOUND


@pytest.mark.parametrize("case", CASES)
def test_best_is_the_same_and_the_tokenizer_is_beside(case: str, place_of_work: Path, logits: Any) -> None:
    for world in logits:
        folder = place_of_work / str(world) / case
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert {"tokenizer.json", "adapter_config.json" if "lora" in CASES[case] else "config.json"} <= files
        assert not [name for name in files if name.startswith(".")]
        for name in files:
            assert (folder / name).read_bytes() == (folder / "best" / name).read_bytes()
        tokens = len(AutoTokenizer.from_pretrained(folder))
        assert tokens == (SIZES["vocab_size"] + NEW if CASES[case].get("grown") else tiny.VOCABULARY)
        if "lora" in CASES[case]:
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
                base_of(place_of_work, case)
            )
        else:
            assert json.loads((folder / "config.json").read_text())["vocab_size"] == logits[world][case].shape[-1]


def grown_tables(place: Place, root: Path) -> dict[str, Tensor]:
    """The tables right after loading, whole."""
    log.quiet()
    found = {}
    for case in ("full, grown", "full, tied, grown", "lora, grown"):
        cfg = build(**flags_of(root, case))
        model = building.build(cfg, preflight.inputs(cfg, apart(place, case)), place)
        found |= {
            f"{case}: {name}": gather(p)
            for name, p in model.named_parameters()
            if name in ("model.embed_tokens.weight", "lm_head.weight")
        }
    return found


@pytest.mark.parametrize("world", [1, 4])
def test_new_rows_are_the_mean_of_the_old(world: int, place_of_work: Path) -> None:
    for found in run_ranks(grown_tables, world, place_of_work, timeout=PATIENCE):
        assert len(found) == 5
        for name, table in found.items():
            tied, tensor = "tied" in name, name.split(": ")[1]
            old = TheirLlama.from_pretrained(place_of_work / f"base-{tied}").get_parameter(tensor).detach()
            assert torch.equal(table[: len(old)], old)
            assert table.shape[0] == len(old) + NEW
            torch.testing.assert_close(
                table[len(old) :], old.double().mean(0).float().expand(NEW, -1), rtol=0, atol=1e-7
            )


def forty_saves(place: Place, root: Path) -> list[str]:
    """Every trained entry is the save's number: a file that is not whole has another, or lacks a tensor."""
    log.quiet()
    case, out = "lora beside whole layers", root / "forty"
    cfg = build(**flags_of(root, case))
    inputs = preflight.inputs(cfg, apart(place, "forty"))
    model = building.build(cfg, inputs, place)
    saver = Saver(cfg, model, inputs, out, place)
    found = []
    for number in range(40):
        for parameter in trainable(model).values():
            local_rows(parameter)[0].fill_(number)
        saver.save(best=number % 10 == 0)
        if place.rank == 0:
            tensors = load_file(out / "adapter_model.safetensors")
            wrong = [name for name, tensor in tensors.items() if not bool((tensor == number).all())]
            found.append(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} entries, wrong: {wrong}")
    return found


def test_forty_saves_in_a_row_are_all_whole(place_of_work: Path) -> None:
    theirs = tiny.adapter(
        place_of_work / "theirs",
        place_of_work / "base-False",
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["k_proj", "up_proj", "norm"],
    )
    shapes = {name: tensor.shape for name, tensor in load_file(theirs / "adapter_model.safetensors").items()}
    entries = sum(shape.numel() for shape in shapes.values())
    found = run_ranks(forty_saves, 4, place_of_work, timeout=PATIENCE)[0]
    assert found == [f"{len(shapes)} tensors, {entries} entries, wrong: []"] * 40
    ours = load_file(place_of_work / "forty/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes
    assert load_file(place_of_work / "forty/best/adapter_model.safetensors")[next(iter(ours))].eq(30).all()


def first_run(place: Place, root: Path) -> None:
    for case in ("lora", "lora, tied, beside its table"):
        flags = flags_of(root, case, output_dir=str(root / "first" / case), max_train_step=3)
        train(place, f"first {case}", flags)


def second_run(place: Place, root: Path) -> None:
    for case in ("lora", "lora, tied, beside its table"):
        flags = flags_of(root, case, output_dir=str(root / "second" / case / str(place.world_size)), max_train_step=1)
        del flags["lora_config"]  # the adapter's own settings hold
        train(place, f"second {case}", flags | {"eval_first": True, "from_peft_checkpoint": str(root / "first" / case)})


def test_a_saved_adapter_is_gone_on_with(place_of_work: Path) -> None:
    run_ranks(first_run, 2, place_of_work, timeout=PATIENCE)
    for world in (1, 4):
        run_ranks(second_run, world, place_of_work, timeout=PATIENCE)
    for case in ("lora", "lora, tied, beside its table"):
        last = column(lines(place_of_work / "first" / case), "eval_loss")[-1]
        for world in (1, 4):
            again = column(lines(place_of_work / "second" / case / str(world)), "eval_loss")
            assert again[0] == pytest.approx(last, rel=BOUND)
            assert again[1] != pytest.approx(last, rel=BOUND)
