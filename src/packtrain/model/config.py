"""What config.json says about a Llama, and whether we can train it.

    LlamaConfig.from_dict(values)      the settings, or one UserError with all that is wrong
    problems(values)                   that list alone
    unknown_keys(values)               keys that nothing here reads

Field names and defaults are Hugging Face's. A setting that would change the computation in a way that model/llama.py
does not know is refused; a key nobody here knows is left alone, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from packtrain.errors import raise_if
from packtrain.model.rope import RopeParameters

SOURCE = "config.json"


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama model."""

    vocab_size: int
    """Rows of the embedding and of the head."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width inside the MLP."""

    num_hidden_layers: int
    """Decoder layers."""

    num_attention_heads: int
    """Query heads."""

    num_key_value_heads: int
    """Key and value heads, each shared by a group of query heads."""

    head_dim: int
    """Width of one head; even."""

    max_position_embeddings: int = 2048
    """Longest document the model was made for; dynamic rope stretches beyond it."""

    rms_norm_eps: float = 1e-6
    """Added to the mean square."""

    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    tie_word_embeddings: bool = False
    """The head's weight is the embedding's."""

    attention_bias: bool = False
    """q, k, v and o projections have a bias."""

    mlp_bias: bool = False
    """gate, up and down projections have a bias."""

    pad_token_id: int | None = None
    """Its row of the embedding gets no gradient from the input side, as in transformers."""

    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    """Rotary position embedding."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = SOURCE) -> LlamaConfig:
        """Read config.json's values. Raises one UserError with every problem, naming `source`."""
        raise_if(problems(values, source))
        given = {name: values[name] for name in _KINDS if values.get(name) is not None}
        given.setdefault("num_key_value_heads", given["num_attention_heads"])
        given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
        return cls(**given, rope_parameters=_rope(values))

    @property
    def padding_row(self) -> int | None:
        """The embedding's row of `pad_token_id`, counted from the end if negative; None where there is no such row."""
        token = self.pad_token_id
        return token if token is not None and -self.vocab_size <= token < self.vocab_size else None


def problems(values: Mapping[str, Any], source: str = SOURCE) -> list[str]:
    """All that keeps a model with this config.json from being trained here, a sentence each; one for another model."""
    foreign = _foreign(values, source)
    if foreign is not None:
        return [foreign]
    found = [*_field_problems(values), *_rope_problems(values), *_refusals(values)]
    return [f"{source}: {problem}" for problem in found or _head_problems(values)]


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys of config.json that have no meaning here, sorted."""
    return sorted(set(values) - _KNOWN)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Kind = tuple[str, Callable[[Any], bool]]
_COUNT: _Kind = ("a whole number above 0", lambda value: _whole(value) and value > 0)
_AMOUNT: _Kind = ("a number of at least 0", lambda value: _number(value) and value >= 0)
_FLAG: _Kind = ("true or false", lambda value: isinstance(value, bool))
_TOKEN: _Kind = ("a token id", _whole)
_STRETCH: _Kind = ("a number of at least 1", lambda value: _number(value) and value >= 1)
_POSITIVE: _Kind = ("a number above 0", lambda value: _number(value) and value > 0)

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), _AMOUNT),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _FLAG),
    "pad_token_id": _TOKEN,
}
"""Fields that are read as they stand. null means the default."""

_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": ((None, "silu", "swish"), "expected silu: the MLP is SwiGLU in every Llama"),
    "attention_dropout": ((None, 0), "expected 0: attention has no dropout here; set it to 0 to train without"),
    "partial_rotary_factor": ((None, 1), "expected 1: every Llama turns whole heads"),
    "quantization_config": ((None,), "expected none: weights have to be fp32, bf16 or fp16; use the original model"),
    "compression_config": ((None,), "expected none: weights have to be fp32, bf16 or fp16; use the original model"),
}
"""Settings that would change the computation: the values that do not, and what to say about any other."""

_ROPE_KEYS = {"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"}
_IDENTITY = {"_name_or_path", "architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
_HARMLESS = {"bos_token_id", "eos_token_id", "use_cache"}
_HARMLESS |= {"is_llama_config", "rope_interleaved"}  # SmolLM2's, unread by transformers
_HARMLESS |= {"pretraining_tp"}  # Llama 2's: one product in slices gives what it gives whole
_KNOWN = _KINDS.keys() | _REFUSED.keys() | _ROPE_KEYS | _IDENTITY | _HARMLESS

_ROPE: Mapping[str, Mapping[str, _Kind]] = {
    "default": {},
    "linear": {"factor": _STRETCH},
    "dynamic": {"factor": _STRETCH},
    "llama3": {
        "factor": _STRETCH,
        "low_freq_factor": _POSITIVE,
        "high_freq_factor": _POSITIVE,
        "original_max_position_embeddings": _COUNT,
    },
}
"""Types of rope, and what each has to say."""


def _foreign(values: Mapping[str, Any], source: str) -> str | None:
    """Why this is not a Llama text model, if it is not."""
    architectures = values.get("architectures") or []
    model_type = values.get("model_type")
    ours = any(str(name).lower() == "llamaforcausallm" for name in architectures)
    trains = "packtrain trains Llama text models (Llama 1 to 3.3, TinyLlama, SmolLM2)"
    if model_type != "llama" and not (model_type is None and ours):
        return f"{source}: model_type is {model_type!r}, expected 'llama': {trains}."
    if architectures and not ours:
        return f"{source}: architectures is {architectures}, expected ['LlamaForCausalLM']: {trains}."
    return None


def _field_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name in _REQUIRED:
        if values.get(name) is None:
            yield f"{name} is missing, expected {_KINDS[name][0]}."
    for name, (expected, fits) in _KINDS.items():
        if values.get(name) is not None and not fits(values[name]):
            yield f"{name} is {values[name]!r}, expected {expected}."


def _head_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What the sizes, each right by itself, get wrong together."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    if values.get("head_dim") is None and hidden % heads:
        yield f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given."
    elif (values.get("head_dim") or hidden // heads) % 2:
        yield f"head_dim is {values.get('head_dim') or hidden // heads}, expected an even number: rope turns pairs."
    if heads % kv_heads:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."


def _refusals(values: Mapping[str, Any]) -> Iterator[str]:
    # Newer files keep partial_rotary_factor in rope_parameters.
    inside_rope = values.get("rope_parameters")
    values = {**(inside_rope if isinstance(inside_rope, Mapping) else {}), **values}
    for name, (accepted, why) in _REFUSED.items():
        value = values.get(name)
        if value not in accepted:
            shown = value.get("quant_method", "given") if isinstance(value, Mapping) else value
            yield f"{name} is {shown!r}, {why}."


def _rope_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The old form (rope_scaling beside rope_theta) and the new (rope_parameters) as one, with the defaults."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = RopeParameters.rope_theta if values.get("rope_theta") is None else values["rope_theta"]
    lengths = [values.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings")]
    lengths += [values.get("max_position_embeddings"), LlamaConfig.max_position_embeddings]
    rope["original_max_position_embeddings"] = next(length for length in lengths if length is not None)
    return rope


def _rope_problems(values: Mapping[str, Any]) -> Iterator[str]:
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    if not isinstance(values.get(key) or {}, Mapping):
        yield f"{key} is {values[key]!r}, expected an object with rope_type, or null."
        return
    rope = _rope_values(values)
    if str(rope["rope_type"]) not in _ROPE:
        yield f"{key}: rope_type is {rope['rope_type']!r}, expected one of {', '.join(_ROPE)}."
        return
    wrong = [
        f"{key}: {name} is {rope.get(name)!r}, expected {expected} for {rope['rope_type']} rope."
        for name, (expected, fits) in {"rope_theta": _POSITIVE, **_ROPE[rope["rope_type"]]}.items()
        if not fits(rope.get(name))
    ]
    yield from wrong
    if not wrong and rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        yield f"{key}: low_freq_factor {low} is not below high_freq_factor {high}."


def _rope(values: Mapping[str, Any]) -> RopeParameters:
    """From values without problems."""
    rope = _rope_values(values)
    used = ("rope_type", "rope_theta", *_ROPE[rope["rope_type"]])
    return RopeParameters(**{name: rope[name] for name in used})
