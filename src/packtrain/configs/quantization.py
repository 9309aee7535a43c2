"""quantization_config: how `--quantization` holds a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ComputeDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The format of 4-bit weights, and what they are multiplied in."""

    quant_type: Literal["fp4", "nf4"] = "fp4"
    """The 4-bit format."""

    compute_dtype: ComputeDtype = "bfloat16"
    """The dtype of products with quantised weights."""

    use_double_quant: bool = False
    """Quantise the scales of 4-bit weights too."""

    quant_storage: ComputeDtype = "bfloat16"
    """The dtype of the tensor that 4-bit weights are packed into."""
