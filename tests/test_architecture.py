"""What holds for the whole of the source, read as syntax trees: nothing here runs a line of it.

who may import whom, and what some rooms must not know
every setting is read by something
sizes, docstrings, swallowed errors
the README's commands are commands
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from packtrain.configs import support
from packtrain.configs.parse import build
from packtrain.configs.run import FIELDS, SWITCHES

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "packtrain"
FILES = sorted(SOURCE.rglob("*.py"))
ALL_FILES = [
    p for folder in ("src", "tests", "examples", "getting-started") for p in sorted((ROOT / folder).rglob("*.py"))
]

ROOMS = (
    "log",
    "errors",
    "configs",
    "batch",
    "kernels",
    "model",
    "peft",
    "distributed",
    "data",
    "optim",
    "checkpoint",
    "train",
    "precision",
    "recompute",
    "building",
    "finetuning",
    "adapters",
    "preflight",
    "commands",
    "cli",
    "__main__",
)
"""From the ground up: a room imports itself and what stands before it."""

UNKNOWN = {
    "model": {"torch.distributed", "packtrain.distributed", "packtrain.configs", "pathlib", "safetensors"},
    "kernels": {"torch.distributed", "packtrain.configs"},
    "peft": {"torch.distributed", "packtrain.distributed", "packtrain.configs"},
    "distributed": {"packtrain.configs"},
    "data": {"packtrain.model", "packtrain.peft", "packtrain.distributed", "packtrain.configs"},
    "train/step": {"packtrain.configs", "time", "packtrain.log"},
    "configs": {"torch", "transformers", "numpy"},
    "errors": {"torch"},
    "log": {"torch"},
}
"""Beyond the order: what a room, or a file, must not know."""

DERIVED = {
    "fsdp_config.hsdp": "fsdp_config.sharding_strategy",
    "fsdp_config.fsdp_activation_checkpointing": "train_config.activation_checkpointing",
    "train_config.mixed_precision": "fsdp_config.mixed_precision",
    "fsdp_config.use_fp16": "train_config.use_fp16",
}
"""Settings that configs/parse.py turns into another one."""

WHOLE = {"wandb_config": "train/listeners.py"}
"""Sections that go on as they are to a library -> the file that hands them over."""

MOST_LINES, MOST_LINES_OF_A_FUNCTION, WIDTH = 400, 80, 120


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import below a node: `from a import b` is a.b."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from ((found.lineno, alias.name) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative import"
            yield from ((found.lineno, f"{found.module}.{alias.name}") for alias in found.names)


def guarded(path: Path) -> set[int]:
    """Lines under finetuning.py's `if __name__ == "__main__"`: the one place that may look up."""
    blocks = [n for n in tree_of(path).body if isinstance(n, ast.If) and "__main__" in ast.unparse(n.test)]
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or 0) + 1)}


def upward(path: Path) -> list[str]:
    """Imports of rooms that stand above the file's own."""
    room = room_of(path)
    if room == "__init__":
        return [f"{path.name}:{line}: {name}" for line, name in imports(tree_of(path)) if name.startswith("packtrain")]
    excepted = guarded(path) if room == "finetuning" else set()
    return [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for line, name in imports(tree_of(path))
        if name.startswith("packtrain.")
        and line not in excepted
        and (other := name.split(".")[1]) not in (room, "__version__")
        and ROOMS.index(other) >= ROOMS.index(room)
    ]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ROOMS)


def test_imports_go_one_way() -> None:
    assert [text for path in FILES for text in upward(path)] == []


def test_an_upward_import_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SOURCE", tmp_path)
    (tmp_path / "optim.py").write_text("from packtrain.train.step import train_step\nfrom packtrain import log\n")
    assert upward(tmp_path / "optim.py") == ["optim.py:1: packtrain.train.step.train_step"]


def test_functions_import_nothing_of_ours() -> None:
    inside = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in FILES
        for function in functions(path)
        for line, name in imports(function)
        if name.split(".")[0] == "packtrain"
    ]
    assert inside == []


def test_some_rooms_do_not_know_some_things() -> None:
    known = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in FILES
        for place, things in UNKNOWN.items()
        if place in (room_of(path), path.relative_to(SOURCE).as_posix().removesuffix(".py"))
        for line, name in imports(tree_of(path))
        if any(name == thing or name.startswith(f"{thing}.") for thing in things)
    ]
    assert known == []
    assert "print(" not in (SOURCE / "train" / "step.py").read_text(encoding="utf-8")


def waiting() -> set[str]:
    """Settings that the tables of support.py answer for, and the sections that only those turn on."""
    names = {name for row in support.LATER for name in row.fields} | set(support.RESTATES) | set(support.VISION)
    off = {
        section
        for section, switches in SWITCHES.items()
        for row in support.LATER
        for name in row.fields
        if name.split(".")[1] in switches
    }
    return names | {dotted for dotted in FIELDS if dotted.split(".")[0] in off}


def reads(path: Path) -> set[tuple[str, str]]:
    """(owner, field) of every attribute that a file reads: `cfg.train_config.lr`, and `train.lr` where
    `train = cfg.train_config`. In data/ a section goes by the name of config, and a field also by its text."""
    owners: dict[str, str] = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            owners |= {node.targets[0].id: node.value.attr} if isinstance(node.value, ast.Attribute) else {}
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
            found.add((node.value.attr, node.attr))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((owners.get(node.value.id, node.value.id), node.attr))
        elif isinstance(node, ast.Constant) and room_of(path) == "data":
            found.add(("config", str(node.value)))
    return found


def test_every_setting_is_read_by_something() -> None:
    readers = [path for path in FILES if room_of(path) != "configs" or path.stem == "places"]
    found = {pair for path in readers for pair in reads(path)}
    unread = []
    for dotted in sorted(set(FIELDS) - waiting()):
        if dotted.split(".")[0] in WHOLE:
            continue
        section, name = DERIVED.get(dotted, dotted).split(".")
        if not {(section, name), ("config", name) if section.endswith("_dataset") else (section, name)} & found:
            unread.append(dotted)
    assert unread == []


def test_whole_sections_are_handed_over() -> None:
    for section, file in WHOLE.items():
        assert f'"{section}"' in (SOURCE / file).read_text(encoding="utf-8")


def test_derived_settings_decide_another() -> None:
    for dotted, other in DERIVED.items():
        changed = build(model_name="DIR", **{dotted: not FIELDS[dotted].default})
        assert changed.get(other) != build(model_name="DIR").get(other), dotted


def test_functions_fit_a_screen_and_files_a_head() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{f.lineno}: {f.name} has {f.end_lineno - f.lineno + 1} lines"
        for path in ALL_FILES
        for f in functions(path)
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    lines = {path.relative_to(ROOT): path.read_text(encoding="utf-8").splitlines() for path in ALL_FILES}
    long += [
        f"{path} has {len(text)} lines"
        for path, text in lines.items()
        if path.parts[0] == "src" and len(text) > MOST_LINES
    ]
    long += [
        f"{path}:{i}"
        for path, text in lines.items()
        for i, line in enumerate(text, 1)
        if len(re.sub(r" +# (type: ignore|noqa).*", "", line)) > WIDTH  # as ruff counts
    ]
    assert long == []


def without_docstring(node: ast.Module | ast.ClassDef, where: str) -> Iterator[str]:
    """Public functions and classes, and public methods of those, that say nothing about themselves."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            yield f"{where}:{child.lineno}: {child.name}"
        if isinstance(child, ast.ClassDef):
            yield from without_docstring(child, where)


def test_what_is_public_says_what_it_is() -> None:
    twins = {f.name for path in FILES if room_of(path) == "kernels" for f in functions(path) if ast.get_docstring(f)}
    silent = [
        text
        for path in FILES
        for text in without_docstring(tree_of(path), path.relative_to(SOURCE).as_posix())
        if not (path.stem.endswith("_triton") and text.split()[-1] in twins)  # said where the plain twin is
    ]
    silent += [
        f"{path.relative_to(SOURCE)}" for path in FILES if tree_of(path).body and not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


def test_no_error_is_swallowed() -> None:
    swallowed = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ALL_FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler)
        and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert swallowed == []


def test_test_files_are_no_package_and_have_names_of_their_own() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    assert [path for path in files if path.name == "__init__.py"] == []
    names = Counter(path.name for path in files if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
