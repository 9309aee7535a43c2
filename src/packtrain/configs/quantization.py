"""quantization_config: how `--quantization 4bit` and `8bit` hold a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ComputeDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The format of the decoder layers' weights, and what they are multiplied in."""

    quant_type: Literal["fp4", "nf4"] = "fp4"
    """The 4-bit format."""

    compute_dtype: ComputeDtype = "bfloat16"
    """The dtype of products with quantised weights. Not set, it is the model's on a CPU and with use_fp16."""

    use_double_quant: bool = False
    """Quantise the scales of 4-bit weights too, to 8 bits."""

    quant_storage: ComputeDtype = "bfloat16"
    """The dtype of the tensor that quantised weights are packed into; no value depends on it."""
