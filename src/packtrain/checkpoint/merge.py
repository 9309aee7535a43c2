"""A LoRA put into its base model's weights, block by block: W + scale B A in fp32, then the dtype of the result.

    Merge       what the merged model's tensors are, and their rows one block after another
    blocks      how many rows are in memory at once

Layers trained whole (modules_to_save) and trained biases take the place of the base's. A head that shares the
embedding's weight, and has a LoRA or is not the embedding any more, becomes a weight of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packtrain import peft
from packtrain.checkpoint.adapter import adapter_problems, read_adapter_config
from packtrain.checkpoint.folder import HfFolder, Shape
from packtrain.checkpoint.hf import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TABLES, expected_shapes
from packtrain.checkpoint.tensorfile import DTYPES, TensorFile
from packtrain.errors import UserError, raise_if
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM
from packtrain.peft.lora import LoraAdapter, LoraSettings
from packtrain.peft.tensors import PREFIX, modules

BLOCK = 2**24
"""Elements that are in memory at once."""

EMBEDDING, HEAD = TABLES


def blocks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Rows [a, b) of a tensor, of about `BLOCK` elements."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    yield from ((a, min(a + rows, shape[0])) for a in range(0, shape[0], rows))


class Merge:
    """A base model and its adapter. Raises UserError with everything in either that is wrong or does not fit."""

    def __init__(self, base: Path, config_json: Mapping[str, Any], adapter: Path) -> None:
        where = str(adapter / ADAPTER_CONFIG)
        settings = peft.settings_from(read_adapter_config(adapter), where)
        if not isinstance(settings, LoraSettings):
            raise UserError(
                f"{where}: {peft.name_of(settings)} adds tokens to attention, and there is no weight to merge it into; "
                "use the model and the adapter side by side (packtrain generate --model_name ... --peft_model ...)"
            )
        config = LlamaConfig.from_dict(dict(config_json), str(base / "config.json"))
        self._base = HfFolder(base)
        raise_if(self._base.problems(expected_shapes(_skeleton(config))))
        self._adapter = TensorFile(adapter / ADAPTER_WEIGHTS)
        if PREFIX + EMBEDDING in self._adapter.slots:  # it may have grown with the tokenizer
            config = replace(config, vocab_size=self._adapter.slots[PREFIX + EMBEDDING].shape[0])
        model = _skeleton(config)
        method = peft.method_of(settings)
        raise_if(f"{where}: {problem}" for problem in method.problems(model, settings))
        method.install(model, settings)
        raise_if(adapter_problems(model, adapter))
        self._scales = {f"{lora.name}.weight": lora.scale for _, lora in modules(model, LoraAdapter)}
        self._files: dict[Path, TensorFile] = {}
        self.shapes = expected_shapes(model)
        """Of the merged model's tensors."""
        self.untied = config.tie_word_embeddings and self._head_parts()
        """Whether the head is no longer the embedding."""
        if self.untied:
            self.shapes[HEAD] = self.shapes[EMBEDDING]

    @property
    def dtype(self) -> torch.dtype:
        """The base's."""
        return DTYPES[self._base.slots[EMBEDDING].dtype]

    def rows(self, name: str) -> Iterator[Tensor]:
        """A merged tensor, a block of rows after another."""
        return (self._block(name, a, b) for a, b in blocks(self.shapes[name]))

    def _block(self, name: str, a: int, b: int) -> Tensor:
        for trained in (PREFIX + name, f"{PREFIX}{name.removesuffix('bias')}base_layer.bias"):
            if trained in self._adapter.slots:
                return self._adapter.rows(trained, a, b)
        tied = name == HEAD and name not in self._base.slots
        rows = self._base_rows(EMBEDDING if tied else name, a, b)
        if name not in self._scales:
            return rows
        stem = PREFIX + name.removesuffix(".weight")
        up, down = f"{stem}.lora_B.weight", f"{stem}.lora_A.weight"
        whole = self._adapter.rows(down, 0, self._adapter.slots[down].shape[0])
        return rows.float().addmm_(self._adapter.rows(up, a, b).float(), whole.float(), alpha=self._scales[name])

    def _base_rows(self, name: str, a: int, b: int) -> Tensor:
        path = self._base.file_of(name)
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path].rows(name, a, b)

    def _head_parts(self) -> bool:
        """Whether a tied head is another weight than the embedding once it is merged."""
        if HEAD in self._scales:
            return True
        twins = [PREFIX + name in self._adapter.slots for name in TABLES]
        if not any(twins):
            return False
        return not all(twins) or any(
            not torch.equal(*(self._adapter.rows(PREFIX + name, a, b) for name in TABLES))
            for a, b in blocks(self.shapes[EMBEDDING])
        )


def _skeleton(config: LlamaConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(config, dtype=torch.float32, device=torch.device("meta"))
