"""Whole runs as a user makes them: from Python in this process, by torchrun, by packtrain train with a YAML file.

the folder       config.yaml, metrics.jsonl, result.json, best/: what is in them, and that it adds up
the next run     in a folder that holds one: finished, with other settings, stopped, dead
the data sets    each of them, padded and packed
the weights      what trains moves, what is frozen does not; golden losses
the launchers    llama-recipes' command line, a YAML file, a signal
the network      nobody is called
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from peft import PeftModel
from runs import column, lines, mean, rows
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM as TheirLlama

import packtrain
import tiny
from packtrain import building, cli, finetuning, preflight
from packtrain.checkpoint.hf import save_model
from packtrain.configs.parse import build, parse
from packtrain.distributed.place import open_place
from packtrain.errors import UserError
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM, draw
from packtrain.peft.trainable import frozen, trainable

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "losses"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

LINE = [
    *("step", "epoch", "loss", "grad_norm", "lr", "tokens", "tokens_total"),
    *("step_time", "tokens_per_second", "memory_gb"),
]
EVALUATION = ["event", "step", "eval_loss", "eval_perplexity"]
RESULTS = {
    *("avg_train_prep", "avg_train_loss", "avg_eval_prep", "avg_eval_loss", "avg_epoch_time", "avg_checkpoint_time"),
    *("status", "step", "reason", "updated_at", "host", "pid", "last_checkpoint", "fingerprint"),
    *("best_eval_loss", "best_step", "last", "best", "tokens_total", "tokens_per_second", "seconds"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours, saved by us: the golden losses hold as long as our own random numbers do."""
    folder = tmp_path_factory.mktemp("base")
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **tiny.SIZES}
    model = LlamaForCausalLM(LlamaConfig.from_dict(values), dtype=torch.float32, device=torch.device("cpu"))
    draw(model, 5)
    save_model(model, folder, values)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def settings_in(folder: Path, base: Path) -> dict[str, Any]:
    """A LoRA run of ten rows: four steps an epoch, the last one short."""
    return {
        "model_name": str(base),
        "use_peft": True,
        "lora_config": {"r": 4, "lora_dropout": 0.0},
        "dataset": "grammar_dataset",
        "grammar_dataset": {
            "train_split": str(tiny.grammar(folder / "train.csv", 10)),
            "test_split": str(tiny.grammar(folder / "validation.csv", tiny.pairs(14)[10:])),
        },
        "batching_strategy": "padding",
        "batch_size_training": 3,
        "num_epochs": 1,
        "lr": 0.01,
        "output_dir": str(folder / "out"),
    }


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path, base)


def flags(settings: dict[str, Any]) -> list[str]:
    """The same settings as words of a command line."""
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name: inner
        for name, value in settings.items()
        for key, inner in (value if isinstance(value, dict) else {"": value}).items()
    }
    return [word for name, value in flat.items() for word in (f"--{name}", str(value))]


def result_of(out: str | Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((Path(out) / "run/result.json").read_text(encoding="utf-8"))
    return value


def steps_of(out: str | Path) -> list[dict[str, Any]]:
    return [line for line in lines(Path(out)) if "loss" in line]


# the folder


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Seven steps of two epochs, far too large: it gets worse, and the best is not the last."""
    settings = settings_in(tmp_path_factory.mktemp("finished"), base)
    settings |= {"num_epochs": 3, "max_train_step": 7, "eval_steps": 3, "lr": 12.0, "lr_scheduler": "constant"}
    return settings | {"result": packtrain.finetune(**settings)}


def test_metrics_add_up(finished: dict[str, Any]) -> None:
    steps = steps_of(finished["output_dir"])
    assert [list(line) for line in steps] == [LINE] * 7
    assert column(steps, "step") == list(range(1, 8))
    assert column(steps, "epoch") == pytest.approx([step / 4 for step in range(1, 8)])
    labels = [int((labels != -100).sum()) for _, labels in rows(Path(finished["grammar_dataset"]["train_split"]))]
    assert sum(column(steps, "tokens")[:4]) == sum(labels)
    assert column(steps, "tokens_total") == list(accumulate(column(steps, "tokens")))
    inputs = [line["tokens_per_second"] * line["step_time"] for line in steps]
    assert inputs == pytest.approx([round(count) for count in inputs])
    assert sum(inputs[:4]) == pytest.approx(
        sum(ids.numel() for ids, _ in rows(Path(finished["grammar_dataset"]["train_split"])))
    )
    assert all(0.1 < line["memory_gb"] < 64 and line["grad_norm"] > 0 for line in steps)


def test_evaluations_come_when_they_are_due_and_at_the_last_step(finished: dict[str, Any]) -> None:
    evaluations = [line for line in lines(Path(finished["output_dir"])) if "eval_loss" in line]
    assert [list(line) for line in evaluations] == [EVALUATION] * 4
    assert column(evaluations, "step") == [3, 4, 6, 7]
    perplexities = [math.exp(loss) for loss in column(evaluations, "eval_loss")]
    assert column(evaluations, "eval_perplexity") == pytest.approx(perplexities)


def test_the_result_is_what_the_metrics_say(finished: dict[str, Any]) -> None:
    result, steps = finished["result"], steps_of(finished["output_dir"])
    assert result == result_of(finished["output_dir"])
    assert result.keys() >= RESULTS
    assert (result["status"], result["step"], result["reason"]) == ("done", 7, None)
    epochs = [
        sum(line["loss"] * line["tokens"] for line in part) / sum(line["tokens"] for line in part)
        for part in (steps[:4], steps[4:])
    ]
    evaluations = column(lines(Path(finished["output_dir"])), "eval_loss")
    assert result["avg_train_loss"] == pytest.approx(sum(epochs) / 2)
    assert result["avg_train_prep"] == pytest.approx(sum(map(math.exp, epochs)) / 2)
    assert result["avg_eval_loss"] == pytest.approx(sum(evaluations) / 4)
    assert result["avg_eval_prep"] == pytest.approx(sum(map(math.exp, evaluations)) / 4)
    assert result["best_eval_loss"] == min(evaluations)
    assert result["best_step"] == [3, 4, 6, 7][evaluations.index(min(evaluations))]
    assert (result["last"], result["best"]) == (finished["output_dir"], f"{finished['output_dir']}/best")
    assert result["tokens_total"] == steps[-1]["tokens_total"]


def test_root_holds_the_last_state_and_best_the_lowest(finished: dict[str, Any], base: Path) -> None:
    """Measured with transformers and peft alone."""
    evaluations = column(lines(Path(finished["output_dir"])), "eval_loss")
    assert evaluations[-1] > min(evaluations) + 1e-3
    validation = list(rows(Path(finished["grammar_dataset"]["test_split"])))
    for folder, expected in (
        (finished["result"]["last"], evaluations[-1]),
        (finished["result"]["best"], min(evaluations)),
    ):
        model = PeftModel.from_pretrained(TheirLlama.from_pretrained(base), folder).eval()
        with torch.no_grad():
            assert mean(model, validation).item() == pytest.approx(expected, rel=1e-5)


def test_config_yaml_reads_back(finished: dict[str, Any]) -> None:
    file = Path(finished["output_dir"]) / "run/config.yaml"
    asked = {name: value for name, value in finished.items() if name != "result"}
    assert parse([str(file)]) == build(**asked)
    text = file.read_text(encoding="utf-8")
    assert "  lr: 12.0  # flag" in text
    assert "  seed: 42  # default" in text


# the next run in a folder


def test_a_finished_folder_is_left_alone(settings: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    settings["max_train_step"] = 2
    packtrain.finetune(**settings)
    out = Path(settings["output_dir"])
    before = (out / "run/metrics.jsonl").read_bytes(), (out / "run/result.json").read_bytes()
    assert cli.main(["train", *flags(settings)]) == 0
    assert "holds this very run, finished" in capsys.readouterr().err
    assert cli.main(["train", *flags(settings | {"lr": 0.5})]) == 2
    said = capsys.readouterr().err
    assert "--overwrite_output_dir" in said
    assert "lr: 0.01 then, 0.5 now" in said
    tiny.grammar(tmp_path / "train.csv", 9)  # the same settings, other data
    assert cli.main(["train", *flags(settings)]) == 2
    assert "train data" in capsys.readouterr().err
    assert before == ((out / "run/metrics.jsonl").read_bytes(), (out / "run/result.json").read_bytes())
    assert cli.main(["train", *flags(settings | {"max_train_step": 1}), "--overwrite_output_dir"]) == 0
    assert result_of(out)["step"] == 1
    assert (out / "run.old-1/metrics.jsonl").read_bytes() == before[0]


@pytest.mark.parametrize("status", ["stopped", "failed", "running"])
def test_an_unfinished_folder_without_a_checkpoint_is_reused(status: str, settings: dict[str, Any]) -> None:
    out = Path(settings["output_dir"])
    settings |= {"max_train_step": 1, "save_model": False}
    packtrain.finetune(**settings)
    (out / "run/result.json").write_text(json.dumps(result_of(out) | {"status": status, "updated_at": 0.0}))
    assert packtrain.finetune(**settings | {"lr": 0.1})["status"] == "done"
    old = json.loads((out / "run.old-1/result.json").read_text(encoding="utf-8"))
    assert old["status"] == ("failed" if status == "running" else status)
    assert len(steps_of(out)) == 1


def test_a_folder_in_use_is_refused(settings: dict[str, Any]) -> None:
    out = Path(settings["output_dir"])
    (out / "run").mkdir(parents=True)
    living = {"status": "running", "updated_at": time.time(), "host": socket.gethostname(), "pid": os.getppid()}
    (out / "run/result.json").write_text(json.dumps(living))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        packtrain.finetune(**settings)
    assert result_of(out) == living


def test_llama_recipes_folder_and_no_folder(settings: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    del settings["output_dir"]
    settings |= {"max_train_step": 1, "run_validation": False}
    place = {"dist_checkpoint_root_folder": "checkpoints", "dist_checkpoint_folder": "mine"}
    name = settings["model_name"].lstrip("/").replace("/", "--")
    assert packtrain.finetune(**settings, **place)["last"] == f"checkpoints/mine-{name}"
    assert packtrain.finetune(**settings)["last"] == "packtrain-out"
    assert (tmp_path / "packtrain-out/adapter_model.safetensors").exists()
    assert not (tmp_path / "packtrain-out/best").exists()


def test_skipped_rows_are_listed(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny.grammar(tmp_path / "train.csv", [*tiny.pairs(3), ("nothing to learn", ""), *tiny.pairs(5)])
    with pytest.raises(UserError, match="row 4"):
        packtrain.finetune(**settings)
    packtrain.finetune(**settings, on_bad_rows="skip", max_train_step=1)
    (line,) = (tmp_path / "out/run/skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["row"] == 4
    assert "target is empty" in json.loads(line)["reason"]


# the data sets

CUSTOM = """
import torch

def rows(dataset_config, tokenizer, split):
    for number in range(8 if split == "train" else 3):
        ids = tokenizer.encode("word " * (number % 3 + 2), add_special_tokens=False)
        yield {"input_ids": ids, "labels": [-100] + ids[1:], "attention_mask": [1] * len(ids)}
"""
COLLATOR = """
def get_data_collator(tokenizer):
    def left_padded(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        return {key: torch.tensor([[fill[key]] * (width - len(row[key])) + row[key] for row in rows]) for key in fill}
    return left_padded
"""


def grammar(folder: Path) -> dict[str, Any]:
    file = str(tiny.grammar(folder / "rows.csv", 8))
    return {"dataset": "grammar_dataset", "grammar_dataset": {"train_split": file, "test_split": file}}


def alpaca(folder: Path) -> dict[str, Any]:
    return {"dataset": "alpaca_dataset", "alpaca_dataset": {"data_path": str(tiny.alpaca(folder / "rows.json"))}}


def samsum(folder: Path) -> dict[str, Any]:
    file = folder / "rows.json"
    file.write_text(json.dumps([{"dialogue": f"Ann: {n}\nBob: hi", "summary": f"Ann says {n}"} for n in range(8)]))
    return {"dataset": "samsum_dataset", "samsum_dataset": {"train_split": str(file), "test_split": str(file)}}


def custom(folder: Path) -> dict[str, Any]:
    (folder / "mine.py").write_text(CUSTOM)
    return {"dataset": "custom_dataset", "custom_dataset": {"file": f"{folder / 'mine.py'}:rows"}}


def custom_with_collator(folder: Path) -> dict[str, Any]:
    settings = custom(folder)
    (folder / "mine.py").write_text(CUSTOM + COLLATOR)
    return settings


DATA = [grammar, alpaca, samsum, custom, custom_with_collator]


@pytest.mark.parametrize("data", DATA, ids=lambda data: data.__name__)
def test_each_data_set_padded_and_packed(data: Callable[[Path], dict[str, Any]], base: Path, tmp_path: Path) -> None:
    shared = {"model_name": str(base), "num_epochs": 1, "context_length": 256, "lr": 0.001, **data(tmp_path)}
    tokens = {}
    for batching in ("padding", "packing"):
        out = str(tmp_path / batching)
        if data is custom_with_collator and batching == "packing":
            with pytest.raises(UserError, match="get_data_collator"):
                packtrain.finetune(**shared, batching_strategy=batching, output_dir=out)
            continue
        result = packtrain.finetune(**shared, batching_strategy=batching, output_dir=out)
        assert result["status"] == "done"
        assert result["avg_train_loss"] > 1
        assert result["best_eval_loss"] > 1
        tokens[batching] = result["tokens_total"]
        assert TheirLlama.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] == set()
    assert len(set(tokens.values())) == 1  # nothing lost or doubled by either
    if data is custom_with_collator:  # without a word about batching a collator means padding
        result = packtrain.finetune(**shared, output_dir=str(tmp_path / "unsaid"))
        assert result["tokens_total"] == tokens["padding"]


@pytest.mark.parametrize("batching", ["padding", "packing"])
def test_random_weights_and_synthetic_rows_need_no_tokenizer(batching: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((base / "config.json").read_text(encoding="utf-8"))
    result = packtrain.finetune(
        random_init=str(tmp_path / "config.json"),
        dataset="synthetic_dataset",
        synthetic_dataset={"rows": 20, "length": 16},
        batching_strategy=batching,
        context_length=32,
        num_epochs=1,
        output_dir=str(tmp_path / "out"),
    )
    assert result["tokens_total"] == 20 * 15
    assert result["avg_train_loss"] == pytest.approx(math.log(tiny.VOCABULARY), rel=0.1)
    TheirLlama.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()


# the weights


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Every model that a run builds, and its weights as they were then."""
    kept: list[tuple[nn.Module, dict[str, Tensor]]] = []
    original = finetuning.build

    def build(*args: Any, **more: Any) -> Any:
        model = original(*args, **more)
        kept.append((model, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return model

    monkeypatch.setattr(finetuning, "build", build)
    return kept


@pytest.mark.parametrize(
    "method",
    [
        {"use_peft": False},
        {"lora_config": {"target_modules": "all-linear", "lora_dropout": 0.1}},
        {"lora_config": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["v_proj", "norm"]}},
        {"lora_config": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    ],
    ids=["full", "lora", "whole layers beside lora", "tables beside lora"],
)
def test_after_two_steps_what_trains_has_moved(method: dict[str, Any], settings: dict[str, Any], built: Any) -> None:
    packtrain.finetune(**settings | {"max_train_step": 2, "save_model": False} | method)
    ((model, before),) = built
    assert len(trainable(model)) == len(before) if method.get("use_peft") is False else len(trainable(model)) > 0
    still = [name for name, p in trainable(model).items() if torch.equal(p, before[name])]
    moved = [name for name, p in frozen(model).items() if not torch.equal(p, before[name])]
    assert (still, moved) == ([], [])


def their_curve(model: nn.Module, data: Path, order: list[tuple[int, ...]], lr: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of a loop over transformers' model."""
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    adamw, each, curve = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0), list(rows(data)), []
    for step in order:
        adamw.zero_grad()
        loss = mean(model, [each[row] for row in step])
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in learning if p.grad is not None]).norm()
        adamw.step()
        curve.append((loss.item(), norm.item()))
    return curve


@pytest.mark.parametrize("method", ["full", "lora"])
def test_golden_losses(method: str, settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """The file holds what a run gave when it was written; a loop over transformers gives the same now.

    PACKTRAIN_WRITE_GOLDEN=1 writes it anew.
    """
    settings |= {"use_peft": method == "lora", "lr_scheduler": "constant", "num_epochs": 2, "run_validation": False}
    packtrain.finetune(**settings)
    steps = steps_of(settings["output_dir"])
    found = [(line["loss"], line["grad_norm"]) for line in steps]
    file = GOLDEN / f"{method}.txt"
    if os.environ.get("PACKTRAIN_WRITE_GOLDEN"):
        file.write_text("".join(f"{loss:.7f} {norm:.7f}\n" for loss, norm in found), encoding="utf-8")
    golden = [tuple(map(float, line.split())) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(golden) == 8
    torch.testing.assert_close(torch.tensor(found), torch.tensor(golden), rtol=1e-4, atol=0)

    cfg = build(**settings)
    with open_place("cpu") as place:
        inputs = preflight.examine(cfg).inputs
        loader = building.loaders(cfg, inputs, place)[0]
        finetuning.Saver(cfg, building.build(cfg, inputs, place), inputs, tmp_path / "start", place).save(best=False)
    theirs: nn.Module = TheirLlama.from_pretrained(base if method == "lora" else tmp_path / "start")
    if method == "lora":
        theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "start"), is_trainable=True)
    order = [tuple(row for batch in loader.step(step) for row in batch.rows) for step in range(8)]
    assert sorted(row for step in order[:4] for row in step) == list(range(10))
    curve = their_curve(theirs, Path(settings["grammar_dataset"]["train_split"]), order, settings["lr"])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(curve), rtol=1e-4, atol=0)


# the network


def test_nobody_is_called(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hub could be reached: names are not looked up, and nothing but this machine is connected to."""
    called: list[Any] = []

    def refuse(*address: Any, **more: Any) -> Any:
        called.append(address)
        raise OSError("no network in this test")

    def connect(self: socket.socket, address: Any) -> None:
        here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        (original if here else refuse)(self, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket.socket, "sendto", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443))
    assert "huggingface.co" in called.pop()
    assert packtrain.finetune(**settings)["status"] == "done"
    assert called == []


# the launchers


def run(*command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        **more,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_llama_recipes_command_line(settings: dict[str, Any]) -> None:
    """Two workers of torchrun; the same numbers as one process with the same global batch."""
    words = flags({k: v for k, v in settings.items() if k != "use_peft"} | {"batch_size_training": 2})
    entry = str(ROOT / "getting-started/finetuning/finetuning.py")
    torchrun = ["torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = run(*torchrun, entry, "--enable_fsdp", "--use_peft", "--peft_method", "lora", *words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("trainable ") == 1  # one rank speaks
    two = steps_of(settings["output_dir"])
    packtrain.finetune(**settings | {"batch_size_training": 4, "output_dir": f"{settings['output_dir']}-one"})
    one = steps_of(f"{settings['output_dir']}-one")
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-5)


def test_packtrain_train_with_a_yaml_file(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Full fine-tuning on two workers of our own; a flag wins over the file; validation and saving between epochs."""
    file = tmp_path / "run.yaml"
    written = settings | {"use_peft": False, "batch_size_training": 4, "num_epochs": 1}
    file.write_text(yaml.safe_dump(written), encoding="utf-8")
    done = run("packtrain", "train", str(file), "--nproc_per_node", "2", "--num_epochs", "2")
    assert done.returncode == 0, done.stderr
    assert f"saved: {settings['output_dir']}" in done.stderr
    result = result_of(settings["output_dir"])
    assert (result["status"], result["step"]) == ("done", 4)
    evaluations = column(lines(Path(settings["output_dir"])), "eval_loss")
    assert len(evaluations) == 2
    with torch.no_grad():
        model = TheirLlama.from_pretrained(settings["output_dir"]).eval()
        assert mean(model, list(rows(tmp_path / "validation.csv"))).item() == pytest.approx(evaluations[-1], rel=1e-5)
    before = load_file(base / next(iter(base.glob("model*.safetensors"))).name)
    after = {k: v for f in Path(settings["output_dir"]).glob("model*.safetensors") for k, v in load_file(f).items()}
    assert after.keys() == before.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    origins = yaml_origins(Path(settings["output_dir"]) / "run/config.yaml")
    assert (origins["lr"], origins["num_epochs"], origins["seed"]) == ("file", "flag", "default")


def yaml_origins(file: Path) -> dict[str, str]:
    """Setting -> who set it, from the comments."""
    found = [line.split("  # ") for line in file.read_text(encoding="utf-8").splitlines() if "  # " in line]
    return {text.split(":")[0].strip(): origin for text, origin in reversed(found)}


def test_a_signal_stops_after_saving(settings: dict[str, Any], base: Path) -> None:
    """Exit code 75 and the adapter of the last step; the folder is the run's to go on in, and another's by a flag."""
    out = Path(settings["output_dir"])
    command = [sys.executable, "-m", "packtrain", "train", *flags(settings | {"num_epochs": 10**6})]
    process = subprocess.Popen([*command, "--run_validation", "False", "--nproc_per_node", "2"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 240
        while not (out / "run/metrics.jsonl").exists() or len(lines_so_far(out)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert result_of(out)["status"] == "running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()
    result, steps = result_of(out), steps_of(out)
    assert result["status"] == "stopped"
    assert "SIGTERM" in result["reason"]
    assert result["step"] == len(steps)
    model = PeftModel.from_pretrained(TheirLlama.from_pretrained(base), str(out))
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(UserError, match=r"an unfinished run with other settings .*--num_epochs"):
        packtrain.finetune(**settings)
    assert packtrain.finetune(**settings, overwrite_output_dir=True)["status"] == "done"
    assert (out / "run.old-1/metrics.jsonl").exists()


def lines_so_far(out: Path) -> list[str]:
    return (out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
