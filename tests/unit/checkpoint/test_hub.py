"""What a name means, folder or hub id, and what is said where it means nothing. No network: the hub is played."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from packtrain.checkpoint import hub
from packtrain.errors import UserError

ANSWER = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
Play = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """The cache and the network answer with these, a folder or an error each; returns the calls made."""

    def install(cache: Path | Exception, network: Path | Exception | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def download(name: str, **options: Any) -> str:
            calls.append({"name": name, **options})
            answer = cache if options.get("local_files_only") else network
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        monkeypatch.setattr(hub, "snapshot_download", download)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return calls

    return install


def refusal(name: str, flag: str = "--model_name") -> str:
    with pytest.raises(UserError) as caught:
        hub.resolve(name, flag)
    (problem,) = caught.value.problems
    return problem


def test_a_folder_goes_before_the_hub(tmp_path: Path, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = play(LocalEntryNotFoundError("none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub.resolve("org/model", "--model_name") == Path("org/model")
    assert calls == []


def test_the_cache_goes_before_the_network_and_no_code_or_pickle_is_fetched(tmp_path: Path, play: Play) -> None:
    assert len(play(tmp_path)) == 0
    assert hub.resolve("org/model", "--model_name") == tmp_path
    calls = play(LocalEntryNotFoundError("none"), tmp_path)
    assert hub.resolve("org/model", "--model_name") == tmp_path
    assert [call.get("local_files_only") for call in calls] == [True, None]
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in calls[1]["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("gated", response=ANSWER), "accept a licence"),
        (RepositoryNotFoundError("none", response=ANSWER), "neither a folder here nor a repository on the hub"),
        (HfHubHTTPError("broken", response=ANSWER), "could not be downloaded (HfHubHTTPError); fetch it where"),
        (OSError("no route"), "could not be downloaded (OSError); fetch it where"),
    ],
)
def test_the_hubs_refusals_say_what_helps(play: Play, error: Exception, said: str) -> None:
    play(LocalEntryNotFoundError("none"), error)
    problem = refusal("org/model")
    assert problem.startswith("--model_name org/model: ")
    assert said in problem


def test_offline_nothing_is_asked_of_the_network(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = play(LocalEntryNotFoundError("none"), AssertionError("asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set; unset it, or fetch it" in refusal("org/model")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--model_name", "config.json, tokenizer and safetensors"),
        ("--tokenizer_name", "tokenizer.json"),
        ("--from_peft_checkpoint", "adapter_config.json"),
    ],
)
def test_a_missing_folder_and_its_neighbour(tmp_path: Path, flag: str, expected: str) -> None:
    (tmp_path / "llama-8b").mkdir()
    problem = refusal(str(tmp_path / "lama-8b"), flag)
    assert f"no such folder (did you mean {tmp_path / 'llama-8b'}?); expected a folder with {expected}" in problem
    assert "did you mean" not in refusal(str(tmp_path / "something"), flag)
