"""--fsdp_cpu_offload without sharding: how many layers go to the host, what the log says, and whole runs.

A CPU plays the GPU: layers stream between two places of its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ranks import run_ranks
from runs import column, lines, train
from test_resume import cut_off
from torch import nn

import tiny
from packtrain import recompute
from packtrain.configs.parse import build
from packtrain.configs.run import RunConfig
from packtrain.distributed.place import Place
from packtrain.errors import UserError
from packtrain.kernels.rows import Form
from packtrain.model import fast, quantised, streaming
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM
from packtrain.peft import lora
from packtrain.peft.settings import LoraSettings
from packtrain.train.shortage import Shortage
from packtrain.train.words import sharding_line

GIB = 2**30
EIGHT_B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
BF16 = Form(torch.bfloat16, float8=False)
GPU = cast(Place, SimpleNamespace(device=torch.device("cuda", 0), world_size=1, local_world_size=1, rank=0))
LORA = LoraSettings(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)


def settings(**changes: Any) -> RunConfig:
    return build(random_init="x", dataset="synthetic_dataset", fsdp_cpu_offload=True, **changes)


def eight_b(adapters: bool = True) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(EIGHT_B), dtype=torch.bfloat16, device=torch.device("meta"))
    if adapters:
        lora.install(model, LORA)
    return model


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "free_bytes", lambda place: 79 * GIB)
    monkeypatch.setattr(recompute, "host_bytes", lambda place: 64 * GIB)


def choice(limit: float, asked: str, form: Form = BF16) -> tuple[str, int, str]:
    """(what is computed again, layers on the host, the line) for two rows of 4096 tokens."""
    cfg, model = settings(use_peft=True, gpu_memory_limit=limit, activation_checkpointing=asked), eight_b()
    how, _ = recompute.choose(cfg, model, GPU, tokens=8192, form=form)
    numbers, line = recompute.streamed(cfg, model, GPU, tokens=8192, form=form, recompute=how)
    assert line is not None
    # what is left is enough, and not for one more
    used = recompute.Held.of(cfg, model, GPU, form)
    needed = used.weights + used.training + recompute._needed(model, 8192, how, form, False)
    one = streaming.layer_bytes(cast(Any, model).model.layers[0], form)
    stay = 32 - len(numbers)
    room = limit * GIB - recompute.WORKSPACE - needed
    assert stay * one <= room or stay in (0, 32)
    assert not numbers or (stay + 1) * one > room
    return how, len(numbers), line


def test_as_many_layers_stay_as_fit() -> None:
    how, away, line = choice(18, "auto")
    assert (how, 18 <= away <= 24) == ("selective", True)
    assert line.startswith(f"base: {32 - away} of 32 layers stay on the GPU, {away} (")
    assert line.endswith("are copied from host memory ahead of use")
    counts = [choice(limit, "selective")[1] for limit in (15, 18, 20, 24, 28)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert choice(18, "selective", Form(torch.bfloat16, float8=True))[1] < away
    assert choice(60, "auto") == ("none", 0, "base: all 32 layers stay on the GPU, where there is room for them")
    assert choice(10, "selective")[1:] == (
        32,
        "base: 0 of 32 layers stay on the GPU, 32 (13.2 GiB) are copied from host memory ahead of use; the rest may "
        "not fit",
    )


def test_without_the_flag_the_limit_still_counts() -> None:
    cfg, model = settings(use_peft=True, gpu_memory_limit=30), eight_b()
    held = build(random_init="x", dataset="synthetic_dataset", use_peft=True, gpu_memory_limit=30)
    assert recompute.choose(held, model, GPU, tokens=8192, form=BF16)[0] == "selective"
    assert recompute.streamed(held, model, GPU, tokens=8192, form=BF16, recompute="selective") == ([], None)
    free = build(random_init="x", dataset="synthetic_dataset", use_peft=True)
    assert recompute.choose(free, model, GPU, tokens=8192, form=BF16)[0] == "none"
    assert recompute.Held.of(cfg, model, GPU, BF16).weights < recompute.Held.of(held, model, GPU, BF16).weights / 3


def test_what_cannot_be_streamed_stays_and_the_log_says_so() -> None:
    def line(model: LlamaForCausalLM, form: Form | None) -> str | None:
        numbers, said = recompute.streamed(settings(), model, GPU, tokens=8192, form=form, recompute="full")
        assert numbers == []
        return said

    begins, ends = "base: all of it stays on the GPU: --fsdp_cpu_offload does nothing", "unless they are sharded"
    assert line(eight_b(adapters=False), BF16) == f"{begins} for weights that train or are quantised {ends}"
    assert line(eight_b(), None) == f"{begins} in plain layers {ends}"
    packed = eight_b()
    quantised.quantise(packed, quantised.Quantisation("nf4"), torch.bfloat16)
    assert line(packed, BF16) == f"{begins} for weights that train or are quantised {ends}"


def test_a_host_without_room_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "host_bytes", lambda place: 8 * GIB)
    with pytest.raises(UserError, match=r"takes 1\d\.\d GiB of the host's memory for each worker; it has 7.6 GiB left"):
        choice(18, "selective")


def test_the_line_on_sharding() -> None:
    cfg = settings()
    here = SimpleNamespace(device=torch.device("cpu"), world_size=1, local_world_size=1)
    assert sharding_line(cfg, cast(Place, here)) == (
        "one rank on cpu: the model is not sharded, and in host memory without fsdp_cpu_offload too"
    )
    assert sharding_line(cfg, GPU) == "one rank on cuda:0: the model is not sharded"
    here.world_size = here.local_world_size = 2
    assert "FULL_SHARD, shards in host memory" in sharding_line(cfg, cast(Place, here))


def test_out_of_memory_names_it() -> None:
    def ways(model: LlamaForCausalLM, place: Place, **changes: Any) -> list[str]:
        cfg = build(random_init="x", dataset="synthetic_dataset", use_peft=True, quantization="fp8", **changes)
        return Shortage(cfg, model, cast(Any, None), place)._less_held()

    advice, model = "--fsdp_cpu_offload, which keeps what does not fit of the frozen base on the host", eight_b()
    fast.install(model, BF16, "selective")
    cpu = cast(Place, SimpleNamespace(device=torch.device("cpu"), world_size=1))
    assert ways(model, GPU) == [advice]
    assert ways(model, GPU, gpu_memory_limit=18, fsdp_cpu_offload=True) == ["a higher --gpu_memory_limit"]
    assert advice not in ways(model, cpu) + ways(eight_b(), GPU)


def flags_of(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / "base"),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 2,
        "gradient_accumulation_steps": 2,
        "val_batch_size": 4,
        "num_epochs": 1,
        "lr": 5e-3,
        "use_peft": True,
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "quantization": "fp8",
        "activation_checkpointing": "selective",
        "output_dir": str(root / out),
        **changes,
    }


def runs(place: Place, root: Path) -> list[list[int]]:
    """Which layers each run had on the host."""
    install, hosted = streaming.install, list[list[int]]()

    def noted(model: nn.Module, numbers: Sequence[int], device: torch.device) -> None:
        hosted.append(list(numbers))
        install(model, numbers, device)

    streaming.install = noted
    recompute.free_bytes = lambda place: 1.0
    recompute._streams = lambda cfg, place: cfg.fsdp_config.fsdp_cpu_offload
    train(place, "stays", flags_of(root, "stays"))
    train(place, "streams", flags_of(root, "streams", fsdp_cpu_offload=True))
    broken = flags_of(root, "broken", fsdp_cpu_offload=True)
    cut_off(place, "broken", broken, 2)
    train(place, "again", broken)
    return hosted


def test_a_run_is_the_same_stopped_and_resumed_too(tmp_path: Path) -> None:
    """Losses, norms and the adapter, of a float8 base: the fused form that CPUs have."""
    tiny.model(tmp_path / "base", num_hidden_layers=6)
    tiny.grammar(tmp_path / "rows.csv", 12)
    assert run_ranks(runs, 1, tmp_path) == [[list(range(6))] * 3]
    for out in ("streams", "broken"):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert column(lines(tmp_path / out), key) == column(lines(tmp_path / "stays"), key)
        ours, theirs = (tmp_path / each / "adapter_model.safetensors" for each in (out, "stays"))
        assert ours.read_bytes() == theirs.read_bytes()
