"""A folder or a hub id -> a folder: the cache first, then one download. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE count.

Only configuration, tokenizer and safetensors are ever fetched: no code, no pickles.
"""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
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
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"{flag} {name}: is a file; expected a folder (config.json, tokenizer, safetensors) or a hub id"
        )
    if not _looks_like_hub_id(name):
        raise UserError(
            f"{flag} {name}: no such folder; expected a Hugging Face folder or a hub id such as meta-llama/Llama-3.1-8B"
        )
    return _from_hub(name, flag)


def _looks_like_hub_id(name: str) -> bool:
    words = name.split("/")
    return len(words) == 2 and all(words) and not name.startswith((".", "~", "/"))


def _from_hub(name: str, flag: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    fetch = f"fetch it where there is a network with `hf download {name}`, or give a local folder"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise UserError(f"{flag} {name}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or {fetch}")
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
