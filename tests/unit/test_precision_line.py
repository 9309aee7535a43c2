"""Flags and device -> the forward's dtype, the optimizer's rule, and what a run says of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packtrain import log
from packtrain.configs.parse import build
from packtrain.precision import optimizer_rule, precision_line, weight_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("flags", "on_cpu", "on_gpu"),
    [
        ({}, FP32, BF16),
        ({"mixed_precision": False}, FP32, FP32),
        ({"fsdp_config.mixed_precision": False}, FP32, FP32),
        ({"pure_bf16": True}, BF16, BF16),
        ({"pure_bf16": True, "mixed_precision": False}, BF16, BF16),
        ({"use_fp16": True}, FP16, FP16),
        ({"fsdp_config.use_fp16": True}, FP16, FP16),
    ],
)
def test_weight_dtype(
    flags: dict[str, Any],
    on_cpu: torch.dtype,
    on_gpu: torch.dtype,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "_said", set())
    monkeypatch.setattr(log, "_state", {"speaks": True})
    cfg = build(model_name="M", **flags)
    assert weight_dtype(cfg, GPU) == on_gpu
    assert capsys.readouterr().err == ""
    assert weight_dtype(cfg, CPU) == on_cpu
    assert ("slower than fp32" in capsys.readouterr().err) == (on_cpu != FP32)


@pytest.mark.parametrize(
    ("flags", "weights", "learning", "said"),
    [
        ({}, FP32, [FP32], "fp32 weights; AdamW, fp32 moments"),
        ({}, BF16, [BF16], "bf16 weights; AdamW, fp32 masters and moments"),
        ({"use_peft": True}, BF16, [FP32], "bf16 weights, fp32 where they train; AdamW, fp32 moments"),
        (
            {"pure_bf16": True},
            BF16,
            [BF16],
            "bf16 weights; AdamW, fp32 masters and moments (--optimizer anyprecision does without both)",
        ),
        (
            {"pure_bf16": True, "optimizer": "anyprecision"},
            BF16,
            [BF16],
            "bf16 weights; AnyPrecision AdamW, bf16 moments, no masters: "
            "what rounding takes from a weight is carried on",
        ),
        (
            {"pure_bf16": True, "optimizer": "anyprecision", "use_kahan": False},
            BF16,
            [BF16],
            "bf16 weights; AnyPrecision AdamW, bf16 moments, no masters: updates below a weight's last place are lost "
            "(--use_kahan keeps them)",
        ),
        (
            {"pure_bf16": True, "optimizer": "anyprecision", "moments": "8bit"},
            BF16,
            [BF16],
            "bf16 weights; AnyPrecision AdamW, 8-bit moments, no masters: "
            "what rounding takes from a weight is carried on",
        ),
        (
            {"pure_bf16": True, "optimizer": "anyprecision", "use_peft": True},
            BF16,
            [FP32],
            "bf16 weights, fp32 where they train; AnyPrecision AdamW, bf16 moments",
        ),
        ({"optimizer": "anyprecision"}, BF16, [BF16], "bf16 weights; AdamW, fp32 masters and moments"),
        ({"optimizer": "adamw8bit"}, BF16, [BF16], "bf16 weights; AdamW of torchao, fp32 masters and 8-bit moments"),
        ({"optimizer": "adamw8bit"}, FP32, [FP32], "fp32 weights; AdamW of torchao, 8-bit moments"),
        (
            {"use_fp16": True},
            FP16,
            [FP16],
            "fp16 weights; AdamW, fp32 masters and moments; loss scaled by 65,536 at first",
        ),
    ],
)
def test_precision_line(flags: dict[str, Any], weights: torch.dtype, learning: list[torch.dtype], said: str) -> None:
    assert precision_line(build(model_name="M", **flags), weights, learning) == said


def test_anyprecision_is_for_pure_bf16() -> None:
    rules = [optimizer_rule(build(model_name="M", optimizer="anyprecision", pure_bf16=pure)) for pure in (False, True)]
    assert rules == ["AdamW", "anyprecision"]
