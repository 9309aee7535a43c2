"""lora_config, llama_adapter_config, prefix_config: the adapters that `--use_peft --peft_method` chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank updates of linear layers (arXiv:2106.09685)."""

    r: int = 8
    """The rank of each update."""

    lora_alpha: int = 32
    """The update counts lora_alpha / r times."""

    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Linear layers to adapt: names, all-linear, or a regular expression that whole names match."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train along."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What the adapter is for: text generation, the only one here."""

    lora_dropout: float = 0.05
    """Share of an adapter's inputs that is dropped in training."""

    inference_mode: bool = False
    """Load without training. Training never does."""

    use_rslora: bool = False
    """The update counts lora_alpha / sqrt(r) times instead (arXiv:2312.03732)."""

    modules_to_save: tuple[str, ...] = ()
    """Modules to train whole and save with the adapter, e.g. embed_tokens,lm_head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaAdapterConfig:
    """Learned prompts behind a gate that starts at zero (arXiv:2303.16199)."""

    adapter_len: int = 10
    """Prompt tokens a layer."""

    adapter_layers: int = 30
    """Layers that have a prompt, counted from the last."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What the adapter is for: text generation, the only one here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixConfig:
    """Learned keys and values before the first token (arXiv:2101.00190)."""

    num_virtual_tokens: int = 30
    """How many tokens' worth of them."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """What the adapter is for: text generation, the only one here."""
