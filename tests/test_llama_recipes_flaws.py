"""What llama-recipes did wrong, a test a flaw, numbered as docs/migrating.md has them: here it is right.

Each is a short look at one thing, mostly a tiny run in this process; the rooms' own tests go further.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import LlamaForCausalLM

import packtrain
import tiny
from distributed.ranks import run_ranks
from distributed.runs import column, lines, mean, rows, train
from packtrain.batch import IGNORE
from packtrain.configs.datasets import GrammarDataset, LlamaguardToxicchatDataset
from packtrain.configs.support import LATER, RESTATES, VISION
from packtrain.data.collate import make_batch
from packtrain.data.loader import Loader
from packtrain.data.tokens import Tokens, tokenize
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.optim import Optimizer

PAIRS = [("he go", "He goes."), ("it rain much", "It rains a lot, and it has been raining for days, they say.")] * 2
SAME = [("he go home", "He goes home.")] * 3
FINE = torch.tensor(0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("base") / "org" / "model")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, Any]:
    """Full fine-tuning of rows whose answers are of unlike lengths, one a micro-batch."""
    return {
        "model_name": str(base),
        "dataset": "grammar_dataset",
        "train_split": str(tiny.grammar(tmp_path / "train.csv", PAIRS)),
        "test_split": str(tiny.grammar(tmp_path / "test.csv", PAIRS[:3])),
        "batching_strategy": "padding",
        "batch_size_training": 1,
        "num_epochs": 1,
        "lr": 1e-9,
        "output_dir": str(tmp_path / "out"),
    }


def run(settings: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result.json, metrics.jsonl) of a run in this process."""
    result = packtrain.finetune(**settings | {"overwrite_output_dir": True} | changes)
    return result, lines(Path(settings["output_dir"]))


def truth(base: Path, file: str, count: int | None = None) -> float:
    """transformers' mean over the labelled tokens of a file's first rows."""
    with torch.no_grad():
        return mean(LlamaForCausalLM.from_pretrained(base), list(rows(Path(file)))[:count]).item()


def made(lengths: list[int]) -> Tokens:
    """Rows of ids that no other row has, all trained."""
    ids = np.arange(3, sum(lengths) + 3, dtype=np.int32)
    return Tokens(ids, ids.copy(), np.concatenate([[0], np.cumsum(lengths)]), np.arange(1, len(lengths) + 1), "rows")


def loader(tokens: Tokens, strategy: Any = "padding", **other: Any) -> Loader:
    fields = {"context_length": 64, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 1}
    return Loader(tokens, strategy=strategy, **{**fields, "shuffle": True, "pad_id": 0, **other})


def saves(place: Place, settings: dict[str, Any]) -> None:
    train(place, "saves", settings)


def test_01_the_adapter_is_whole_when_several_ranks_save(settings: dict[str, Any]) -> None:
    """Forty saves in a row: test_saving.py."""
    run_ranks(saves, 4, settings | {"use_peft": True, "lr": 0.01, "num_epochs": 4, "eval_steps": 1})
    for folder in ("", "best"):
        tensors = load_file(Path(settings["output_dir"]) / folder / "adapter_model.safetensors")
        assert len(tensors) == 2 * 2 * 2  # layers, q and v, A and B
        assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_02_bf16_weights_have_fp32_masters() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64).mul_(0.02).bfloat16())
    before, start = weight.detach().clone(), weight.detach().float()
    optimizer = Optimizer({"w": weight}, lr=1e-5)
    for _ in range(60):
        weight.backward(torch.ones_like(weight))
        optimizer.step(FINE)
        optimizer.zero_grad()
    state = optimizer.state()["w"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert (start - state["master"]).mean().item() == pytest.approx(60e-5, rel=1e-3)
    moved = (before.float() - weight.detach().float()).mean().item()
    assert moved == pytest.approx(60e-5, rel=0.02), "what bf16 shows is what was learned"


def test_03_a_gradient_is_the_mean_over_tokens_not_over_batches(settings: dict[str, Any]) -> None:
    _, parts = run(settings, gradient_accumulation_steps=4)
    _, whole = run(settings, batch_size_training=4)
    for key in ("loss", "grad_norm"):
        assert parts[0][key] == pytest.approx(whole[0][key], rel=1e-5)


MASKED = """
def rows(dataset_config, tokenizer, split):
    row = tokenizer.encode("a b c d", add_special_tokens=False)
    labels = [row, row, [-100] * len(row)] if split == "validation" else [row] * 4
    return [{"input_ids": row, "labels": one, "attention_mask": [1] * len(row)} for one in labels]
"""


def test_04_a_masked_row_is_no_nan_and_the_best_is_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MASKED)
    masked = settings | {"dataset": "custom_dataset", "custom_dataset": {"file": f"{tmp_path}/mine.py:rows"}}
    del masked["train_split"], masked["test_split"]
    with pytest.raises(UserError, match=r"row 3.*no label"):
        run(masked)
    result, _ = run(masked, on_bad_rows="skip")
    assert math.isfinite(result["best_eval_loss"])
    assert (Path(result["best"]) / "model.safetensors").exists()


def test_05_a_steps_loss_is_not_divided_by_its_micro_batches(settings: dict[str, Any], base: Path) -> None:
    result, found = run(settings, gradient_accumulation_steps=4, save_metrics=True)
    assert found[0]["loss"] == pytest.approx(truth(base, settings["train_split"]), rel=1e-5)
    told = json.loads(Path(result["metrics_filename"]).read_text())
    assert told["train_step_loss"] == column(found, "loss")
    assert told["train_step_perplexity"] == [math.exp(found[0]["loss"])]


def test_06_limits_divide_by_what_they_let_through(settings: dict[str, Any], base: Path) -> None:
    result, found = run(settings, max_train_step=2, max_eval_step=1, eval_first=True)
    steps = [line for line in found if "loss" in line]
    tokens = column(steps, "tokens")
    assert len(set(tokens)) == len(steps) == 2
    expected = sum(line["loss"] * line["tokens"] for line in steps) / sum(tokens)
    assert result["avg_train_loss"] == pytest.approx(expected)
    assert found[0]["eval_loss"] == pytest.approx(truth(base, settings["test_split"], 1), rel=1e-5)


def test_07_a_limit_at_an_epochs_end_ends_the_run(settings: dict[str, Any]) -> None:
    result, _ = run(settings, num_epochs=3, max_train_step=4)
    assert (result["status"], result["step"]) == ("done", 4)


def test_08_a_short_last_window_counts_its_own_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    """Three rows, all the same, two to a step: the step of one has the gradient of the step of two."""
    tiny.grammar(tmp_path / "train.csv", SAME)
    _, found = run(settings, gradient_accumulation_steps=2)
    two, one = [line for line in found if "loss" in line]
    assert two["tokens"] == 2 * one["tokens"]
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_09_a_packed_sample_sees_no_other(settings: dict[str, Any]) -> None:
    packs = loader(made([5, 9, 7]), "packing").step(0)[0]
    assert sorted(packs.lengths) == [5, 7, 9]
    assert packs.positions.flatten().tolist() == [place for length in packs.lengths for place in range(length)]
    _, packed = run(settings, batching_strategy="packing")
    _, padded = run(settings, batch_size_training=4)
    for key in ("loss", "grad_norm"):
        assert packed[0][key] == pytest.approx(padded[0][key], rel=1e-5)


@pytest.mark.parametrize("strategy", ["packing", "padding"])
def test_10_one_process_shuffles_packs_too(strategy: str) -> None:
    order = loader(made([60] * 30), strategy).order(0).tolist()
    assert sorted(order) == list(range(30)) != order


def test_11_the_order_is_the_seeds_and_the_epochs() -> None:
    tokens = made([60] * 30)
    orders = [
        loader(tokens, "packing", seed=seed, rank=1, world_size=2).order(epoch).tolist()
        for seed, epoch in [(1, 0), (1, 1), (2, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("shuffle", [True, False])
def test_12_the_longest_rows_are_seen_as_every_other(shuffle: bool) -> None:
    tokens = made(list(range(2, 25)))
    seen: list[int] = []
    for rank in range(2):
        mine = loader(tokens, batch_size=4, rank=rank, world_size=2, shuffle=shuffle)
        seen += [row for step in range(mine.steps_per_epoch) for batch in mine.step(step) for row in batch.rows]
    assert sorted(seen) == list(range(23))


def test_13_nobody_elses_random_numbers_are_touched() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    mine = loader(made([9, 3, 4, 8]), rank=1, world_size=2)
    for step in range(2 * mine.steps_per_epoch):
        mine.step(step)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def encoded(file: Path, **other: Any) -> Any:
    fields: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "context_length": 4096, "vocab_size": tiny.VOCABULARY}
    config = GrammarDataset(train_split=str(file), test_split=str(file))
    return tokenize("grammar_dataset", config, "train", **fields | other)


def test_14_padded_rows_obey_context_length_too(tmp_path: Path) -> None:
    file = tiny.grammar(tmp_path / "rows.csv", [("he go", "He goes " * 400)])
    tokens, audit = encoded(file, context_length=100)
    assert (audit.truncated, audit.longest) == (1, 100)
    assert loader(tokens, context_length=100).step(0)[0].ids.shape == (1, 100)


def two_machines(place: Place, settings: dict[str, Any]) -> None:
    train(replace(place, machine=place.rank, local_rank=0, local_world_size=1), "two machines", settings)


def test_15_machines_of_one_worker_each_sum_up(settings: dict[str, Any]) -> None:
    _, one = run(settings, batch_size_training=4)
    run_ranks(two_machines, 2, settings | {"batch_size_training": 2, "overwrite_output_dir": True})
    two = lines(Path(settings["output_dir"]))
    for key in ("loss", "grad_norm", "eval_loss", "tokens"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-5)


def test_16_eval_loss_is_the_mean_over_all_tokens(settings: dict[str, Any], base: Path) -> None:
    """Three rows of unlike lengths in batches of two; the perplexity is that loss's, not a mean of others."""
    result, found = run(settings, val_batch_size=2, num_epochs=2)
    expected = truth(base, settings["test_split"])
    assert column(found, "eval_loss") == pytest.approx([expected, expected], rel=1e-5)
    assert column(found, "eval_perplexity") == [math.exp(loss) for loss in column(found, "eval_loss")]
    assert result["best_eval_loss"] == min(column(found, "eval_loss"))


@pytest.mark.parametrize("lengths", [[4096], [2048, 2048], [1000] * 13])
def test_17_packing_drops_no_token(lengths: list[int]) -> None:
    mine = loader(made(lengths), "packing", context_length=4096)
    found = [batch for step in range(mine.steps_per_epoch) for batch in mine.step(step)]
    assert sum(batch.tokens for batch in found) == sum(lengths)


def test_18_flops_do_not_grow_with_the_steps_before(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny.grammar(tmp_path / "train.csv", SAME * 2)
    counts = [run(settings, flop_counter=True, flop_counter_start=start)[0]["counted_flops"] for start in (0, 3)]
    assert counts[0] == counts[1] > 0


def test_19_fp16_trains_every_weight_on_one_device(settings: dict[str, Any], base: Path) -> None:
    result, _ = run(settings, use_fp16=True, lr=1e-3, num_epochs=2)
    after = load_file(Path(result["last"]) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert [name for name in before if torch.equal(before[name].half(), after[name])] == []


def test_20_a_full_checkpoint_of_a_model_with_a_slash(
    settings: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parents[1])
    root = tmp_path / "checkpoints"
    del settings["output_dir"]
    flags = {"dist_checkpoint_root_folder": str(root), "checkpoint_type": "FULL_STATE_DICT", "save_optimizer": True}
    result = packtrain.finetune(**settings | flags | {"model_name": "org/model"})
    step = root / "fine-tuned-org--model" / f"step-{result['step']}"
    assert (step / "DONE").exists()
    stored = [name for file in step.rglob("*.safetensors") for name in load_file(file)]
    assert any("exp_avg_sq" in name for name in stored)


def test_21_a_missing_output_folder_is_made(settings: dict[str, Any], tmp_path: Path) -> None:
    result, _ = run(settings | {"output_dir": str(tmp_path / "not" / "there" / "yet")}, max_train_step=1)
    assert (Path(result["last"]) / "model.safetensors").exists()
    assert (Path(result["last"]) / "config.json").exists()


def test_22_training_and_validation_are_packed_alike(settings: dict[str, Any], base: Path) -> None:
    """A validation set of fewer packs than a batch has is still one."""
    _, found = run(settings, batching_strategy="packing", val_batch_size=4, eval_first=True)
    assert found[0]["eval_loss"] == pytest.approx(truth(base, settings["test_split"]), rel=1e-5)


def test_23_freeze_layers_without_fsdp(settings: dict[str, Any], base: Path) -> None:
    result, _ = run(settings, freeze_layers=True, num_freeze_layers=1, lr=0.01)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, Path(result["last"])))
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    assert stayed == {name for name in before if ".layers.0." in name}


def llama3() -> Any:
    """A tokenizer with an Instruct model's marks: eos is the end of a turn."""
    marks = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    tokenizer.bos_token, tokenizer.eos_token = marks[:2]
    return tokenizer


def trained(tokens: Tokens) -> Iterator[tuple[list[int], list[int]]]:
    for row in range(tokens.rows):
        ids, labels = tokens.row(row)
        yield ids.tolist(), labels[labels != IGNORE].tolist()


def test_24_toxicchat_trains_the_verdict_alone(tmp_path: Path) -> None:
    tokenizer, file = llama3(), tmp_path / "rows.json"
    file.write_text(json.dumps([{"user_input": "hello", "toxicity": 0, "openai_moderation": "[]"}]))
    name, config = "llamaguard_toxicchat_dataset", LlamaguardToxicchatDataset(train_split=str(file))
    tokens, _ = tokenize(name, config, "train", tokenizer=tokenizer, context_length=4096, vocab_size=len(tokenizer))
    ((ids, labels),) = trained(tokens)
    assert labels == [*tokenizer.encode("safe", add_special_tokens=False), tokenizer.eos_token_id]
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_25_every_answer_ends_with_the_models_own_end(tmp_path: Path) -> None:
    file = tiny.grammar(tmp_path / "rows.csv", PAIRS)
    for tokenizer in (tiny.tokenizer(), llama3()):
        tokens, audit = encoded(file, tokenizer=tokenizer, vocab_size=len(tokenizer))
        assert [labels[-1] for _, labels in trained(tokens)] == [tokenizer.eos_token_id] * len(PAIRS)
        assert audit.eos_labels == len(PAIRS)


def test_26_the_process_group_is_closed_and_nothing_false_is_said(settings: dict[str, Any], capfd: Any) -> None:
    run(settings, max_train_step=1)
    assert not dist.is_initialized()
    said = capfd.readouterr().err.lower()
    assert "debug" not in said
    assert "clearing" not in said


def test_a_neighbour_would_be_noticed(settings: dict[str, Any]) -> None:
    """Row 9's bound can fail: the same tokens as one document have other positions."""
    tokens = made([5, 9, 7])
    one = replace(tokens, offsets=np.array([0, 21]), numbers=np.array([1]))
    batch = make_batch(one, [np.array([0])], seed=0, step=0, pad_id=0)
    assert batch.positions.flatten().tolist() == list(range(21))


def test_migrating_names_all_of_it() -> None:
    """Rows 1 to 26, each flag that restates, and each that waits or is refused."""
    text = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)] == list(range(1, 27))
    restated, waiting = text.split("Accepted, and nothing")[1].split("Not built yet")
    waiting = waiting.split("## Defaults")[0]
    assert [name for name in RESTATES if name.split(".")[1] not in restated] == []
    later = {row.fields[0].split(".")[1]: row for row in LATER}
    assert set(re.findall(r"^\| `--(?:\w+\.)?(\w+)", waiting, flags=re.MULTILINE)) == later.keys()
    assert [row.what for row in later.values() if row.what not in waiting] == []
    assert [name for name in VISION if name.split(".")[1] not in text] == []
