"""CONFIG.yaml -> what it says, with the line of each word; or every reason why it cannot be read.

Nothing is constructed: the file's nodes are walked, so no tag can run code and no alias can grow. Scalars stay
text, and `values.py` reads them as it reads flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from packtrain.configs.run import SECTIONS
from packtrain.configs.values import Quoted, Said, brief, shown

_MOST_BYTES = 2**20
_DEEPEST = 8
_NULL = ("", "~", "null", "Null", "NULL", "None")


class _Refused(Exception):
    """Something that YAML allows and a file of settings does not need."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read(file: str) -> tuple[list[Said], list[str]]:
    """(settings, problems) of a file. Each problem begins with FILE:LINE, or FILE where there is no line."""
    try:
        data = Path(file).read_bytes()
    except FileNotFoundError:
        return [], [f"{file}: there is no such file; expected a CONFIG.yaml"]
    except OSError as error:
        return [], [f"{file}: cannot be read ({error.strerror}); expected a CONFIG.yaml"]
    if len(data) > _MOST_BYTES:
        return [], [f"{file}: has {len(data):,} bytes, more than any settings need; expected a CONFIG.yaml"]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return [], [f"{file}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"]
    try:
        root = _Loader(text).get_single_node()
    except _Refused as error:
        return [], [f"{file}:{error.line}: {error}"]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return [], [f"{file}:{line}: not valid YAML: the character U+{error.character:04X} may not stand there"]
    except yaml.MarkedYAMLError as error:
        return [], [_syntax(file, error)]
    return _Walk(file).settings(root)


class _Loader(yaml.SafeLoader):
    """Composes nodes, and stops at tags, aliases and deep nesting before they cost anything."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(line, f"*{brief(str(event.anchor))}: aliases are not read here; write the value out")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(line, f"{brief(tag)}: tags are not read here; write the value alone")
        if self._depth == _DEEPEST:
            raise _Refused(line, "nested too deeply; expected sections, their settings, and lists of names")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _syntax(file: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{file}:{mark.line + 1}" if mark else file
    return f"{place}: not valid YAML: {brief(error.problem or error.context or 'it breaks off')}"


class _Walk:
    """From nodes to settings."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._said: list[Said] = []
        self._problems: list[str] = []

    def settings(self, root: Any) -> tuple[list[Said], list[str]]:
        """Everything below the root: train_config's names and sections."""
        self._mapping(root, None, 1, "the file")
        return self._said, self._problems

    def _mapping(self, node: Any, section: str | None, line: int, what: str) -> None:
        if node is None or _value(node) is None:
            return
        if not isinstance(node, yaml.MappingNode):
            self._problems.append(
                f"{self._file}:{line}: {what}: expected settings, `name: value` a line, found {shown(_value(node))}"
            )
            return
        first: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._problems.append(
                    f"{self._file}:{line}: expected a setting's name, found {shown(_value(key_node))}"
                )
                continue
            key = key_node.value
            where = f"{self._file}:{line}: {brief(key)}"
            if key in first:
                self._problems.append(f"{where}: says again what line {first[key]} says; expected one of the two")
            elif section is None and key in SECTIONS:
                self._mapping(value, key, line, key)
            else:
                self._said.append(Said(f"{section}.{key}" if section else key, _value(value), where, "file"))
            first.setdefault(key, line)


def _value(node: Any) -> object:
    """A node as `values.py` takes it; what is in a mapping does not matter, for no setting is one."""
    if isinstance(node, yaml.MappingNode):
        return {}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if node.style is not None:
        return Quoted(node.value)
    return None if node.value in _NULL else str(node.value)
