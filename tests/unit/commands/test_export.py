"""`packtrain export` beside transformers and peft: merged logits, checkpoints of every kind, and memory.

Checkpoints come from real runs of one rank; several ranks' are in tests/distributed/test_dcp.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

import packtrain
import tiny
from packtrain import cli
from packtrain.checkpoint import merge
from packtrain.checkpoint.hf import expected_shapes
from packtrain.checkpoint.publish import Publication, shards_of
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM as Ours

IDS = torch.arange(3, 60).view(3, 19)
pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def export(*words: Any) -> int:
    return cli.main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A base in one file and one in several, tied and not."""
    root = tmp_path_factory.mktemp("bases")
    sizes: dict[bool, Any] = {
        False: {"shard_size": "100KB", "attention_bias": True},
        True: {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    }
    return {tied: tiny.model(root / f"tied-{tied}", **more) for tied, more in sizes.items()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "two layers": {},
    "all linear, rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 8},
    "a regex": {"target_modules": r".*\.1\..*(q|down)_proj"},
    "beside whole layers": {"modules_to_save": ["k_proj", "model.norm"]},
    "the tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_logits_are_the_adapted_ones(name: str, tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", bases[tied], **ADAPTERS[name])
    if name == "the tables":
        train_the_tables(adapter, tied)
    if name == "biases":
        train_the_biases(adapter)
    out = tmp_path / "out"
    assert (
        export("--model_name", bases[tied], "--peft_model", adapter, "--output_dir", out, "--shard_bytes", 10**5) == 0
    )
    adapted = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[tied]), str(adapter)))
    model, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert (logits(LlamaForCausalLM.from_pretrained(bases[tied])) - adapted).abs().max() > 1e-2
    assert model.config.tie_word_embeddings == (tied and name != "the head")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(out)("he go")["input_ids"] == tiny.tokenizer()("he go")["input_ids"]


def train_the_tables(adapter: Path, tied: bool) -> None:
    """Other values in a saved adapter's tables; one and the same where the model ties them."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for i, name in enumerate(("model.embed_tokens", "lm_head")):
        noise = torch.randn(64, generator=torch.Generator().manual_seed(0 if tied else i))
        tensors[f"base_model.model.{name}.weight"] = tensors[f"base_model.model.{name}.weight"] + 0.1 * noise
    save_file(tensors, file)


def train_the_biases(adapter: Path) -> None:
    """Other values in a saved adapter's biases, those of layers with a LoRA (base_layer) and the others."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    biases = [name for name in tensors if name.endswith(".bias")]
    assert {"base_layer" in name for name in biases} == {True, False}
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensors[name].shape, generator=generator) for name in biases}
    save_file(tensors | {name: tensors[name] + noise[name] for name in biases}, file)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_is_fp32_whatever_is_written(dtype: str, bases: dict[bool, Path], tmp_path: Path) -> None:
    """Every weight is the fp32 sum, rounded once."""
    adapter = tiny.adapter(tmp_path / "adapter", bases[False], target_modules="all-linear")
    words = ("--model_name", bases[False], "--peft_model", adapter, "--output_dir", tmp_path / "out", "--dtype", dtype)
    assert export(*words) == 0
    found = load_file(tmp_path / "out/model.safetensors")
    base = LlamaForCausalLM.from_pretrained(bases[False])
    expected = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().double().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert (tensor.double() - expected[name]).abs().max() <= torch.finfo(tensor.dtype).eps * expected[
            name
        ].abs().max()
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype


def test_a_merge_in_the_bases_dtype(bases: dict[bool, Path], tmp_path: Path) -> None:
    half = LlamaForCausalLM.from_pretrained(bases[True]).bfloat16()
    half.save_pretrained(tmp_path / "base")
    adapter = tiny.adapter(tmp_path / "adapter", tmp_path / "base")
    assert export("--peft_model", adapter, "--output_dir", tmp_path / "out") == 0  # the base is in adapter_config.json
    with safe_open(str(tmp_path / "out/model.safetensors"), framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_a_grown_vocabulary(bases: dict[bool, Path], tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", bases[False], modules_to_save=["embed_tokens", "lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(3, 64)])
    save_file(tensors, file)
    words = ("--model_name", bases[False], "--peft_model", adapter, "--output_dir", tmp_path / "out")
    assert export(*words) == 0
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (tiny.VOCABULARY + 3, 64)


@pytest.fixture(scope="module")
def runs(bases: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: their folders hold what a checkpoint has to become."""
    root = tmp_path_factory.mktemp("runs")
    data = str(tiny.grammar(root / "rows.csv"))
    shared: dict[str, Any] = {
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 8,
        "num_epochs": 1,
        "lr": 0.01,
    }
    lora = {"use_peft": True, "lora_config": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}
    settings: dict[str, dict[str, Any]] = {
        "full": {},
        "gathered, bf16": {"checkpoint_type": "FULL_STATE_DICT", "fsdp_config.pure_bf16": True},
        "lora": lora,
        "gathered lora": lora | {"checkpoint_type": "FULL_STATE_DICT"},
        "prefix": {"use_peft": True, "peft_method": "prefix"},
    }
    for name, more in settings.items():
        packtrain.finetune(model_name=str(bases["lora" in name]), output_dir=str(root / name), **shared, **more)
    return {name: root / name for name in settings}


@pytest.mark.parametrize("name", ["full", "gathered, bf16"])
def test_a_checkpoint_becomes_the_runs_own_folder(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Tensor by tensor, configuration and tokenizer too."""
    for place in (runs[name], runs[name] / "checkpoints", runs[name] / "checkpoints/step-1"):
        out = tmp_path / place.name
        assert export("--checkpoint", place, "--output_dir", out) == 0
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (out / file).read_bytes() == (runs[name] / file).read_bytes(), file
        before, after = (load_file(folder / "model.safetensors") for folder in (runs[name], out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)


@pytest.mark.parametrize("name", ["lora", "gathered lora", "prefix"])
def test_an_adapters_checkpoint_is_an_adapter(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    assert export("--checkpoint", runs[name], "--output_dir", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == json.loads(
        (runs[name] / "adapter_config.json").read_text()
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (runs[name], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_an_adapters_checkpoint_merged(runs: dict[str, Path], bases: dict[bool, Path], tmp_path: Path) -> None:
    words = ("--checkpoint", runs["lora"], "--model_name", bases[True], "--output_dir", tmp_path / "out")
    assert export(*words) == 0
    adapted = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[True]), str(runs["lora"])))
    assert (
        logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")) - adapted
    ).abs().max() <= 1e-5 * adapted.abs().max()


def test_a_gathered_checkpoint_is_a_hugging_face_folder_already(runs: dict[str, Path], bases: dict[bool, Path]) -> None:
    full = LlamaForCausalLM.from_pretrained(runs["gathered, bf16"] / "checkpoints/step-1")
    assert torch.equal(logits(full), logits(LlamaForCausalLM.from_pretrained(runs["gathered, bf16"])))
    base = LlamaForCausalLM.from_pretrained(bases[True])
    adapted = PeftModel.from_pretrained(base, str(runs["gathered lora"] / "checkpoints/step-1"))
    ours = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[True]), str(runs["gathered lora"]))
    assert torch.equal(logits(adapted), logits(ours))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--peft_model A", "--output_dir: missing"),
        ("--output_dir new", "--checkpoint, --peft_model: expected one of the two"),
        ("--output_dir new --peft_model A --checkpoint C", "found both"),
        ("--output_dir RUN --checkpoint RUN", "is there already; expected a new or empty folder"),
        ("--output_dir new --checkpoint RUN/run", "no checkpoint there; expected a step-N folder"),
        ("--output_dir new --peft_model RUN --dtype int8", "expected one of auto, float32, bfloat16, float16"),
        ("--output_dir new --peft_model PREFIX --model_name BASE", "there is no weight to merge it into"),
        ("--output_dir new --peft_model RUN --model_name BASE", "no adapter_config.json there"),
        ("--output_dir new --peft_model OTHER --model_name BASE", "of the wrong shape"),
    ],
)
def test_what_cannot_be_exported(
    words: str, said: str, runs: dict[str, Path], bases: dict[bool, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tiny.model(tmp_path / "other-base", hidden_size=32)
    places = {"RUN": runs["full"], "PREFIX": runs["prefix"], "BASE": bases[False]}
    places["OTHER"] = tiny.adapter(tmp_path / "other", other)
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert export(*words.split()) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_not_exported(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    for file in (runs["full"] / "checkpoints/step-1").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((folder / "rank-00000.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(damaged)
    assert export("--checkpoint", folder, "--output_dir", tmp_path / "out") == 2
    assert "rank-00000.safetensors: its bytes are not those that were written" in capsys.readouterr().err


def test_a_merge_that_loses_the_scale_is_noticed(bases: dict[bool, Path], tmp_path: Path, monkeypatch: Any) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", bases[False])
    monkeypatch.setattr(merge.LoraSettings, "scale", 1.0)
    assert export("--model_name", bases[False], "--peft_model", adapter, "--output_dir", tmp_path / "out") == 0
    adapted = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bases[False]), str(adapter)))
    assert (logits(LlamaForCausalLM.from_pretrained(tmp_path / "out")) - adapted).abs().max() > 1e-3


SIZE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 48_000}
"""0.7 GB in fp32: tables of 197 MB, layers of 51 MB."""

MERGES = """
import resource, sys
from pathlib import Path
from packtrain.commands.export import export_merged
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_merged(*map(Path, sys.argv[1:]), None, 200_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A base of 0.7 GB in files of 200 MB is merged in less than 300 MB."""
    size = large_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(SIZE["num_hidden_layers"])]
    tensors = {f"{n}.lora_A.weight": torch.ones(2, 1024) for n in names}
    save_file(
        tensors | {f"{n}.lora_B.weight": torch.ones(1024, 2) for n in names}, adapter / "adapter_model.safetensors"
    )
    words = [sys.executable, "-c", MERGES, str(tmp_path / "base"), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) * 1024 < 300e6 < size / 2
    with safe_open(next((tmp_path / "out").glob("model-00002*")), framework="pt") as file:
        name = next(n for n in file.keys() if n.endswith("q_proj.weight"))  # noqa: SIM118
        assert torch.equal(file.get_tensor(name), torch.full((1024, 1024), 4.0))


def large_base(folder: Path) -> int:
    """Zeros, file by file; its bytes."""
    config = tiny.SIZES | SIZE | {"num_attention_heads": 8, "num_key_value_heads": 8, "model_type": "llama"}
    skeleton = Ours(LlamaConfig.from_dict(config), dtype=torch.float32, device=torch.device("meta"))
    shapes = expected_shapes(skeleton)
    publication = Publication(folder, shards_of(list(shapes.items()), torch.float32, 200_000_000), torch.float32)
    for name, shape in shapes.items():
        publication.add(name, torch.zeros(shape))
    publication.commit(config)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
