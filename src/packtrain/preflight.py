"""Before any GPU work: asks every room for its problems and says them all at once.

inputs      every rank's way to what the run reads: each machine's leader examines, the others follow
examine     reads and checks model, tokenizer, adapters, data and folder; raises one UserError with all problems
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from packtrain import adapters, log, optim, peft
from packtrain.building import Inputs
from packtrain.checkpoint.folder import HfFolder
from packtrain.checkpoint.hf import expected_shapes
from packtrain.checkpoint.hub import resolve
from packtrain.checkpoint.places import checkpoint_root, output_root
from packtrain.checkpoint.store import folder_problems, read_json, record_failure, unwritable
from packtrain.checkpoint.tokenizer import read_tokenizer
from packtrain.configs.run import RunConfig, fields_of, flag
from packtrain.data import custom
from packtrain.data.audit import Audit
from packtrain.data.collate import collated
from packtrain.data.sources import Split
from packtrain.data.tokens import Tokens, check_rows, tokenize
from packtrain.distributed import parallelize, parent
from packtrain.distributed.place import Place
from packtrain.errors import UserError, raise_if
from packtrain.kernels import attention_choice
from packtrain.model.config import LlamaConfig
from packtrain.model.llama import LlamaForCausalLM
from packtrain.precision import weight_dtype
from packtrain.train import wandb_run

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
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None


@dataclass(frozen=True, slots=True)
class Examined:
    """What the leader found right, and what it has to say about it."""

    inputs: Inputs
    audits: dict[str, Audit]

    def lines(self) -> list[str]:
        """What the user should know about the data."""
        lines = [f"{split}: {line}" for split, audit in self.audits.items() for line in audit.lines()]
        known = self.inputs.model_config.max_position_embeddings
        longest = max((audit.longest for audit in self.audits.values()), default=0)
        if longest > known:
            lines.append(
                f"warning: the longest row has {longest:,} tokens, and the model was made for {known:,} positions; "
                "later ones are new to it"
            )
        return lines


def inputs(cfg: RunConfig, place: Place) -> Inputs:
    """The run's inputs on every rank. The leader of each machine reads and checks; the others open its tokens.

    Ranks wait on the store, not in a collective: tokenising may take longer than a collective's time-out.
    """
    mine: list[Examined] = []

    def lead() -> str:
        try:
            mine.append(examine(cfg, place))
        except UserError as error:
            record_failure(output_root(cfg), str(error))
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


def examine(cfg: RunConfig, place: Place | None = None, *, writes: bool = True) -> Examined:
    """Read and check all of it, for the ranks of `place` if known. Raises UserError with every problem found.

    Once something is wrong, rows are read where they are in a file, and not encoded: a message must not wait for more.
    `writes`: whether --output_dir is asked about too.
    """
    train, problems = cfg.train_config, _Problems()
    problems.found += _folder_problems(cfg) if writes else []
    problems.found += [] if place is None else _sharding_problems(cfg, place)
    problems.found += optim.problems(cfg.fsdp_config.optimizer)
    problems.found += wandb_run.problems() if cfg.train_config.use_wandb else []
    model = problems.ask(lambda: _Model.read(cfg))
    tokenizer = problems.ask(lambda: _tokenizer(cfg, model))
    if model is not None:
        model = replace(model, config=_grown(cfg, model, tokenizer, problems))
        problems.found += _model_problems(cfg, model)
        problems.found += _attention_problems(cfg, model, place)
    splits: tuple[Split, ...] = ("train", "validation") if train.run_validation else ("train",)
    if model is None or problems.found:
        for split in splits:
            problems.ask(partial(check_rows, train.dataset, cfg.dataset_config, split, on_bad_rows=train.on_bad_rows))
        if tokenizer is not None:
            problems.ask(lambda: _collator(cfg, tokenizer, None))
        raise UserError(problems.found)
    tokens: dict[str, Tokens] = {}
    audits: dict[str, Audit] = {}
    for split in splits:
        pair = problems.ask(partial(_tokenize, cfg, split, tokenizer, model.config.vocab_size))
        if pair is not None:
            tokens[split], audits[split] = pair
    collator = problems.ask(lambda: _collator(cfg, tokenizer, tokens.get("train")))
    raise_if(problems.found)
    skipped = tuple(row for audit in audits.values() for row in audit.skipped)
    return Examined(replace(_inputs(cfg, model, tokenizer, tokens, collator), skipped=skipped), audits)


def _tokenizer(cfg: RunConfig, model: _Model | None) -> Any | None:
    """The run's tokenizer; None where none is needed (random weights and synthetic rows)."""
    train = cfg.train_config
    flag = "--tokenizer_name" if train.tokenizer_name else "--model_name"
    name = train.tokenizer_name or train.model_name
    right = model is not None or train.tokenizer_name is not None
    found = None if name is None else read_tokenizer(name, flag, config_is_right=right)
    if found is None and train.dataset != "synthetic_dataset":
        raise UserError(
            f"{flag} {name}: no tokenizer there (tokenizer.json or tokenizer.model); "
            "give a folder that has one with --tokenizer_name"
        )
    return found


@dataclass(frozen=True, slots=True)
class _Model:
    """A model's description and, unless it is random, its weights."""

    config: LlamaConfig
    config_json: dict[str, Any]
    weights: HfFolder | None
    adapter: peft.Settings | None
    adapter_folder: Path | None

    @classmethod
    def read(cls, cfg: RunConfig) -> _Model:
        train = cfg.train_config
        problems = _Problems()
        flag = "--random_init" if train.random_init else "--model_name"
        folder = resolve(str(train.random_init or train.model_name), flag) if not _is_json(train.random_init) else None
        file = Path(str(train.random_init)) if folder is None else folder / "config.json"
        raw = read_json(file, remedy="mend it, or copy or download it again")
        if raw is None:
            raise UserError(
                f"{flag} {file.parent}: no config.json there; expected a Hugging Face folder of a Llama model"
            )
        config = problems.ask(lambda: LlamaConfig.from_dict(raw, str(file)))
        weights = None if train.random_init or folder is None else problems.ask(lambda: HfFolder(folder))
        settings, adapter_folder = problems.ask(lambda: adapters.chosen(cfg, config)) or (None, None)
        raise_if(problems.found)
        assert config is not None
        return cls(config, raw, weights, settings, adapter_folder)


def _is_json(random_init: str | None) -> bool:
    return random_init is not None and Path(random_init).is_file()


def _grown(cfg: RunConfig, model: _Model, tokenizer: Any | None, problems: _Problems) -> LlamaConfig:
    """The config with as many embedding rows as the tokenizer has tokens, as in the original."""
    have = model.config.vocab_size
    if tokenizer is None or len(tokenizer) <= have:
        return model.config
    want = len(tokenizer)
    saved = getattr(model.adapter, "modules_to_save", ())
    if model.adapter is not None and not {"embed_tokens", "lm_head"} <= set(saved):
        problems.found.append(
            f"{tokenizer.name_or_path}: the tokenizer has {want} tokens, and the model's embedding {have} rows; with "
            "an adapter the new rows are trained and kept only with --peft_method lora and --modules_to_save "
            "embed_tokens,lm_head: add these flags, or use the model's own tokenizer"
        )
    return replace(model.config, vocab_size=want)


def _model_problems(cfg: RunConfig, model: _Model) -> list[str]:
    """Weights against the config, adapters' targets against the layers, a saved adapter against both."""
    skeleton = LlamaForCausalLM(model.config, dtype=torch.float32, device=torch.device("meta"))
    found: list[str] = []
    if model.weights is not None:
        found += model.weights.problems(_expected(skeleton, model))
        found += [] if found or parent.attempt() else model.weights.damaged()  # a later try need not ask again
    if model.adapter is not None:
        found += adapters.problems(cfg, skeleton, model.adapter, model.adapter_folder)
    layers, frozen = model.config.num_hidden_layers, cfg.train_config.num_freeze_layers
    if cfg.train_config.freeze_layers and model.adapter is None and frozen > layers:
        place = cfg.place("train_config.num_freeze_layers")
        found.append(f"{place}: expected at most the model's {layers} decoder layers, found {frozen}")
    return found


def _attention_problems(cfg: RunConfig, model: _Model, place: Place | None) -> list[str]:
    """Why the forced kernel cannot run on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if place is None else place.device
    dtype = weight_dtype(cfg, device)
    wrong = attention_choice.problems(cfg.train_config.attention, device, dtype, model.config.head_dim)
    return [f"{cfg.place('train_config.attention')} {problem}" for problem in wrong]


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


def _collator(cfg: RunConfig, tokenizer: Any | None, rows: Tokens | None) -> custom.Collator | None:
    """The collator of the user's file, if it has one, tried on the first of `rows`."""
    if cfg.train_config.dataset != "custom_dataset":
        return None
    collator = custom.collator(cfg.custom_dataset, tokenizer)
    typed = "train_config.batching_strategy"
    if collator is not None and cfg.typed(typed) and cfg.train_config.batching_strategy == "packing":
        raise UserError(
            f"{cfg.place(typed)} packing: {cfg.custom_dataset.file} has a get_data_collator, which makes padded rows; "
            "leave the flag out or give padding"
        )
    if collator is not None and rows is not None:
        collated(rows, np.arange(min(rows.rows, 2)), collator)
    return collator


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
        adapter=model.adapter,
        adapter_folder=model.adapter_folder,
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
    "max_restarts",
    "hang_timeout",
    "save_steps",
    "save_minutes",
    "keep_checkpoints",
    "allow_change",
    "save_optimizer",
    "checkpoint_type",
    "on_nonfinite",
    "on_spike",
    "max_skipped_steps",
    "rollback_steps",
    "on_oom",
    "verify_steps",
    "save_metrics",
    "use_wandb",
    "flop_counter",
    "flop_counter_start",
    "use_profiler",
    "profiler_dir",
}
"""Flags that change where and how a run happens, and not what it computes."""


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What makes a run this run, by flag: values as JSON keeps them, of the sections that count."""
    return {
        flag(f"{field.section}.{field.name}"): list(field.value) if isinstance(field.value, tuple) else field.value
        for field in fields_of(cfg)
        if cfg.active(field.section) and field.section != "wandb_config" and field.name not in NOT_SETTINGS
    }


def _pad_id(tokenizer: Any | None, vocab_size: int) -> int:
    """Any id of the embedding would do: padding has no label, and no other token attends to it."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(pad) if pad is not None and 0 <= pad < vocab_size else 0


def _folder_problems(cfg: RunConfig) -> list[str]:
    """Whether results and checkpoints can be written."""
    found, root = folder_problems(output_root(cfg)), cfg.train_config.dist_checkpoint_root_folder
    return (
        found
        if root is None
        else [*found, *unwritable(checkpoint_root(cfg), Path(root), "--dist_checkpoint_root_folder")]
    )


def _sharding_problems(cfg: RunConfig, place: Place) -> list[str]:
    """Whether the groups of --hsdp make up the ranks there are."""
    fsdp = cfg.fsdp_config
    ranks = (place.world_size, place.local_world_size)
    wrong = parallelize.problems(*ranks, fsdp.sharding_strategy, fsdp.sharding_group_size, fsdp.replica_group_size)
    return [f"--hsdp: {problem}" for problem in wrong]


def _leave(found: Inputs) -> Path:
    """The tokens in a temporary folder, for this machine's other ranks."""
    folder = Path(tempfile.mkdtemp(prefix="packtrain-"))
    found.train.save(folder / "train")
    if found.validation is not None:
        found.validation.save(folder / "validation")
    return folder


def _follow(cfg: RunConfig, folder: Path) -> Inputs:
    """What the leader found right, opened again: small files are read twice, tokens are mapped."""
    model = _Model.read(cfg)
    tokenizer = _tokenizer(cfg, model)
    tokens = {split: Tokens.open(folder / split) for split in ("train", "validation") if (folder / split).exists()}
    model = replace(model, config=_grown(cfg, model, tokenizer, _Problems()))
    return _inputs(cfg, model, tokenizer, tokens, _collator(cfg, tokenizer, None))


def _forget(folder: Path, place: Place) -> None:
    """Delete the temporary tokens once every rank of the machine has them mapped: the maps stay."""
    place.tell(f"mapped/{place.rank}", True)
    if place.leads_machine:
        for rank in range(place.rank, place.rank + place.local_world_size):
            place.wait_for(f"mapped/{rank}")
        shutil.rmtree(folder)
