"""A Hugging Face folder's weights: checked all at once, then read by rows.

    HfFolder(path)            reads the index and every shard's header; nothing else
    .problems(expected)       a sentence for everything that is wrong or does not fit the model
    .damaged()                a sentence for every file that has other bytes than the hub's
    .fingerprint              tells two models apart without reading them whole
    .rows(name, start, stop)  rows of a tensor as they are stored
    link_problem              whether a file is reached through a link that leads out of its folder

`model.safetensors` goes before `model.safetensors.index.json` where both are there, as in transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packtrain.checkpoint.tensorfile import DTYPES, BadFile, Slot, is_lfs_pointer, read_header, unique_keys

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHOWN = 10
"""How many names of a kind a message lists before it counts."""

_SAMPLES, _SAMPLE = 1000, 4096
"""How many pieces of a file, of how many bytes, its fingerprint reads."""

_BLOB = re.compile(r"blobs/[0-9a-f]{64}")

Shape = tuple[int, ...]


class HfFolder:
    """The weights in a folder. Making one never fails: what is wrong is in `problems`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.slots: dict[str, Slot] = {}
        """Every tensor that can be read, by name."""
        self._shard: dict[str, str] = {}
        self._map: dict[str, str] = {}
        self._unknown: set[str] = set()
        self._handles: dict[str, Any] = {}
        self._wrong: list[str] = []
        for name in self._shards():
            self._read_shard(name)
        self._compare_with_index()

    def problems(self, expected: Mapping[str, Shape]) -> list[str]:
        """All that is wrong: files, and tensors that are missing, extra, misshaped or no floats.

        `expected` maps each tensor of the model to its shape. Left out are rotary tables, which are computed, and a
        head beside the embedding of a tied model.
        """
        missing = [name for name in expected if name not in self.slots and name not in self._unknown]
        extra = [name for name in self.slots if name not in expected and not _harmless(name, expected)]
        pairs = [(name, self.slots[name], shape) for name, shape in expected.items() if name in self.slots]
        shapes = [
            f"{name} is {list(slot.shape)}, expected {list(shape)}"
            for name, slot, shape in pairs
            if slot.shape != shape
        ]
        kinds = [f"{name} is {slot.dtype}" for name, slot, _ in pairs if slot.dtype not in DTYPES]
        problems = list(self._wrong)
        if problems and not self.slots and not self._unknown:
            return problems
        if missing:
            problems.append(f"{self.path}: {count(missing, 'missing')}: {listed(missing)}; {_REMEDY}")
        if extra:
            described = [name + _nearest(name, expected) for name in extra[:SHOWN]]
            problems.append(
                f"{self.path}: {count(extra, 'not of this model')}: {listed(described, len(extra))}; {_REMEDY}"
            )
        if shapes:
            problems.append(f"{self.path}: {count(shapes, 'of the wrong shape')}: {listed(shapes)}; {_REMEDY}")
        if kinds:
            problems.append(
                f"{self.path}: {count(kinds, 'of the wrong dtype')}: {listed(kinds)}; "
                f"expected {', '.join(DTYPES)}: quantized weights are not read, take the model's original ones"
            )
        return problems

    def damaged(self) -> list[str]:
        """Files of the hub's cache, which names them by their SHA-256, whose bytes have another one. Reads all of them.

        Files from elsewhere carry no sum.
        """
        blobs = {shard: (self.path / shard).resolve() for shard in self._handles}
        known = {shard: blob for shard, blob in blobs.items() if _BLOB.fullmatch("/".join(blob.parts[-2:]))}
        with ThreadPoolExecutor(max_workers=min(16, len(known) or 1), thread_name_prefix="weights") as pool:
            sums = dict(zip(known, pool.map(_sha256, known.values()), strict=True))
        return [
            f"{self.path / shard}: its bytes are not those that the hub has (SHA-256 {sums[shard][:8]}..., expected "
            f"{blob.name[:8]}...): a damaged disk or download; delete {blob} and download it again"
            for shard, blob in known.items()
            if sums[shard] != blob.name
        ]

    @property
    def fingerprint(self) -> str:
        """Hex digest of every file's name, length and 1000 pieces spread over it: another training differs in all."""
        digest = hashlib.sha256()
        for shard in self._handles:
            path = self.path / shard
            size = path.stat().st_size
            digest.update(f"{shard} {size}\n".encode())
            with path.open("rb") as file:
                for place in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                    file.seek(place)
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.path / self._shard[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, on the CPU, in the file's dtype; nothing else of it is read."""
        slot = self.slots[name]
        if start >= stop:
            return torch.empty(0, *slot.shape[1:], dtype=DTYPES[slot.dtype])
        rows: Tensor = self._handles[self._shard[name]].get_slice(name)[start:stop]
        return rows

    def _shards(self) -> list[str]:
        """Names of the files that hold the weights; problems of the index are noted."""
        if not self.path.is_dir():
            self._wrong.append(
                f"{self.path}: no such folder; expected a Hugging Face folder with config.json and {SINGLE}"
            )
            return []
        if (self.path / SINGLE).exists():
            return [SINGLE]
        if not (self.path / INDEX).exists():
            self._wrong.append(_nothing_there(self.path))
            return []
        try:
            self._map = _weight_map(self.path / INDEX)
        except (BadFile, OSError) as error:
            self._wrong.append(f"{self.path / INDEX}: {error}")
        names = sorted(set(self._map.values()))
        bad = [name for name in names if not _plain_path(name)]
        if bad:
            self._wrong.append(
                f"{self.path / INDEX}: names files outside of the folder: {listed(bad)}; "
                "expected names such as model-00001-of-00002.safetensors"
            )
        absent = [name for name in names if name not in bad and not (self.path / name).exists()]
        if absent:
            self._wrong.append(
                f"{self.path}: {len(absent)} of {len(names)} shards that {INDEX} names are missing: {listed(absent)}; "
                "copy or download them again"
            )
        self._unknown = {name for name, shard in self._map.items() if shard in bad or shard in absent}
        return [name for name in names if name not in bad and name not in absent]

    def _read_shard(self, shard: str) -> None:
        path = self.path / shard
        try:
            if leads_out := link_problem(path, self.path):
                raise BadFile(leads_out)
            slots = read_header(path)
            self._handles[shard] = safe_open(str(path), framework="pt", device="cpu")
        except (BadFile, OSError, SafetensorError) as error:
            self._wrong.append(f"{path}: {error}")
            self._unknown |= {name for name, where in self._map.items() if where == shard}
            return
        twice = [name for name in slots if name in self.slots]
        if twice:
            self._wrong.append(f"{path}: {count(twice, 'also in another shard')}: {listed(twice)}; remove one of them")
        self.slots |= slots
        self._shard |= dict.fromkeys(slots, shard)

    def _compare_with_index(self) -> None:
        lost = [n for n, shard in self._map.items() if n not in self._unknown and self._shard.get(n) != shard]
        if lost:
            described = [f"{name} ({self._map[name]})" for name in lost[:SHOWN]]
            self._wrong.append(
                f"{self.path / INDEX}: {count(lost, 'not in the shard it names')}: {listed(described, len(lost))}; "
                "the index and the shards are of different models or versions: download the folder again"
            )
            self._unknown |= set(lost)


def link_problem(path: Path, folder: Path) -> str | None:
    """A sentence if `path` is a link that leads out of `folder`; None if not.

    The hub's cache keeps a repository's files in blobs/ and links them from snapshots/COMMIT/: there the repository's
    cache folder is the border.
    """
    inside = folder.resolve()
    if inside.parent.name == "snapshots" and (inside.parent.parent / "blobs").is_dir():
        inside = inside.parent.parent
    target = path.resolve()
    if target.is_relative_to(inside):
        return None
    return f"is a link to {target}, outside of {inside}; copy the file there, or name the folder that holds it"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_path(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and not set(name) & {"\0", "\\"}


def _weight_map(path: Path) -> dict[str, str]:
    if leads_out := link_problem(path, path.parent):
        raise BadFile(leads_out)
    if is_lfs_pointer(path):
        raise BadFile("is a Git LFS pointer; run `git lfs pull` in its folder")
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"cannot be read ({error}); copy or download it again") from None
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise BadFile("has no weight_map of tensor names to file names; copy or download it again")
    return table


def _nothing_there(path: Path) -> str:
    if any(path.glob("pytorch_model*.bin")):
        return (
            f"{path}: holds pickled weights only (pytorch_model.bin); only safetensors is read, for a pickle can run "
            'code. If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('NEW_FOLDER')\""
        )
    if any(path.glob("consolidated*.pth")):
        return (
            f"{path}: holds Meta's original weights (consolidated.*.pth); expected the same model in Hugging Face's "
            f"format, with config.json and {SINGLE}"
        )
    return f"{path}: neither {SINGLE} nor {INDEX} is there; expected a Hugging Face folder with the model's weights"


_REMEDY = "config.json and the weights must be of one model"


def _harmless(name: str, expected: Mapping[str, Shape]) -> bool:
    tied_head = name == "lm_head.weight" and "model.embed_tokens.weight" in expected
    return tied_head or name.endswith(".rotary_emb.inv_freq")


def _nearest(name: str, expected: Mapping[str, Shape]) -> str:
    close = get_close_matches(name, expected, n=1)
    return f" (nearest of the model's: {close[0]} {list(expected[close[0]])})" if close else ""


def count(names: Sequence[str], what: str) -> str:
    """For example "3 tensors are missing"."""
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {what}"


def listed(names: Sequence[str], total: int | None = None) -> str:
    """The first of the names, and how many more there are of `total` (all that are given, by default)."""
    more = (total or len(names)) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
