"""In which precision a run computes, and what its optimizer keeps: from flags to dtype and rule.

weight_dtype    of the forward's weights, which is also what is saved
quantisation    of a frozen base in 4 or 8 bits: its format, what its products are computed in, a sentence on both
optimizer_rule  of packtrain.optim's, by name
precision_line  both in a sentence
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch

from packtrain import log
from packtrain.configs.run import RunConfig
from packtrain.kernels.quantise import BLOCK, Quantisation, dequantiser

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def weight_dtype(cfg: RunConfig, device: torch.device) -> torch.dtype:
    """bf16 on GPUs and fp32 on CPUs, unless pure_bf16, use_fp16 or mixed_precision False was given."""
    asked = torch.bfloat16 if cfg.fsdp_config.pure_bf16 else torch.float16 if cfg.train_config.use_fp16 else None
    if asked is not None:
        if device.type == "cpu":
            slow = "without instructions for it, as on most, it is about 50 times slower than fp32"
            log.once(f"warning: {SHORT[asked]} was asked for on a CPU; {slow}")
        return asked
    if device.type == "cpu" or not cfg.fsdp_config.mixed_precision:
        return torch.float32
    return torch.bfloat16


def quantisation(cfg: RunConfig, device: torch.device) -> tuple[Quantisation, torch.dtype, str] | None:
    """(format of the base's projections, dtype of their products, what to say of it); None if it is as it was."""
    bits, quantization_config = cfg.train_config.quantization, cfg.quantization_config
    if bits not in {"4bit", "8bit"}:
        return None
    storage, dtype = getattr(torch, quantization_config.quant_storage), _product_dtype(cfg, device)
    if bits == "8bit":
        form = Quantisation("int8", storage=storage)
        return form, dtype, f"base in 8 bits: int8, a scale each row, products in {SHORT[dtype]}"
    by_bitsandbytes, means = dequantiser(device)
    kind, double = quantization_config.quant_type, quantization_config.use_double_quant
    form = Quantisation(kind, double, storage, by_bitsandbytes)
    scales = "scales in 8 bits (double quantisation), " if form.double else ""
    held = f"{kind}, blocks of {BLOCK}, {scales}products in {SHORT[dtype]}"
    return form, dtype, f"base in 4 bits: {held}, dequantised by {means}"


def _product_dtype(cfg: RunConfig, device: torch.device) -> torch.dtype:
    """As asked; if nobody did, what the rest computes in where bf16 is slow, on a CPU, or was not wanted: fp16."""
    asked = cfg.quantization_config.compute_dtype
    is_default = asked == "bfloat16" and cfg.origin.get("quantization_config.compute_dtype") != "flag"
    if is_default and (device.type == "cpu" or cfg.train_config.use_fp16):
        return weight_dtype(cfg, device)
    return cast(torch.dtype, getattr(torch, asked))


def optimizer_rule(cfg: RunConfig) -> str:
    """As asked; anyprecision is for pure_bf16 alone, as in llama-recipes."""
    asked = cfg.fsdp_config.optimizer
    return "AdamW" if asked == "anyprecision" and not cfg.fsdp_config.pure_bf16 else asked


def precision_line(cfg: RunConfig, weights: torch.dtype, learning: Collection[torch.dtype]) -> str:
    """For example "bf16 weights; AdamW, fp32 masters and moments". `learning`: dtypes of what trains."""
    rule = optimizer_rule(cfg)
    masters = "fp32 masters" if set(learning) - {torch.float32} else ""
    computed = f"{SHORT[weights]} weights"
    if weights != torch.float32 and not masters:
        computed += ", fp32 where they train"
    if rule == "anyprecision":
        loses = "updates below a weight's last place are lost (--use_kahan keeps them)"
        moments = cfg.fsdp_config.moments.replace("8bit", "8-bit")
        carries = "what rounding takes from a weight is carried on" if cfg.fsdp_config.use_kahan else loses
        return f"{computed}; AnyPrecision AdamW, {moments} moments" + (f", no masters: {carries}" if masters else "")
    if rule == "adamw8bit":
        kept = f"AdamW of torchao, {masters + ' and ' if masters else ''}8-bit moments"
    else:
        kept = f"AdamW, {masters + ' and moments' if masters else 'fp32 moments'}"
        if masters and cfg.fsdp_config.pure_bf16:
            kept += " (--optimizer anyprecision does without both)"
    return f"{computed}; {kept}" + ("; loss scaled by 65,536 at first" if cfg.train_config.use_fp16 else "")
