"""The attention kernels beside one another, and which one a run uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import batch_of, qkv, reference
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import packtrain
import tiny
from packtrain import preflight
from packtrain.batch import Batch
from packtrain.configs.parse import parse
from packtrain.data.collate import make_batch
from packtrain.data.tokens import Tokens
from packtrain.errors import UserError
from packtrain.kernels import flash
from packtrain.kernels.attend import attend, attend_backward
from packtrain.kernels.attention import Kernel, attention, prepared
from packtrain.kernels.attention_choice import Choice, choose, problems
from packtrain.kernels.flex import document_mask
from packtrain.model.llama import LlamaConfig, LlamaForCausalLM, draw

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS: tuple[Kernel, ...] = ("sdpa", "eager", "flex", "flash")
SHAPE = tiny.SIZES | {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6}
LENGTHS = np.array([90, 40, 17, 61, 150, 9])
MIXED: dict[str, tuple[int, ...]] = {"packed": (10, 20, 3, 7, 17, 23), "padded": (25, 15, 40)}


@pytest.fixture(autouse=True)
def every_kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 as the reference does it; and torch's FlexAttention lets its plain form go backward."""
    package, cute, interface = (ModuleType(f"flash_attn{end}") for end in ("", ".cute", ".cute.interface"))
    interface.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    for module in (package, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(flash, "interface", lambda: interface)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def varlen(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> tuple[Tensor, None]:
    """flash_attn_varlen_func's meaning: documents by edges, causal up to each one's last key."""
    edges_q, edges_k = asked["cu_seqlens_q"].tolist(), asked["cu_seqlens_k"].tolist()
    assert asked["causal"]
    assert asked["cu_seqlens_q"].dtype == asked["cu_seqlens_k"].dtype == torch.int32
    assert asked["max_seqlen_q"] == max(np.diff(edges_q))
    assert asked["max_seqlen_k"] == max(np.diff(edges_k))
    group, made = q.shape[1] // k.shape[1], []
    for a, b, c, d in zip(edges_q, edges_q[1:], edges_k, edges_k[1:], strict=False):
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[a:b], keys) / q.shape[-1] ** 0.5
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
        made.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(made), None


def tokens() -> Tokens:
    ids = np.random.default_rng(0).integers(3, tiny.VOCABULARY, LENGTHS.sum(), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    return Tokens(ids, ids, offsets, np.arange(1, len(LENGTHS) + 1), "rows")


def batch(kind: str) -> Batch:
    groups = [[0, 1, 2], [4]] if kind == "packed" else [[0], [3], [4], [5]]
    return make_batch(tokens(), [np.array(group) for group in groups], seed=0, step=0, pad_id=0)


def outcome(kernel: Kernel, asked: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real tokens, and every gradient of the loss."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE), dtype=torch.float32, device=CPU)
    draw(model, 1)
    model.model.kernel = kernel
    logits = model(asked, logits=True).flatten(0, 1)[asked.index]
    (model(asked) / asked.count).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("kernel", ["eager", "flex", "flash", "auto"])
def test_every_kernel_gives_sdpas_logits_and_gradients(kernel: Kernel, kind: str) -> None:
    expected, gradients = outcome("sdpa", batch(kind))
    found, theirs = outcome(kernel, batch(kind))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("places", [0, 5])
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_documents_and_a_prefix_against_float64(kernel: Kernel, kind: str, places: int) -> None:
    lengths, rows = MIXED[kind], 2
    asked = prepared(batch_of(lengths, rows, whole_rows=False), kernel, places, torch.float32, 16)
    inputs = [x.requires_grad_() for x in map(Tensor.clone, qkv(80, 6, 2, 16))]
    shared = [torch.randn(places, 2, 16, requires_grad=True) for _ in range(2)] if places else []
    found = attention(*inputs, asked, prefix=tuple(shared) if places else None)
    expected = with_prefix(inputs, shared, lengths) if places else reference(*inputs, lengths)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape)
    made = torch.autograd.grad((found * weights).sum(), inputs + shared)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs + shared)
    for ours, gradient in zip(made, theirs, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


def with_prefix(inputs: list[Tensor], shared: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    """Each document by itself, its prefix before it, as a longer document whose first rows nobody reads."""
    made = []
    for q, k, v in zip(*(x.split(lengths) for x in inputs), strict=True):
        longer = torch.cat([q.new_zeros(len(shared[0]), *q.shape[1:]), q])
        keys, values = (torch.cat([p, x]) for p, x in zip(shared, (k, v), strict=True))
        made.append(reference(longer, keys, values, (len(longer),))[len(shared[0]) :])
    return torch.cat(made)


def test_a_mask_that_knows_no_documents_would_be_noticed() -> None:
    asked = prepared(batch("packed"), "eager", 0, torch.float32, 16)
    one = replace(asked, cu_seqlens=asked.cu_seqlens[[0, -1]])
    inputs: list[Any] = qkv(asked.ids.numel(), 6, 2, 16)
    distance = (attention(*inputs, asked) - attention(*inputs, one)).abs().max()
    assert distance > 0.1


def test_the_softmax_of_eager_is_in_fp32() -> None:
    lengths = (300,)
    inputs = [x.bfloat16() for x in qkv(300, 4, 2, 16)]
    found = attention(*inputs, prepared(batch_of(lengths), "eager", 0, torch.bfloat16, 16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference(*inputs, lengths), rtol=2e-2, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    places=st.sampled_from([0, 1, 127, 128, 130]),
    rows=st.integers(1, 2),
)
def test_flex_blocks_are_those_of_the_whole_mask(lengths: list[int], places: int, rows: int) -> None:
    mask = document_mask(batch_of(tuple(lengths * rows), rows), places)
    width = sum(lengths)
    whole = create_block_mask(mask.mask_mod, rows, None, width, places + width, device="cpu")
    assert torch.equal(mask.to_dense(), whole.to_dense())
    assert mask.shape[-2:] == whole.shape[-2:]
    assert (full(mask) <= full(whole)).all()


def full(mask: Any) -> Tensor:
    """0 or 1 for each block: whether nothing in it is masked."""
    counts, order = mask.full_kv_num_blocks, mask.full_kv_indices
    listed = torch.arange(order.shape[-1]) < counts[..., None]
    return torch.zeros_like(order).scatter(-1, order.long(), listed.int())


def test_flex_makes_its_mask_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "packtrain.kernels.attention.document_mask", lambda *asked: made.append(asked) or document_mask(*asked)
    )
    outcome("flex", batch("packed"))
    assert len(made) == 2, "one for each of two forwards of two layers"


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex"])
def test_attention_in_halves_is_the_same_kernel(kernel: Kernel) -> None:
    asked = prepared(batch_of((10, 20, 30)), kernel, 0, torch.float32, 16)
    q, k, v = (x.contiguous() for x in qkv(60, 6, 2, 16))
    gradient = torch.randn(q.shape)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attention(*leaves, asked)
    attended = attend(q, k, v, asked)
    into = tuple(map(torch.empty_like, (q, k, v)))
    attend_backward(gradient, q, k, v, attended, asked, into)
    torch.testing.assert_close(attended.out, expected.detach())
    for ours, theirs in zip(into, torch.autograd.grad(expected, leaves, gradient), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return of


def test_auto_is_flash_attn_4_where_it_can_be_and_torchs_own_elsewhere(
    gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    assert choose("auto", CUDA, torch.bfloat16, 128).kernel == "flash"
    for device, dtype, head, why in (
        (CPU, torch.bfloat16, 128, "flash-attn-4 needs an NVIDIA GPU, and this runs on cpu"),
        (CUDA, torch.float32, 128, "flash-attn-4 takes bf16 and fp16, and the model computes in float32"),
        (CUDA, torch.bfloat16, 80, "flash-attn-4 takes heads of 64 or 128, and this model's have 80"),
    ):
        assert choose("auto", device, dtype, head) == Choice("sdpa", why)
    monkeypatch.setattr("packtrain.kernels.flex.obstacle", lambda device, head_dim: None)
    gpu(8, 6)
    assert str(choose("auto", CUDA, torch.bfloat16, 64)) == (
        "attention: sdpa, and flex for rows of short documents "
        "(flash-attn-4 needs compute capability 9.0 or higher, and this GPU has 8.6)"
    )
    gpu(10, 0)
    monkeypatch.setattr(flash, "interface", lambda: None)
    assert choose("auto", CUDA, torch.float16, 64) == Choice("auto", "flash-attn-4 is not installed")
    monkeypatch.setattr("packtrain.kernels.flex.obstacle", lambda device, head_dim: "no Triton")
    assert str(choose("auto", CUDA, torch.float16, 64)) == "attention: sdpa (flash-attn-4 is not installed)"


def test_auto_takes_flex_for_rows_of_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = batch_of((200,) * 12, 2), batch_of((1500, 900))
    padded = batch_of((200,) * 12, 12, whole_rows=True)

    def kernels(dtype: torch.dtype) -> list[str]:
        return [prepared(asked, "auto", 0, dtype, 64).kernel for asked in (short, long, padded)]

    assert kernels(torch.bfloat16) == ["sdpa", "sdpa", "sdpa"], "on a CPU"
    monkeypatch.setattr("packtrain.kernels.flex.obstacle", lambda device, head_dim: None)
    assert kernels(torch.bfloat16) == ["flex", "sdpa", "sdpa"]
    assert kernels(torch.float32) == ["sdpa", "sdpa", "sdpa"]
    assert prepared(short, "auto", 0, torch.bfloat16, 64).mask is not None
    monkeypatch.setattr("packtrain.kernels.attention.obstacle", lambda *asked: None)
    assert kernels(torch.bfloat16) == ["flash", "flash", "flash"]


def test_a_forced_kernel_is_taken_or_refused(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    for kernel in KERNELS:
        assert choose(kernel, CUDA, torch.bfloat16, 128) == Choice(kernel, "as --attention says")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert [problems(kernel, CUDA, torch.bfloat16, 128) for kernel in KERNELS] == [[], [], [], []]
    assert problems("flex", CUDA, torch.bfloat16, 8) != []
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "there is no C compiler (gcc, clang)" in problems("flex", CUDA, torch.bfloat16, 128)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton, which is not installed" in problems("flex", CUDA, torch.bfloat16, 128)[0]
    monkeypatch.setattr(flash, "interface", lambda: None)
    assert problems("flash", CUDA, torch.bfloat16, 128) == [
        "flash: flash-attn-4 is not installed; pip install flash-attn-4, or leave the choice to packtrain (auto) or "
        "take sdpa"
    ]
    assert [problems(kernel, CPU, torch.float32, 64) for kernel in ("sdpa", "eager", "auto")] == [[], [], []]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("auto", "attention: sdpa (flash-attn-4 needs an NVIDIA GPU, and this runs on cpu)"),
        ("eager", "attention: eager (as --attention says)"),
    ],
)
def test_a_run_says_once_which_it_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, line: str
) -> None:
    result = packtrain.finetune(
        model_name=str(tiny.model(tmp_path / "model")),
        dataset="grammar_dataset",
        train_split=str(tiny.grammar(tmp_path / "rows.csv")),
        run_validation=False,
        max_train_step=1,
        context_length=64,
        output_dir=str(tmp_path / "out"),
        attention=asked,
    )
    assert result["status"] == "done"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_one_that_cannot_run_is_refused_before_the_run(tmp_path: Path, kernel: str) -> None:
    base = tiny.model(tmp_path / "model")
    rows = tiny.grammar(tmp_path / "rows.csv")
    words = ["--dataset", "grammar_dataset", "--train_split", str(rows), "--norun_validation"]
    cfg = parse(["--model_name", str(base), *words, "--attention", kernel, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"^--attention {kernel}: .*; leave the choice to packtrain"):
        preflight.examine(cfg)
    assert not (tmp_path / "out").exists()
