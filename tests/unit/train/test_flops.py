"""FLOPs: torch's count of real steps against the formula, the formula against its written-out forms, and a run's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import packtrain
import tiny
from packtrain.batch import Batch
from packtrain.data.collate import make_batch
from packtrain.data.render import Encoder, grammar_prompt
from packtrain.data.tokens import Tokens
from packtrain.distributed.parallelize import materialise
from packtrain.kernels.attention import Kernel
from packtrain.kernels.rows import Form
from packtrain.model import fast
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, blocks, draw
from packtrain.peft import llama_adapter, lora, prefix
from packtrain.peft.lora import LoraSettings
from packtrain.peft.trainable import freeze
from packtrain.train.flops import PEAKS, Cost, Count, Work, peak

CPU, META = torch.device("cpu"), torch.device("meta")
FP32, FLOAT8 = Form(torch.float32, float8=False), Form(torch.float32, float8=True)
TINY: dict[str, Any] = tiny.SIZES | {"model_type": "llama"}
MIDDLE: dict[str, Any] = TINY | {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = TINY | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = np.array([70, 40, 18, 61, 128, 9])
METHODS: dict[str, Callable[[LlamaForCausalLM], None]] = {
    "full": lambda model: None,
    "full, first layer frozen": lambda model: freeze(blocks(model)[0]),
    "lora": lambda model: lora.install(model, LoraSettings(r=8, target_modules=("q_proj", "v_proj"))),
    "lora everywhere": lambda model: lora.install(model, LoraSettings(r=16, target_modules=EVERYWHERE)),
    "lora on the head": lambda model: lora.install(model, LoraSettings(r=4, target_modules=("o_proj", "lm_head"))),
    "prefix": lambda model: prefix.install(model, prefix.PrefixSettings(num_virtual_tokens=5)),
    "llama adapter": lambda model: llama_adapter.install(
        model, llama_adapter.LlamaAdapterSettings(adapter_len=5, adapter_layers=1)
    ),
}


def batch(kind: str) -> Batch:
    """Three packs with padding at the end of two, or four padded rows; a quarter of each row is a prompt."""
    ids = np.random.default_rng(0).integers(3, tiny.VOCABULARY, LENGTHS.sum(), dtype=np.int32)
    offsets, labels = np.concatenate([[0], np.cumsum(LENGTHS)]), ids.copy()
    for start, length in zip(offsets, LENGTHS, strict=False):
        labels[start : start + length // 4] = -100
    tokens = Tokens(ids, labels, offsets, np.arange(1, 7), "rows")
    groups = [[0, 1, 2], [4], [3, 5]] if kind == "packed" else [[0], [3], [4], [5]]
    return make_batch(tokens, [np.array(group) for group in groups], seed=0, step=0, pad_id=0)


def built(shape: dict[str, Any], method: str, *, recompute: bool = False, kernel: Kernel = "sdpa") -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape), dtype=torch.float32, device=CPU)
    METHODS[method](model)
    draw(model, 0)
    model.model.kernel = kernel
    for block in blocks(model):
        block.recompute = recompute
    return model.train()


def counted(model: LlamaForCausalLM, batches: Sequence[Batch]) -> Count:
    with Count() as count:
        for each in batches:
            model(each).backward()
    return count


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize(
    ("shape", "method"),
    [*((TINY, method) for method in METHODS), (MIDDLE, "full"), (MIDDLE, "lora everywhere")],
    ids=[*METHODS, "middle full", "middle lora"],
)
def test_torchs_count_is_the_formulas(shape: dict[str, Any], method: str, kind: str, recompute: bool) -> None:
    model, asked = built(shape, method, recompute=recompute), batch(kind)
    count = counted(model, [asked])
    formula = Cost.of(model).flops(Work.computed([asked]))
    assert count.flops - count.recomputed == pytest.approx(formula, rel=0.02)
    if recompute:  # all of each layer that is gone back through, but its last product, whose output no backward needs
        share = 1 if method != "llama adapter" else 1 / len(blocks(model))
        assert 0.7 < count.recomputed / (share * layers_forward(model, asked)) < 1
    else:
        assert count.recomputed == 0


def beside(model: LlamaForCausalLM, form: Form, tokens: int) -> float:
    """What the fused form multiplies beyond the formula: zeros beside adapters, which have a dropout here, and in
    float8 their halves.
    """
    flops, below = 0, False
    for plan in (plan for layer in blocks(model) for plan in layer.fast.plans):
        n, k, c, adapters = plan.n, plan.k, plan.columns, plan.rank * len(plan.spans) * plan.k
        if form.float8:
            wide_k, wide_n = form.width(k, c), form.width(n, c)
            flops += 2 * (n * (wide_k - k) + adapters + 2 * c * wide_n + below * (k * (wide_n - n) + adapters))
        else:
            flops += 2 * c * (2 * n + (1 + below) * k)
        # the formula's, but for the adapters' own gradients
        flops -= 4 * plan.elements - 2 * (not below) * adapters
        below = True
    return flops * tokens


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("method", ["full", "full, first layer frozen", "lora", "lora everywhere"])
@pytest.mark.parametrize("form", [FP32, FLOAT8], ids=["fp32", "float8"])
def test_the_fused_form_counts_too(form: Form, method: str, recompute: fast.Recompute) -> None:
    model, asked = LlamaForCausalLM(LlamaConfig.from_dict(MIDDLE), dtype=torch.float32, device=META), batch("packed")
    METHODS[method](model)
    if form.float8 and "full" in method:
        assert fast.obstacle(model, CPU, form)
        return
    fast.install(model, form, recompute)
    fast.allocate(model, CPU)
    materialise(model, CPU)
    draw(model, 0)
    lora.initialise(model, 0)
    model.model.kernel = "sdpa"
    count, formula = counted(model.train(), [asked]), Cost.of(model).flops(Work.computed([asked]))
    more = beside(model, form, asked.ids.numel())
    assert (more == 0) == ("lora" not in method)
    assert count.flops - count.recomputed == pytest.approx(formula + more, rel=1e-6)
    low, high = {"none": (0, 0), "selective": (0.6, 0.75), "full": (0.75, 0.9)}[recompute]
    assert low <= count.recomputed / layers_forward(model, asked) <= high


def layers_forward(model: LlamaForCausalLM, asked: Batch) -> int:
    with torch.no_grad(), Count() as count:
        model.model(asked)
    return count.flops


def test_it_is_not_the_formula_of_something_else() -> None:
    asked = batch("packed")
    flops = {method: counted(built(TINY, method), [asked]).flops for method in ("full", "lora")}
    assert flops["full"] > 1.2 * flops["lora"]
    costs = {method: Cost.of(built(TINY, method)).flops(Work.computed([asked])) for method in flops}
    assert costs["full"] != pytest.approx(flops["lora"], rel=0.02)
    assert costs["lora"] != pytest.approx(flops["full"], rel=0.02)


def test_a_product_of_16_bits_that_is_summed_in_fp32_counts() -> None:
    summed, a, b = (torch.empty(*shape, device="meta") for shape in ((8, 16), (8, 4), (4, 16)))
    with Count() as count:
        torch.addmm(summed, a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=summed)
    assert count.flops == 2 * 8 * 4 * 16


def test_torch_alone_counts_no_attention_here_and_twice_the_causal_one_elsewhere() -> None:
    """Why there are formulas of our own: the same step through the plain mathematics, which torch counts in full."""
    asked, method = batch("padded"), "lora everywhere"
    with FlopCounterMode(display=False) as theirs:
        built(TINY, method)(asked).backward()
    plain = counted(built(TINY, method, kernel="eager"), [asked])
    fused = counted(built(TINY, method), [asked])
    work, pair = Work.computed([asked]), Cost.of(built(TINY, method)).pair
    assert fused.flops - theirs.get_total_flops() == pytest.approx(pair * work.pairs, rel=0.01)
    everything = asked.ids.numel() * asked.ids.shape[1]
    backward = pair * 2.5 / 3.5 * 0.8  # four products of five: the scores are kept
    assert plain.flops - fused.flops == pytest.approx(
        (pair / 3.5 + backward) * everything - pair * work.pairs, rel=0.02
    )


def test_full_fine_tuning_is_six_times_the_weights_and_attention() -> None:
    model = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA_8B), dtype=torch.bfloat16, device=META)
    cost = Cost.of(model)
    head = 128256 * 4096
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 2 * head
    assert cost.token == 6 * matrices
    assert cost.label == 6 * head
    assert cost.pair == 32 * 3.5 * 4 * 4096
    tokens = 8192
    flops = cost.flops(Work(tokens, tokens, 2 * 4096 * 4097 // 2))
    assert flops / tokens == pytest.approx(6 * 7.505e9 + 3.5 * 32 * 2 * 4096 * 4096, rel=1e-3)


def test_lora_is_four_times_the_base_and_six_times_the_adapters() -> None:
    model = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA_8B), dtype=torch.bfloat16, device=META)
    METHODS["lora everywhere"](model)
    cost, head = Cost.of(model), 128256 * 4096
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters() if p.dim() == 2 and not p.requires_grad) - 2 * head
    # Below the first layer's adapters nothing learns: no gradient of its input.
    assert cost.token == 4 * base + 6 * adapters - 2 * (4096 + 48) * 4096 - 2 * 4096 * (6144 - 4096)
    assert cost.label == 4 * head
    per_token = cost.token + cost.label + cost.pair * 4097 / 2
    assert per_token == pytest.approx(33.8e9, rel=0.02), "30.0 GFLOP in products and 3.8 in attention, as measured"


def test_padding_is_work_and_no_use() -> None:
    packed, padded = batch("packed"), batch("padded")
    real = {"packed": LENGTHS.sum(), "padded": LENGTHS[[0, 3, 4, 5]].sum()}
    assert Work.useful([packed]).tokens == real["packed"]
    assert Work.useful([packed]).pairs == sum(n * (n + 1) // 2 for n in LENGTHS)
    assert Work.useful([padded]).pairs == sum(n * (n + 1) // 2 for n in LENGTHS[[0, 3, 4, 5]])
    assert Work.computed([padded]) == Work(4 * 128, padded.count, 4 * 128 * 129 // 2)
    assert Work.computed([padded, packed]).labels == padded.count + packed.count
    nothing = make_batch(tokens_of_none(), [], seed=0, step=0, pad_id=0, width=16)
    assert Work.useful([nothing]) == Work(0, 0, 0)


def tokens_of_none() -> Tokens:
    none = np.zeros(0, dtype=np.int32)
    return Tokens(none, none, np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64), "none")


PAIR = ("he go home", "He goes home.")


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Rows that are all the same, so that every step is."""
    result: dict[str, Any] = packtrain.finetune(
        model_name=str(tiny.model(folder / "model")),
        dataset="grammar_dataset",
        train_split=str(tiny.grammar(folder / "rows.csv", [PAIR] * 24)),
        run_validation=False,
        batching_strategy="padding",
        batch_size_training=3,
        output_dir=str(folder / "out"),
        save_model=False,
        flop_counter=True,
        **settings,
    )
    assert json.loads((folder / "out" / "run" / "result.json").read_text())["model_tflops"] == result["model_tflops"]
    return result


@pytest.mark.parametrize("start", [0, 3, 6])
def test_18_steps_before_the_counted_one_are_not_in_the_count(tmp_path: Path, start: int) -> None:
    """llama-recipes' counter multiplied by flop_counter_start + 1."""
    result = run(tmp_path, flop_counter_start=start, max_train_step=start + 2, use_peft=True)
    ((prompt, answer),) = Encoder(tiny.tokenizer())([grammar_prompt({"input": PAIR[0]})], [PAIR[1]])
    length = len(prompt) + len(answer)
    expected = Cost.of(built(TINY, "lora")).flops(Work(3 * length, 3 * len(answer), 3 * length * (length + 1) // 2))
    assert result["model_flops"] == expected
    assert result["counted_flops"] == pytest.approx(expected, rel=0.02)
    assert result["recomputed_flops"] == 0
    assert result["model_tflops"] > 0
    assert result["mfu"] is None


def test_a_last_step_is_counted_and_timed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, flop_counter_start=2, max_train_step=3, activation_checkpointing="full")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FLOPs: ")]
    assert len(said) == 2
    assert "padding and recomputation left out; torch counted" in said[0]
    assert "slowed down by counting" in said[1]
    assert "no peak is known for a cpu: no MFU" in said[1]
    assert result["counted_flops"] > result["recomputed_flops"] > 0
    assert result["model_tflops"] is not None


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, flop_counter_start=90, num_epochs=1)
    assert result["model_tflops"] is None
    assert "only what comes after 90 counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H1000", None),
        ("Orin", None),
    ],
)
def test_peaks(name: str, expected: float | None) -> None:
    assert peak(name) == expected
    assert set(PEAKS.values()) >= {expected} - {None}
