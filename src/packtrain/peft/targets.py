"""Which of a model's modules a LoRA adapts, and which it trains whole.

    select    settings -> Hugging Face module names, with a sentence for each name that cannot be followed
    ties      tensors that share another one's parameter (the head of a tied model)

Names match as in PEFT, for the adapter's own file says them again to PEFT: a target is a whole name or what follows a
dot in one, a module to save is any end of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from packtrain.model.linear import layout, linear_parts
from packtrain.peft.settings import ALL_LINEAR, LoraSettings

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Selection:
    """Hugging Face module names, in the model's order."""

    adapted: tuple[str, ...]
    """Linear layers that get a LoRA."""
    saved: tuple[str, ...]
    """Layers trained whole and saved with the adapter."""


def select(model: nn.Module, settings: LoraSettings) -> tuple[Selection, list[str]]:
    """What `settings` mean on this model (meta or not), and all that is wrong with them."""
    layers = _layers(model)
    linears = [name for name, _, _ in linear_parts(model)]
    saved, problems = _saved(layers, settings.modules_to_save)
    problems += _torn_ties(model, saved)
    if isinstance(settings.target_modules, str):
        adapted, wrong = _by_pattern(layers, linears, saved, settings.target_modules)
    else:
        adapted, wrong = _by_name(linears, settings.target_modules)
    problems += wrong
    if both := [name for name in adapted if name in saved]:
        problems.append(
            f"target_modules and modules_to_save both name {_listed(_last_words(both))}; "
            "a layer is adapted or trained whole: take it out of one of them"
        )
    return Selection(tuple(adapted), tuple(saved)), problems


def ties(model: nn.Module) -> dict[str, str]:
    """Hugging Face name of each linear weight that is another module's -> our name of the parameter it shares."""
    held = {piece.name for pieces in layout(model).values() for piece in pieces}
    ours = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {f"{name}.weight": layer.weight for name, layer, _ in linear_parts(model)}
    return {name: ours[id(weight)] for name, weight in weights.items() if name not in held}


def _layers(model: nn.Module) -> list[str]:
    """Every module with parameters, by Hugging Face's name, a tied head too."""
    names = [piece.name.rpartition(".")[0] for pieces in layout(model).values() for piece in pieces]
    names += [name for name, _, _ in linear_parts(model)]
    return list(dict.fromkeys(names))


def _containers(layers: Iterable[str]) -> list[str]:
    """The modules around `layers`: self_attn, mlp, layers.0, ..."""
    found: dict[str, None] = {}
    for name in layers:
        words = name.split(".")
        found |= dict.fromkeys(".".join(words[:end]) for end in range(1, len(words)))
    return list(found)


def _by_name(linears: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    def hits(target: str) -> list[str]:
        return [name for name in linears if name == target or name.endswith(f".{target}")]

    found = {target: hits(target) for target in targets}
    problems = [
        f"target_modules: {target!r} matches no linear layer{_nearest(target, linears)}; "
        f"there are {_listed(_last_words(linears))}"
        for target, names in found.items()
        if not names
    ]
    wanted = {name for names in found.values() for name in names}
    return [name for name in linears if name in wanted], problems


def _by_pattern(
    layers: Sequence[str], linears: Sequence[str], saved: Sequence[str], pattern: str
) -> tuple[list[str], list[str]]:
    if pattern.lower() == ALL_LINEAR:
        return [name for name in linears if name != HEAD and name not in saved], []
    try:
        regex = re.compile(pattern)
    except re.error as error:
        return [], [f"target_modules: {pattern!r} is no regular expression ({error})"]
    found = [name for name in linears if regex.fullmatch(name)]
    if not found:
        hint = f"; a plain name goes into a list: [{pattern}]" if re.fullmatch(r"[\w.]+", pattern) else ""
        example = linears[0] if linears else "none"
        return [], [
            f"target_modules: the regex {pattern!r} matches no whole name of a linear layer (such as {example}){hint}; "
            f"there are {_listed(_last_words(linears))}"
        ]
    # transformers' tree also has modules without parameters that our names do not show
    bare = ["model.rotary_emb", *(f"{name}.act_fn" for name in _containers(layers) if name.endswith(".mlp"))]
    others = [name for name in (*layers, *_containers(layers), *bare) if name not in linears and regex.fullmatch(name)]
    if others:
        return found, [
            f"target_modules: the regex {pattern!r} also matches {_listed(others)}, no linear layer, and peft refuses "
            r"to load such an adapter; make it narrower, for example by ending it in (q|v)_proj"
        ]
    return found, []


def _saved(layers: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    modules = [*layers, *_containers(layers)]
    found = {target: [name for name in modules if target and name.endswith(target)] for target in targets}
    problems = [
        f"modules_to_save: {target!r} matches no module{_nearest(target, layers)}; "
        f"there are {_listed(_last_words(layers))}"
        for target, names in found.items()
        if not names
    ]
    roots = {name for names in found.values() for name in names}
    return [name for name in layers if name in roots or any(name.startswith(f"{root}.") for root in roots)], problems


def _torn_ties(model: nn.Module, saved: Sequence[str]) -> list[str]:
    problems = []
    for shared, own in ties(model).items():
        pair = [name.rpartition(".")[0] for name in (own, shared)]
        if len(named := [name for name in pair if name in saved]) == 1:
            words = ",".join(_last_words(pair))
            problems.append(
                f"modules_to_save: {named[0]} shares its weight with {(set(pair) - set(named)).pop()} in this model "
                f"(tie_word_embeddings); name both ({words}), and the one weight is trained and saved under both names"
            )
    return problems


def _last_words(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, [*_last_words(known), *known], n=1, cutoff=0.5)
    return f" (nearest: {close[0]})" if close else ""


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
