"""What a folder from a stranger can do to who trains with it: nothing but be refused. SECURITY.md promises it.

no pickle           in any slot of model, adapter, data, checkpoint and run folder
no remote code      whatever config.json, tokenizer_config.json or a chat template names
no way out          of a folder, by index or link (also tests/unit/checkpoint/test_folder.py)
no constructor      in YAML (also tests/unit/configs/test_yaml_file.py)
no secret           from the environment in anything that is written or said
no call             in the source that could load code or a pickle

Payloads create a file when they run; that they do is shown first.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from broken import Home
from packtrain import cli
from packtrain.checkpoint.dcp_folder import DONE, INDEX, MANIFEST, STATE, facts_of, newest, verify
from packtrain.errors import EXIT_USER

SOURCE = Path(__file__).resolve().parents[1] / "src" / "packtrain"
CANARIES = {
    "HF_TOKEN": "hf_CANARYhub1234567890",
    "WANDB_API_KEY": "CANARYwandb1234567890",
    "HUGGING_FACE_HUB_TOKEN": "hf_CANARYold",
}


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, rows, and a run of two steps with a checkpoint."""
    root = tmp_path_factory.mktemp("right")
    tiny.adapter(root / "adapter", tiny.model(root / "model"))
    tiny.grammar(root / "train.csv", 8)
    tiny.grammar(root / "validation.csv", 2)
    assert cli.main(["train", *train_flags(Home(root, root / "model", root / "adapter"))]) == 0
    return root


@pytest.fixture
def home(tmp_path: Path, originals: Path) -> Home:
    """A copy to spoil."""
    shutil.copytree(originals, tmp_path / "home")
    return Home(tmp_path / "home", tmp_path / "home" / "model", tmp_path / "home" / "adapter")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a payload would create; never there at the end."""
    yield tmp_path / "it-ran"
    assert not (tmp_path / "it-ran").exists(), "code from a file ran"


def train_flags(home: Home, **change: Any) -> list[str]:
    """One epoch of one step, and a checkpoint."""
    return home.argv({"batch_size_training": 1, "max_train_step": 2, "save_steps": 1} | change)


def payloads(marker: Path) -> list[bytes]:
    """A bare pickle, and one as torch.save writes it."""
    file = marker.with_name("payload")
    torch.save({"weight": Evil(marker)}, file)
    return [pickle.dumps(Evil(marker)), file.read_bytes()]


def test_the_payloads_do_run_where_they_are_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    bare, _ = payloads(marker)
    pickle.loads(bare)
    assert marker.exists()
    marker.unlink()
    torch.load(marker.with_name("payload"), weights_only=False)
    assert marker.exists()


SLOTS = [
    *(f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")),
    *(f"model/{name}" for name in ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")),
    *(f"model/{name}" for name in ("pytorch_model.bin", "training_args.bin", "model.safetensors.index.json")),
    *(f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")),
    "train.csv",
    *(f"out/run/{name}" for name in ("result.json", "metrics.jsonl", "config.yaml")),
]
"""Files that a run may open, by the folder they are in."""


@pytest.mark.parametrize("slot", SLOTS)
def test_a_pickle_in_a_files_place_is_never_loaded(slot: str, home: Home, marker: Path) -> None:
    for payload in payloads(marker):
        (home.folder / slot).write_bytes(payload)
        if slot == "adapter/adapter_model.bin":
            (home.adapter / "adapter_model.safetensors").unlink(missing_ok=True)
        cli.main(["train", *train_flags(home, from_peft_checkpoint=home.adapter if "adapter" in slot else None)])
        cli.main(["generate", "--model_name", str(home.model), "--peft_model", str(home.adapter), "--prompt", "he",
                  "--max_new_tokens", "1"])  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "tsv"])
def test_nor_in_a_data_file(suffix: str, home: Home, marker: Path) -> None:
    for payload in payloads(marker):
        file = home.folder / f"rows.{suffix}"
        file.write_bytes(payload)
        assert cli.main(["data", *train_flags(home, grammar_dataset__train_split=file)]) == EXIT_USER


def test_nor_anywhere_in_a_checkpoint(home: Home, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = newest(home.out / "checkpoints")
    assert folder is not None
    right = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {DONE, INDEX, MANIFEST, STATE} < set(right)
    for payload in payloads(marker):
        for name in (*right, ".metadata", "__0_0.distcp"):
            (folder / name).write_bytes(payload)
            assert cli.main(["export", "--checkpoint", str(folder), "--output_dir", str(home.folder / "e")]) != 0 or (
                name not in right
            )
            for other, content in right.items():
                (folder / other).write_bytes(content)
            (folder / name).unlink() if name not in right else None
            shutil.rmtree(home.folder / "e", ignore_errors=True)


def test_nor_where_the_manifest_agrees_with_it(home: Home, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checksums say that a file is as it was written, and nothing of who wrote it."""
    folder = newest(home.out / "checkpoints")
    assert folder is not None
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        right = (folder / name).read_bytes()
        for payload in payloads(marker):
            (folder / name).write_bytes(payload)
            forge(folder, manifest)
            assert not verify(folder)
            with_it = ["--checkpoint", str(folder), "--output_dir", str(home.folder / "e")]
            assert cli.main(["export", *with_it]) != 0
            assert "Traceback" not in capsys.readouterr().err, name
        (folder / name).write_bytes(right)


def forge(folder: Path, manifest: dict[str, Any]) -> None:
    """Make manifest and DONE fit the files as they are now."""
    manifest["files"] = {name: facts_of(folder / name)._asdict() for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    done = {"step": manifest["step"], "manifest_sha256": facts_of(folder / MANIFEST).sha256}
    (folder / DONE).write_text(json.dumps(done) + "\n")


CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Mine:\n    pass\n"


def test_code_that_a_config_names_is_not_imported(
    home: Home, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.model / "mine.py").write_text(CODE.format(marker=str(marker)))
    (home.folder / "evil_kernel.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(str(home.folder))
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    names = {"auto_map": dict.fromkeys(classes, "mine.Mine"), "trust_remote_code": True}
    attention = {"_attn_implementation_internal": "evil_kernel", "_attn_implementation": "evil_kernel"}
    home.config(**names, **attention, custom_generate="mine.py")
    tokenizer = home.model / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | names | {"tokenizer_class": "Mine"}))
    home.adapter_config(auto_mapping={"base_model_class": "Mine", "parent_library": "evil_kernel"})
    cli.main(["train", *train_flags(home, overwrite_output_dir=True)])
    cli.main(["train", *train_flags(home, from_peft_checkpoint=home.adapter, overwrite_output_dir=True)])
    cli.main(["generate", "--model_name", str(home.model), "--peft_model", str(home.adapter), "--prompt", "he"])
    home.config(model_type="mine")  # now transformers would have to ask the folder's own code
    assert cli.main(["train", *train_flags(home, overwrite_output_dir=True)]) == EXIT_USER
    assert cli.main(["generate", "--model_name", str(home.model), "--prompt", "he"]) == EXIT_USER
    assert "evil_kernel" not in sys.modules


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set _ = messages.append('x') %}{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_a_chat_template_reaches_no_python(
    template: str, home: Home, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.model / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    talk = home.folder / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "hello"}]))
    assert cli.main(["generate", "--model_name", str(home.model), "--conversation", str(talk)]) == EXIT_USER
    said = capsys.readouterr().err
    assert "chat template" in said
    assert "Traceback" not in said


def test_a_chat_template_ends(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (home.model / "chat_template.jinja").write_text(loop)
    talk = home.folder / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "hello"}]))
    assert cli.main(["generate", "--model_name", str(home.model), "--conversation", str(talk)]) == EXIT_USER
    assert "chat template" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["index", "link"])
def test_no_way_out_of_the_folder(way: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    outside = home.folder / "outside.safetensors"
    if way == "index":
        index = home.sharded()
        first = json.loads(index.read_text())
        name = next(iter(first["weight_map"].values()))
        shutil.copy(home.model / name, outside)
        first["weight_map"] = {k: "../outside.safetensors" if v == name else v for k, v in first["weight_map"].items()}
        index.write_text(json.dumps(first))
    else:
        shutil.move(home.model / "model.safetensors", outside)
        (home.model / "model.safetensors").symlink_to(outside)
    assert cli.main(["check", *train_flags(home, output_dir=home.folder / "new")]) == EXIT_USER
    assert "outside" in capsys.readouterr().err


def test_yaml_constructs_nothing(home: Home, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = home.folder / "run.yaml"
    file.write_text(f"lr: !!python/object/apply:os.system ['touch {marker}']\n")
    assert cli.main(["train", str(file), *train_flags(home)]) == EXIT_USER
    assert "tags are not read here" in capsys.readouterr().err


def test_no_secret_is_written_or_said(
    home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    flags = train_flags(home, overwrite_output_dir=True, save_metrics=True, flop_counter=True, flop_counter_start=1)
    assert cli.main(["train", *flags]) == 0
    assert cli.main(["train", *train_flags(home, model_name=home.folder / "none")]) == EXIT_USER
    written = {str(path): path.read_bytes() for path in home.out.rglob("*") if path.is_file()}
    assert len(written) > 10
    spoken = "".join(capfd.readouterr()).encode()
    assert spoken
    for text in (*written.values(), spoken):
        assert b"CANARY" not in text


def test_the_search_for_secrets_finds_one(home: Home) -> None:
    (home.out / "run" / "note.txt").write_text(CANARIES["HF_TOKEN"])
    assert any(b"CANARY" in path.read_bytes() for path in home.out.rglob("*") if path.is_file())


FORBIDDEN = {
    "pickle.load", "pickle.loads", "torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "marshal.loads", "shelve.open", "joblib.load", "os.system", "os.popen", "eval", "exec", "dill.loads",
}  # fmt: skip
NEVER_TRUE = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}
"""Keywords that may not be True; weights_only=True would still be a pickle."""
OWN_CODE = {"data/custom.py": "exec_module"}
"""The one place that runs a file: --custom_dataset.file, which the user names."""


def offences(source: str, where: str) -> list[str]:
    """Calls that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in FORBIDDEN or (name.endswith(".exec_module") and OWN_CODE.get(where) != "exec_module"):
            found.append(f"{where}:{node.lineno}: {name}")
        found += [
            f"{where}:{node.lineno}: {word.arg}=True"
            for word in node.keywords
            if word.arg in NEVER_TRUE and not (isinstance(word.value, ast.Constant) and word.value.value is False)
        ]
    return found


def test_the_source_has_no_call_that_loads_code() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    assert [found for file in files for found in offences(file.read_text(), str(file.relative_to(SOURCE)))] == []


@pytest.mark.parametrize(
    "line", ["torch.load(f)", "f(trust_remote_code=True)", "spec.loader.exec_module(m)", "eval(x)"]
)
def test_and_the_search_finds_them(line: str) -> None:
    assert offences(line, "train/loop.py")


def test_the_lock_of_versions_is_whole() -> None:
    """Every library that is installed for a run is pinned to one version."""
    pins = (SOURCE.parents[1] / "constraints.txt").read_text().splitlines()
    assert all("==" in line for line in pins if line and not line.startswith("#"))
    assert os.path.exists(SOURCE.parents[1] / "SECURITY.md")
