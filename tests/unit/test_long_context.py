"""Where long rows fit: what auto takes, what offload asks of the host, by the estimate and an 8B model's shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from packtrain import preflight, recompute
from packtrain.configs.parse import build
from packtrain.configs.run import RunConfig
from packtrain.data.audit import Audit
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.kernels.rows import Form
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.peft import lora
from packtrain.peft.lora import LoraSettings

GIB = 2**30
FORM = Form(torch.bfloat16, float8=True)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    made = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=torch.bfloat16, device=torch.device("meta"))
    lora.install(made, LoraSettings(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0))
    return made


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Place:
    """One of 80 GB, in a host of 128 GiB."""
    monkeypatch.setattr(recompute, "free_bytes", lambda place: 78.5 * GIB)
    monkeypatch.setattr(recompute, "host_bytes", lambda place: 120.0 * GIB)
    facts = {"device": torch.device("cuda"), "world_size": 1, "local_world_size": 1, "rank": 0}
    return cast(Place, SimpleNamespace(**facts))


def settings(how: str) -> RunConfig:
    flags = {"random_init": "config.json", "dataset": "synthetic_dataset", "use_peft": True, "quantization": "fp8"}
    return build(**flags, activation_checkpointing=how)


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [(8192, "none"), (20_000, "selective"), (131_072, "full"), (262_144, "offload"), (400_000, "offload")],
)
def test_auto_goes_to_the_host_last(tokens: int, chosen: str, model: LlamaForCausalLM, card: Place) -> None:
    found, line = recompute.choose(settings("auto"), model, card, tokens=tokens, form=FORM)
    assert found == chosen
    assert line is not None
    assert "may not fit" not in line
    assert (f"{tokens * 32 * 8192 / GIB:.3g} GiB of the host's memory" in line) == (chosen == "offload")


def test_a_small_host_is_not_asked(model: LlamaForCausalLM, card: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "host_bytes", lambda place: 100.0 * GIB)  # 97.7 are needed, of 95
    found, line = recompute.choose(settings("auto"), model, card, tokens=400_000, form=FORM)
    assert (found, "may not fit" in str(line)) == ("full", True)
    with pytest.raises(UserError, match=r"400,000 tokens are 97\.7 GiB for each worker, and the host has 95 GiB left"):
        recompute.choose(settings("offload"), model, card, tokens=400_000, form=FORM)
    found, line = recompute.choose(settings("offload"), model, card, tokens=300_000, form=FORM)
    assert (found, "73.2 GiB of layers' inputs wait in the host's memory" in str(line)) == ("offload", True)


def test_a_cpu_has_nowhere_to_offload_to(model: LlamaForCausalLM) -> None:
    cpu = cast(Place, SimpleNamespace(device=torch.device("cpu"), world_size=1, local_world_size=1, rank=0))
    found, line = recompute.choose(settings("offload"), model, cpu, tokens=100, form=None)
    assert (found, "on a CPU there is no other memory" in str(line)) == ("full", True)


@pytest.mark.parametrize("longest", [131_072, 131_073])
def test_rows_beyond_what_the_model_knows_are_said(longest: int, model: LlamaForCausalLM) -> None:
    audit = Audit("rows", 1, longest, longest - 1, 0, 0, longest, "rows row 1", ())
    inputs = cast(Any, SimpleNamespace(model_config=model.config))
    lines = preflight.Examined(inputs, {"train": audit}).lines()
    said = f"the longest row has {longest:,} tokens, and the model was made for 131,072 positions"
    assert any(said in line for line in lines) == (longest > 131_072)
