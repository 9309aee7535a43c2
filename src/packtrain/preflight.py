"""Before any GPU work: asks every room for its problems and says them all at once.

inputs      every rank's way to what the run reads: each machine's leader examines, the others follow
examine     reads and checks model, tokenizer, adapters, data and folder; raises one UserError with all problems
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoTokenizer

from packtrain import log
from packtrain.checkpoint.adapter import read_adapter_config
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import expected_shapes
from packtrain.checkpoint.hub import resolve
from packtrain.checkpoint.store import read_json, record_failure
from packtrain.configs.run import RunConfig, fields_of
from packtrain.data import custom
from packtrain.data.audit import Audit
from packtrain.data.sources import Split
from packtrain.data.tokens import Tokens, tokenize
from packtrain.distributed.place import Place
from packtrain.errors import UserError, raise_if
from packtrain.finetuning import Inputs, output_root
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM
from packtrain.peft import lora

T = TypeVar("T")


@dataclass
class _Problems:
    """Collects what is wrong while reading goes on; what depends on something missing is not asked."""

    found: list[str] = field(default_factory=list)

    def ask(self, read: Callable[[], T]) -> T | None:
        """What `read` returns, or None after noting its UserError."""
        try:
            return read()
        except UserError as error:
            self.found += error.problems
            return None


@dataclass(frozen=True, slots=True)
class Examined:
    """What the leader found right, and what it has to say about it."""

    inputs: Inputs
    audits: dict[str, Audit]

    def lines(self) -> list[str]:
        """What the user should know about the data."""
        return [f"{split}: {line}" for split, audit in self.audits.items() for line in audit.lines()]


def inputs(cfg: RunConfig, place: Place) -> Inputs:
    """The run's inputs on every rank. The leader of each machine reads and checks; the others open its tokens.

    Ranks wait on the store, not in a collective: tokenising may take longer than a collective's time-out.
    """
    mine: list[Examined] = []

    def lead() -> str:
        try:
            mine.append(examine(cfg))
        except UserError as error:
            root = output_root(cfg)
            if not _output_problems(root):
                record_failure(root, str(error))
            raise
        return str(_leave(mine[0].inputs)) if place.local_world_size > 1 else ""

    folder = place.agree("inputs", lead, each_machine=True)
    if mine:
        for line in mine[0].lines():
            log.say(line)
    found = mine[0].inputs if mine else _follow(cfg, Path(folder))
    if folder:
        _forget(Path(folder), place)
    return found


def examine(cfg: RunConfig) -> Examined:
    """Read and check all of it. Raises UserError with every problem found."""
    problems = _Problems()
    problems.found += _output_problems(output_root(cfg))
    model = problems.ask(lambda: _Model.read(cfg))
    tokenizer = problems.ask(lambda: read_tokenizer(cfg))
    needs_tokenizer = cfg.train_config.dataset != "synthetic_dataset"
    if model is not None:
        model = replace(model, config=_grown(cfg, model, tokenizer, problems))
        problems.found += _model_problems(model)
    tokens: dict[str, Tokens] = {}
    audits: dict[str, Audit] = {}
    if model is not None and (tokenizer is not None or not needs_tokenizer):
        splits: tuple[Split, ...] = ("train", "validation") if cfg.train_config.run_validation else ("train",)
        for split in splits:
            pair = problems.ask(partial(_tokenize, cfg, split, tokenizer, model.config.vocab_size))
            if pair is not None:
                tokens[split], audits[split] = pair
    collator = problems.ask(lambda: _collator(cfg, tokenizer)) if tokenizer is not None else None
    raise_if(problems.found)
    assert model is not None
    return Examined(_inputs(cfg, model, tokenizer, tokens, collator), audits)


def read_tokenizer(cfg: RunConfig) -> Any | None:
    """The run's tokenizer; None where none is needed (random weights and synthetic rows)."""
    train = cfg.train_config
    name = train.tokenizer_name or train.model_name
    if name is None:
        if train.dataset == "synthetic_dataset":
            return None
        raise UserError(
            f"--tokenizer_name: missing; --random_init has no tokenizer, and --dataset {train.dataset} needs one"
        )
    flag = "--tokenizer_name" if train.tokenizer_name else "--model_name"
    folder = resolve(name, flag)
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        if train.dataset == "synthetic_dataset":
            return None
        raise UserError(
            f"{flag} {name}: no tokenizer there (tokenizer.json or tokenizer.model); "
            "give a folder that has one with --tokenizer_name"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag} {name}: its tokenizer cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from None


@dataclass(frozen=True, slots=True)
class _Model:
    """A model's description and, unless it is random, its weights."""

    config: LlamaConfig
    config_json: dict[str, Any]
    weights: HfFolder | None
    lora: lora.LoraSettings | None
    adapter: Path | None

    @classmethod
    def read(cls, cfg: RunConfig) -> _Model:
        train = cfg.train_config
        problems = _Problems()
        flag = "--random_init" if train.random_init else "--model_name"
        folder = resolve(str(train.random_init or train.model_name), flag) if not _is_json(train.random_init) else None
        file = Path(str(train.random_init)) if folder is None else folder / "config.json"
        raw = read_json(file)
        if raw is None:
            raise UserError(
                f"{flag} {file.parent}: no config.json there; expected a Hugging Face folder of a Llama model"
            )
        config = problems.ask(lambda: LlamaConfig.from_dict(raw))
        weights = None if train.random_init or folder is None else problems.ask(lambda: HfFolder(folder))
        settings, adapter = problems.ask(lambda: _adapter(cfg)) or (None, None)
        raise_if(problems.found)
        assert config is not None
        return cls(config, raw, weights, settings, adapter)


def _is_json(random_init: str | None) -> bool:
    return random_init is not None and Path(random_init).is_file()


def _adapter(cfg: RunConfig) -> tuple[lora.LoraSettings | None, Path | None]:
    """LoRA settings: the flags', or the saved adapter's, which win; a typed flag at odds with them is an error."""
    if not cfg.train_config.use_peft:
        return None, None
    section = cfg.lora_config
    typed = lora.LoraSettings(
        r=section.r,
        lora_alpha=section.lora_alpha,
        target_modules=section.target_modules,
        lora_dropout=section.lora_dropout,
        use_rslora=section.use_rslora,
        modules_to_save=section.modules_to_save,
    )
    name = cfg.train_config.from_peft_checkpoint
    if not name:
        return typed, None
    folder = resolve(name, "--from_peft_checkpoint")
    saved = lora.settings_from(read_adapter_config(folder), str(folder / "adapter_config.json"))
    names = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "modules_to_save")
    raise_if(
        f"--lora_config.{n} {getattr(typed, n)}: {folder} was trained with {getattr(saved, n)}; "
        "leave the flag out to go on with it"
        for n in names
        if cfg.typed(f"lora_config.{n}") and _norm(getattr(typed, n)) != _norm(getattr(saved, n))
    )
    return saved, folder


def _norm(value: Any) -> Any:
    return frozenset(value) if isinstance(value, tuple) else value


def _grown(cfg: RunConfig, model: _Model, tokenizer: Any | None, problems: _Problems) -> LlamaConfig:
    """The config with as many embedding rows as the tokenizer has tokens, as in the original."""
    have = model.config.vocab_size
    want = have if tokenizer is None else len(tokenizer)
    if want <= have:
        return model.config
    if model.lora is not None and not {"embed_tokens", "lm_head"} <= set(model.lora.modules_to_save):
        problems.found.append(
            f"tokenizer: {want} tokens, but the model's embedding has {have} rows; with LoRA the new rows are trained "
            "and kept only with --modules_to_save embed_tokens,lm_head; add that flag, or use the model's own tokenizer"
        )
    return replace(model.config, vocab_size=want)


def _model_problems(model: _Model) -> list[str]:
    """Weights against the config, adapters' targets against the layers."""
    skeleton = LlamaForCausalLM(model.config, dtype=torch.float32, device=torch.device("meta"))
    found: list[str] = []
    if model.weights is not None:
        found += model.weights.problems(_expected(skeleton, model))
    if model.lora is not None:
        found += lora.problems(skeleton, model.lora)
    return found


def _expected(skeleton: LlamaForCausalLM, model: _Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor -> the shape that config.json says the file holds: before the vocabulary grew."""
    rows = int(model.config_json["vocab_size"])
    return {
        name: (rows, *shape[1:]) if name in {"model.embed_tokens.weight", "lm_head.weight"} else shape
        for name, shape in expected_shapes(skeleton).items()
    }


def _tokenize(cfg: RunConfig, split: Split, tokenizer: Any, vocab_size: int) -> tuple[Tokens, Audit]:
    train = cfg.train_config
    return tokenize(
        train.dataset,
        cfg.dataset_config,
        split,
        tokenizer=tokenizer,
        context_length=train.context_length,
        vocab_size=vocab_size,
        on_bad_rows=train.on_bad_rows,
    )


def _collator(cfg: RunConfig, tokenizer: Any) -> custom.Collator | None:
    if cfg.train_config.dataset != "custom_dataset":
        return None
    return custom.collator(cfg.custom_dataset, tokenizer)


def _inputs(cfg: RunConfig, model: _Model, tokenizer: Any, tokens: dict[str, Tokens], collator: Any) -> Inputs:
    validation = tokens.get("validation")
    return Inputs(
        model_config=model.config,
        config_json=model.config_json,
        weights=model.weights,
        tokenizer=tokenizer,
        train=tokens["train"],
        validation=validation,
        collator=collator,
        lora=model.lora,
        adapter=model.adapter,
        pad_id=_pad_id(tokenizer, model.config.vocab_size),
        fingerprint={
            **_settings(cfg),
            "train data": tokens["train"].fingerprint,
            "validation data": None if validation is None else validation.fingerprint,
            "weights": "random" if model.weights is None else model.weights.fingerprint,
        },
    )


NOT_SETTINGS = {
    "output_dir",
    "overwrite_output_dir",
    "nproc_per_node",
    "num_workers_dataloader",
    "enable_fsdp",
    "low_cpu_fsdp",
    "one_gpu",
    "dist_checkpoint_root_folder",
    "dist_checkpoint_folder",
    "grace_seconds",
}
"""Flags that change where and how a run happens, and not what it computes."""


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What makes a run this run, by flag: values as JSON keeps them, of the sections that count."""
    return {
        f"--{field.section}.{field.name}": list(field.value) if isinstance(field.value, tuple) else field.value
        for field in fields_of(cfg)
        if cfg.active(field.section) and field.name not in NOT_SETTINGS
    }


def _pad_id(tokenizer: Any | None, vocab_size: int) -> int:
    """Any id of the embedding would do: padding has no label, and no other token attends to it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(pad) if pad is not None and 0 <= pad < vocab_size else 0


def _output_problems(root: Path) -> list[str]:
    """Whether the results can be written."""
    there = root
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return [f"--output_dir {root}: {there} is a file; expected a folder"]
    if not os.access(there, os.W_OK):
        return [f"--output_dir {root}: {there} cannot be written to; choose another folder or change its rights"]
    return []


def _leave(found: Inputs) -> Path:
    """The tokens in a temporary folder, for this machine's other ranks."""
    folder = Path(tempfile.mkdtemp(prefix="packtrain-"))
    found.train.save(folder / "train")
    if found.validation is not None:
        found.validation.save(folder / "validation")
    return folder


def _follow(cfg: RunConfig, folder: Path) -> Inputs:
    """What the leader found right, opened again: small files are read twice, tokens are mapped."""
    model, tokenizer = _Model.read(cfg), read_tokenizer(cfg)
    tokens = {split: Tokens.open(folder / split) for split in ("train", "validation") if (folder / split).exists()}
    model = replace(model, config=_grown(cfg, model, tokenizer, _Problems()))
    return _inputs(cfg, model, tokenizer, tokens, _collator(cfg, tokenizer))


def _forget(folder: Path, place: Place) -> None:
    """Delete the temporary tokens once every rank of the machine has them mapped: the maps stay."""
    place.tell(f"mapped/{place.rank}", True)
    if place.leads_machine:
        for rank in range(place.rank, place.rank + place.local_world_size):
            place.wait_for(f"mapped/{rank}")
        shutil.rmtree(folder)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
