"""Whole runs on a base in 4 and 8 bits, on one and two gloo ranks, beside the same run on what its numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from runs import column, lines, mean, rows, train
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM as TheirLlama

import tiny
from packtrain import building, log, preflight
from packtrain.configs.parse import build, parse
from packtrain.data.collate import make_batch
from packtrain.distributed.place import Place, open_place
from packtrain.errors import UserError
from packtrain.kernels.quantise import Quantisation
from packtrain.precision import quantisation

STEPS = 5
NF4 = {"quantization": "4bit", "quant_type": "nf4", "use_double_quant": True}
FORMS = {"nf4": (NF4, Quantisation("nf4", True)), "int8": ({"quantization": True}, Quantisation("int8"))}
LORA = {"use_peft": True, "r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA | {"gradient_accumulation_steps": 2, "activation_checkpointing": "full"},
    "lora, unsharded": LORA | {"sharding_strategy": "NO_SHARD", "batching_strategy": "packing", "context_length": 96},
    "llama_adapter": {"use_peft": True, "peft_method": "llama_adapter", "adapter_len": 4, "adapter_layers": 2},
    "prefix": {"use_peft": True, "peft_method": "prefix", "num_virtual_tokens": 4},
}
CASES = [("lora", "nf4"), ("lora", "int8"), ("lora, unsharded", "nf4"), ("llama_adapter", "int8"), ("prefix", "nf4")]


def flags_of(root: Path, base: str, out: str, world: int, **flags: Any) -> dict[str, Any]:
    data = str(root / "rows.csv")
    return {
        "model_name": str(root / base),
        "dataset": "grammar_dataset",
        "grammar_dataset": {"train_split": data, "test_split": data},
        "batching_strategy": "padding",
        "batch_size_training": 4 // flags.get("gradient_accumulation_steps", 1) // world,
        "val_batch_size": 4,
        "lr": 5e-3,
        "max_train_step": STEPS,
        "output_dir": str(root / out),
        **flags,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and what it is once quantised by rows, each layer of Hugging Face's by itself."""
    made = tmp_path_factory.mktemp("quantised")
    tiny.model(made / "base")
    tiny.grammar(made / "rows.csv", 12)
    for name, (_, form) in FORMS.items():
        tiny.model(made / f"base-{name}")
        file = made / f"base-{name}/model.safetensors"
        weights = load_file(file)
        weights |= {name: dequantised(form, value) for name, value in weights.items() if "_proj" in name}
        save_file(weights, file, {"format": "pt"})
    return made


def dequantised(form: Quantisation, values: Tensor) -> Tensor:
    numbers, scales = form.widths(values.shape[1])
    held = torch.empty(len(values), numbers, dtype=form.storage), torch.empty(len(values), scales)
    form.pack(values, *held)
    return form.unpack(*held, values.shape[1], torch.float32)


def whole_runs(place: Place, root: Path) -> None:
    world = place.world_size
    for method, form in CASES:
        out = f"out/{method}/{form}/{world}"
        train(place, out, flags_of(root, "base", out, world, **METHODS[method], **FORMS[form][0]))
        if world == 1:
            out = f"out/{method}/plain {form}"
            train(place, out, flags_of(root, f"base-{form}", out, world, **METHODS[method]))


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """The folder of all runs: METHOD/FORM/RANKS."""
    for world in (1, 2):
        run_ranks(whole_runs, world, root, timeout=120)
    return root / "out"


@pytest.mark.parametrize(("method", "form"), CASES)
def test_a_run_is_the_dequantised_models_on_one_rank_and_on_two(method: str, form: str, finished: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        expected = column(lines(finished / method / f"plain {form}"), key)
        for world in ("1", "2"):
            found = column(lines(finished / method / form / world), key)
            assert found == pytest.approx(expected, rel=4e-5 if key == "grad_norm" else 1e-5)
    assert expected


def test_the_comparison_tells_one_form_from_another(finished: Path) -> None:
    nf4, int8 = (column(lines(finished / "lora" / form / "1"), "loss") for form in FORMS)
    assert len(nf4) == STEPS
    assert nf4 != pytest.approx(int8, rel=1e-4)
    assert nf4[-1] < nf4[0]


@pytest.mark.parametrize(("method", "form"), [CASES[0], CASES[1], CASES[3]])
def test_peft_has_the_same_logits_on_the_dequantised_model(method: str, form: str, root: Path, finished: Path) -> None:
    texts = list(rows(root / "rows.csv"))
    for world in ("1", "2"):
        saved = finished / method / form / world
        theirs = PeftModel.from_pretrained(TheirLlama.from_pretrained(root / f"base-{form}"), saved).eval()
        with torch.no_grad():
            evaluated = column(lines(saved), "eval_loss")[-1]
            assert mean(theirs, texts).item() == pytest.approx(evaluated, rel=1e-5)
            for ours, (ids, _) in zip(logits(root, saved, FORMS[form][0]), texts, strict=True):
                torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def logits(root: Path, adapter: Path, bits: dict[str, Any]) -> list[Tensor]:
    """Of every row, on the plain base quantised anew, with a saved adapter."""
    with open_place("cpu") as place:
        cfg = build(**flags_of(root, "base", "none", 1, use_peft=True, from_peft_checkpoint=str(adapter), **bits))
        inputs = preflight.inputs(cfg, place)
        model = building.build(cfg, inputs, place).eval()
        data = inputs.validation
        assert data is not None
        batches = [make_batch(data, [np.array([row])], seed=0, step=0, pad_id=0) for row in range(data.rows)]
        return [model(batch, logits=True) for batch in batches]


def test_what_the_log_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_place("cpu") as place:
        cfg = build(**flags_of(root, "base", "none", 1, **LORA, **NF4))
        inputs = preflight.inputs(cfg, place)
        log.quiet(False)
        building.build(cfg, inputs, place)
    assert (
        "base in 4 bits: nf4, blocks of 64, scales in 8 bits (double quantisation), products in fp32, dequantised by "
        "PyTorch's operations; 3.86e-05 GiB on this rank, 0.000229 without quantisation" in capsys.readouterr().err
    )


def form_of(*words: str, device: str = "cpu") -> tuple[Quantisation, torch.dtype, str]:
    cfg = parse(["--model_name", "M", "--use_peft", *words])
    found = quantisation(cfg, torch.device(device))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("line", "device", "dtype"),
    [
        ("--quantization 4bit", "cpu", torch.float32),
        ("--quantization 4bit --compute_dtype bfloat16", "cpu", torch.bfloat16),
        ("--quantization 8bit", "meta", torch.bfloat16),
        ("--quantization 8bit --use_fp16", "meta", torch.float16),
        ("--quantization 8bit --use_fp16 --compute_dtype bf16", "meta", torch.bfloat16),
        ("--quantization 4bit --mixed_precision False", "meta", torch.bfloat16),
        ("--quantization 4bit --compute_dtype torch.float32", "meta", torch.float32),
    ],
)
def test_the_dtype_of_products(line: str, device: str, dtype: torch.dtype) -> None:
    """`meta` is no CPU, as a GPU is not."""
    assert form_of(*line.split(), device=device)[1] == dtype


def test_settings_reach_the_format() -> None:
    assert form_of("--quantization", "4bit")[0] == Quantisation("fp4")
    assert form_of("--quantization", "4bit", "--quant_type", "nf4", "--use_double_quant")[0] == Quantisation(
        "nf4", True
    )
    assert form_of("--quantization", "--quant_storage", "fp32")[0] == Quantisation("int8", storage=torch.float32)
    assert form_of("--quantization", "8bit")[2] == "base in 8 bits: int8, a scale each row, products in fp32"


def test_full_fine_tuning_is_refused() -> None:
    with pytest.raises(UserError, match=r"--quantization: trains an adapter .found '4bit'.; add --use_peft"):
        parse(["--model_name", "M", "--quantization", "4bit"])
