"""What holds for the whole of the source, read as syntax trees: nothing here runs a line of it.

who may import whom, and what some rooms must not know
every setting is read by something
sizes, docstrings, swallowed errors
the README's commands are commands
"""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from packtrain.cli import COMMANDS, LATER, RUN_COMMANDS
from packtrain.configs import support
from packtrain.configs.parse import parse
from packtrain.configs.run import FIELDS

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
    "finetuning",
    "preflight",
    "commands",
    "cli",
    "__main__",
)
"""From the ground up: a room imports itself and what stands before it."""

UNKNOWN = {
    "model": {"torch.distributed", "packtrain.distributed", "packtrain.configs", "pathlib", "os"},
    "kernels": {"torch.distributed", "packtrain.configs", "pathlib", "os"},
    "peft": {"torch.distributed", "packtrain.distributed", "packtrain.configs"},
    "distributed": {"packtrain.configs"},
    "data": {"packtrain.model", "packtrain.peft", "packtrain.distributed", "packtrain.configs"},
    "train/step": {"packtrain.configs", "time", "packtrain.log"},
    "configs": {"torch", "transformers", "numpy"},
    "errors": {"torch"},
    "log": {"torch"},
}
"""Beyond the order: what a room, or a file, must not know."""

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


def later_or_restated() -> set[str]:
    """Settings that nothing reads yet, or ever: those that the tables of support.py answer for."""
    waiting = {name for row in support.LATER if not row.values for name in row.fields}
    inactive = {dotted for dotted in FIELDS if dotted.split(".")[0] in waiting_sections()}
    return waiting | inactive | set(support.RESTATES) | set(support.VISION)


def waiting_sections() -> set[str]:
    """Sections of what is not built yet."""
    asked = {value for row in support.LATER for value in row.values}
    sections = {f"{value}_config" for value in asked} | asked
    sections |= {
        f"{name.split('.')[1].removeprefix('use_')}_config"
        for row in support.LATER
        if not row.values
        for name in row.fields
    }
    return sections


def reads(path: Path, section: str, field: str) -> bool:
    """Whether a file reads a setting: as `....section.field`, through a name that `....section` was given to, or by
    its dotted name; a data set's section goes by other names in data/."""
    tree = tree_of(path)
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == section
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names |= {  # a, b = cfg.train_config, ...
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
        for name, value in zip(node.targets[0].elts, node.value.elts, strict=False)
        if isinstance(name, ast.Name) and isinstance(value, ast.Attribute) and value.attr == section
    }
    if section.endswith("_dataset") and path.parent.name == "data":
        names |= {"config"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == field:
            owner = node.value
            if (isinstance(owner, ast.Attribute) and owner.attr == section) or (
                isinstance(owner, ast.Name) and owner.id in names
            ):
                return True
        if isinstance(node, ast.Constant) and node.value == f"{section}.{field}":
            return True
        if isinstance(node, ast.Constant) and node.value == field and "config" in names:
            return True
    return False


def reading() -> list[Path]:
    """Files in which a read is a use: not those of configs/ that check, list and print, but for parse.py, which
    derives one setting from another."""
    return [p for p in FILES if room_of(p) != "configs" or p.name == "parse.py"]


def test_every_setting_is_read_by_something() -> None:
    unread = [
        dotted
        for dotted in FIELDS
        if dotted not in later_or_restated() and not any(reads(path, *dotted.split(".")) for path in reading())
    ]
    assert unread == []


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
        f"{path}:{i}: {len(s)} columns" for path, text in lines.items() for i, s in enumerate(text, 1) if len(s) > WIDTH
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
    silent = [text for path in FILES for text in without_docstring(tree_of(path), path.relative_to(SOURCE).as_posix())]
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


def commands_in(text: str) -> list[list[str]]:
    """Words of every packtrain, torchrun and make command in a text's code blocks; comments and prompts left out."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words and words[0].rpartition("/")[2] in ("packtrain", "torchrun", "make"):
                found.append([words[0].rpartition("/")[2], *words[1:]])
    return found


def check_command(words: list[str]) -> None:
    """Raises where a command would not be understood. Files that only the reader has need not be there."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(rest) <= set(targets), rest
        return
    if program == "torchrun":
        script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert (ROOT / rest[script]).is_file(), rest[script]
        command, rest = "train", rest[script + 1 :]
    else:
        command, *rest = rest
        if command in ("--version", "--help"):
            return
        assert command in COMMANDS, f"{command} ({'later' if command in LATER else 'unknown'})"
    if command in RUN_COMMANDS and "--help" not in rest:
        theirs = [word for word in rest[:1] if word.endswith((".yaml", ".yml")) and not (ROOT / word).is_file()]
        parse([*rest[len(theirs) :], *(["--model_name", "DIR"] if theirs else [])])


def test_readme_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    found = commands_in(readme.read_text(encoding="utf-8"))
    assert {words[0] for words in found} >= {"packtrain", "torchrun", "make"}
    for words in found:
        check_command(words)


def test_a_wrong_command_is_noticed() -> None:
    (words,) = commands_in(
        "```bash\n$ CUDA_VISIBLE_DEVICES=0 .venv/bin/packtrain train --model_name DIR \\\n --lrr 1\n```"
    )
    assert words == ["packtrain", "train", "--model_name", "DIR", "--lrr", "1"]
    with pytest.raises(Exception, match="lrr"):
        check_command(words)
    with pytest.raises(AssertionError, match="later"):
        check_command(["packtrain", "chat"])
