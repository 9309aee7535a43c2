"""LoRA (arXiv:2106.09685) on a model's linear parts, and the layers and biases trained whole beside it.

    problems         all that is wrong with settings on a model, before anything is built
    fit              settings -> what they mean on a model of this shape
    install          freezes the model, fills the adapter slots (before sharding, on meta too)
    initialise       PEFT's starting values on whatever rows this rank holds (after sharding)
    adapter_tensors  PEFT's tensor names -> rows of our parameters: what saving and loading ask
    saved_layout     copies of base weights -> the Hugging Face tensors they start from

Adapters are fp32 whatever the base is; they compute in the activations' dtype. Everything is by Hugging Face's names:
a fused layer has one adapter for each of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from packtrain.errors import raise_if
from packtrain.kernels.product import linear
from packtrain.kernels.random import dropout
from packtrain.model.config import LlamaConfig
from packtrain.model.linear import Linear, Part, Piece, layout, linear_parts
from packtrain.peft.settings import LoraSettings, config_dict, settings_from
from packtrain.peft.targets import HEAD, Selection, select, ties
from packtrain.peft.tensors import PREFIX, LocalRows, Saved, all_rows, generator, keep, modules
from packtrain.peft.trainable import freeze

__all__ = [
    "LoraAdapter",
    "LoraSettings",
    "SavedPart",
    "TrainedBias",
    "adapter_tensors",
    "config_dict",
    "fit",
    "initialise",
    "install",
    "problems",
    "saved_layout",
    "settings_from",
]


class LoraAdapter(nn.Module):
    """y + scale * (dropout(x) A^T) B^T. `lora_A` fp32 [r, in], `lora_B` fp32 [out, r]; result in x's dtype.

    Where biases train, `bias` fp32 [out] begins as the base's, and the layer adds it in its place.
    """

    def __init__(self, name: str, layer: Linear, part: Part, settings: LoraSettings) -> None:
        super().__init__()
        self.name = name
        self.scale = settings.scale
        self.dropout = settings.lora_dropout
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.zeros(settings.r, layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(part.stop - part.start, settings.r, dtype=torch.float32, device=device))
        trains = settings.bias != "none" and layer.bias is not None
        self.bias = _fp32_copy(cast(Tensor, layer.bias), part) if trains else None

    def forward(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """x [T, in], y [T, out], keys int64 [T] (what dropout is drawn from) -> [T, out]."""
        return y + linear(self.columns(x, keys), self.lora_B.to(x.dtype))

    def columns(self, x: Tensor, keys: Tensor) -> Tensor:
        """scale * dropout(x) A^T [T, r] in x's dtype, for a kernel (the loss) that multiplies it by B^T itself."""
        return self.scale * self._down(x, keys)

    def _down(self, x: Tensor, keys: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            x = dropout(x, keys, self.name, self.dropout)
        return linear(x, self.lora_A.to(x.dtype))


class TrainedBias(nn.Module):
    """The bias of a part without a LoRA, fp32 [out]: the layer adds it in the place of the base's."""

    def __init__(self, name: str, layer: Linear, part: Part) -> None:
        super().__init__()
        self.name = name
        self.bias = _fp32_copy(cast(Tensor, layer.bias), part)

    def forward(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """y [T, out] as it is."""
        return y


class SavedPart(nn.Module):
    """A part trained whole: an fp32 copy of its rows (and bias) whose output replaces the frozen one's."""

    def __init__(self, name: str, layer: Linear, part: Part) -> None:
        super().__init__()
        self.name = name
        self.weight = _fp32_copy(layer.weight, part)
        self.bias = None if layer.bias is None else _fp32_copy(layer.bias, part)

    def forward(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """x [T, in] -> [T, out] in x's dtype; y and keys are the slot's and not used."""
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def problems(model: nn.Module, settings: LoraSettings) -> list[str]:
    """A sentence for everything that is wrong with `settings` on this model (meta or not)."""
    selection, wrong = select(model, settings)
    return settings.range_problems() + wrong + list(_bias_problems(model, settings, selection))


def fit(settings: LoraSettings, config: LlamaConfig) -> LoraSettings:
    """The settings as they are: none of them is about the model's size."""
    return settings


def install(model: nn.Module, settings: LoraSettings) -> None:
    """Freeze the base and put adapters in: fp32 parameters where the weights are. Before sharding.

    Embeddings, norms and the head named in modules_to_save are not copied: their own parameter becomes fp32 and
    learns. Raises UserError with all of `problems`.
    """
    raise_if(problems(model, settings))
    selection, _ = select(model, settings)
    adapted, saved = set(selection.adapted), set(selection.saved)
    freeze(model)
    for name, layer, part in linear_parts(model):
        if name in adapted:
            layer.adapters[part.name] = LoraAdapter(name, layer, part, settings)
        elif name in saved and name != HEAD:
            layer.adapters[part.name] = SavedPart(name, layer, part)
        elif settings.bias == "all" and layer.bias is not None:
            layer.adapters[part.name] = TrainedBias(name, layer, part)
    parts = {name for name, _, _ in linear_parts(model) if name != HEAD}
    parameters = dict(model.named_parameters())
    for ours, pieces in layout(model).items():
        if pieces[0].name.rpartition(".")[0] in saved - parts:
            # through .data the parameter stays the same object, so a tied head stays tied
            parameters[ours].data = parameters[ours].data.float()
            parameters[ours].requires_grad_(True)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, local_rows: LocalRows = all_rows) -> None:
    """Give every adapter PEFT's starting values: A uniform in +-1/sqrt(in) (kaiming_uniform, a = sqrt 5), B zero.

    A is drawn whole on the CPU from (seed, Hugging Face name), and each rank keeps its rows: equal on any number.
    """
    for _, adapter in modules(model, LoraAdapter):
        bound = adapter.lora_A.shape[1] ** -0.5
        drawn = torch.empty(adapter.lora_A.shape, dtype=torch.float32, device="cpu")
        drawn.uniform_(-bound, bound, generator=generator(seed, f"{adapter.name}.lora_A.weight"))
        keep(drawn, adapter.lora_A, local_rows)
        local_rows(adapter.lora_B)[0].zero_()


def adapter_tensors(model: nn.Module) -> dict[str, Saved]:
    """Every tensor of PEFT's adapter_model.safetensors -> the rows of our parameter that hold it."""
    table: dict[str, Saved] = {}
    for path, adapter in modules(model, LoraAdapter):
        for matrix, rows in (("lora_A", adapter.lora_A.shape[0]), ("lora_B", adapter.lora_B.shape[0])):
            table[f"{PREFIX}{adapter.name}.{matrix}.weight"] = Saved(f"{path}.{matrix}", 0, rows)
        if adapter.bias is not None:  # peft keeps it in the layer that its own one wraps
            table[f"{PREFIX}{adapter.name}.base_layer.bias"] = Saved(f"{path}.bias", 0, adapter.bias.shape[0])
    parameters = dict(model.named_parameters())
    learning = {name: pieces for name, pieces in layout(model).items() if parameters[name].requires_grad}
    copies = {ours: pieces for kind in (SavedPart, TrainedBias) for ours, pieces in _copies(model, kind).items()}
    for ours, pieces in (learning | copies).items():
        table |= {PREFIX + piece.name: Saved(ours, piece.start, piece.stop) for piece in pieces}
    for shared, own in ties(model).items():
        if own in learning:
            table[PREFIX + shared] = Saved(own, 0, parameters[own].shape[0])
    return table


def saved_layout(model: nn.Module) -> dict[str, tuple[Piece, ...]]:
    """Our name of each parameter that is a copy -> the Hugging Face tensor it starts from; `layout` has the others."""
    return _copies(model, SavedPart) | _copies(model, TrainedBias) | _copies(model, LoraAdapter)


def _copies(
    model: nn.Module, kind: type[SavedPart] | type[TrainedBias] | type[LoraAdapter]
) -> dict[str, tuple[Piece, ...]]:
    return {
        f"{path}.{name}": (Piece(f"{copy.name}.{name}", 0, parameter.shape[0]),)
        for path, copy in modules(model, kind)
        for name, parameter in copy.named_parameters(recurse=False)
        if name in {"weight", "bias"}
    }


def _bias_problems(model: nn.Module, settings: LoraSettings, selection: Selection) -> Iterator[str]:
    if settings.bias not in {"all", "lora_only"}:
        return
    have = [name for name, layer, _ in linear_parts(model) if layer.bias is not None]
    if not have:
        yield f"bias: {settings.bias}, and this model has none (config.json: attention_bias, mlp_bias); leave it out"
    elif settings.bias == "lora_only" and not set(have) & set(selection.adapted):
        yield "bias: lora_only, and no layer of target_modules has one in this model; leave it out, or give all"
    elif settings.bias == "all" and set(have) & set(selection.saved):
        yield (
            "bias: all, and a layer with a bias is in modules_to_save, whose bias trains anyway; peft names it "
            "otherwise then: give lora_only, or take the layer out"
        )


def _fp32_copy(parameter: Tensor, part: Part) -> nn.Parameter:
    return nn.Parameter(parameter.detach()[part.start : part.stop].to(torch.float32, copy=True))
