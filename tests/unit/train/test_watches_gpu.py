"""The FLOP counter and the profiler on a CUDA device: fused attention's count, MFU, and the memory snapshot."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import packtrain
import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    result: dict[str, Any] = packtrain.finetune(
        random_init=str(tiny.model(folder / "model", with_tokenizer=False, **SHAPE) / "config.json"),
        dataset="synthetic_dataset",
        synthetic_dataset={"rows": 64, "length": 1000},
        context_length=4096,
        batch_size_training=1,
        run_validation=False,
        save_model=False,
        output_dir=str(folder / "out"),
        **settings,
    )
    return result


@pytest.mark.parametrize("attention", ["auto", "sdpa", "flex", "eager"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_count_is_the_models_flops(tmp_path: Path, method: str, attention: str) -> None:
    peft = {"use_peft": True, "lora_dropout": 0.0, "target_modules": "[q_proj,v_proj,down_proj]"}
    settings = peft if method == "lora" else {}
    result = run(tmp_path, flop_counter=True, max_train_step=6, attention=attention, **settings)
    counted, needed = result["counted_flops"] - result["recomputed_flops"], result["model_flops"]
    if attention == "eager":
        assert counted > needed
    else:
        assert counted == pytest.approx(needed, rel=0.02)
    assert 0 < result["mfu"] < 1


def test_profile(tmp_path: Path) -> None:
    result = run(tmp_path, use_profiler=True, max_train_step=7)
    folder = Path(result["profiler_dir"])
    (trace,) = folder.glob("rank-0.*.pt.trace.json.gz")
    (memory,) = folder.glob("rank-0.*.memory.pickle")
    assert trace.stat().st_size > 10_000
    snapshot = pickle.loads(memory.read_bytes())
    assert snapshot["segments"]
    assert any(snapshot["device_traces"])
