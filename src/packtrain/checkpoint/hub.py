"""A folder or a hub id -> a folder: the cache first, then one download. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE count.

Only configuration, tokenizer and safetensors are ever fetched: no code, no pickles.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from packtrain.errors import UserError

WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
"""Files of a model or adapter repository that packtrain reads."""


def resolve(name: str, flag: str) -> Path:
    """The folder that `name` means. Called by one process a machine; the others find it in the cache.

    Raises UserError, naming `flag` and the command that helps, when there is no such folder or repository, or it
    cannot be reached.
    """
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike pathlib's, no error for a name that is too long
        return path
    if os.path.isfile(path):
        raise UserError(f"{flag} {name}: is a file; expected {_expected(flag)}")
    if not _looks_like_hub_id(name):
        raise UserError(f"{flag} {name}: no such folder{_nearest(path)}; expected {_expected(flag)}")
    return _from_hub(name, flag)


def _expected(flag: str) -> str:
    holds = {
        "--random_init": "config.json",
        "--tokenizer_name": "tokenizer.json",
        "--from_peft_checkpoint": "adapter_config.json and adapter_model.safetensors",
        "--peft_model": "adapter_config.json and adapter_model.safetensors",
    }
    return f"a folder with {holds.get(flag, 'config.json, tokenizer and safetensors')}, or a hub id (OWNER/NAME)"


def _nearest(path: Path) -> str:
    """A folder beside the missing one whose name is like its, as a question."""
    there = [beside.name for beside in path.parent.glob("*") if beside.is_dir()] if path.parent.is_dir() else []
    like = get_close_matches(path.name, there, n=1)
    return f" (did you mean {path.with_name(like[0])}?)" if like else ""


def _looks_like_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None


def _from_hub(name: str, flag: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UserError(f"{flag} {name}: no such folder, and no hub id; expected {_expected(flag)}") from None
    fetch = f"fetch it where there is a network with `hf download {name}`, or give a local folder"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise UserError(
            f"{flag} {name}: neither a folder here nor a hub id in the local cache, and HF_HUB_OFFLINE is set; "
            f"unset it, or {fetch}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except GatedRepoError:
        raise UserError(
            f"{flag} {name}: its owner asks you to accept a licence first: do so on the model's page, then "
            "`hf auth login` (or set HF_TOKEN) and run again"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{flag} {name}: neither a folder here nor a repository on the hub that you may see; check the spelling, "
            "and `hf auth login` if it is private"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"{flag} {name}: could not be downloaded ({type(error).__name__}); {fetch}") from None
