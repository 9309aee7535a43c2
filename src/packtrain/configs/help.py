"""The text of --help, made from the sections themselves."""

from __future__ import annotations

from itertools import groupby
from textwrap import fill

from packtrain.configs.run import SECTIONS, RunConfig, activation, fields_of
from packtrain.configs.support import status

_WIDTH = 100
_HEAD = """\
usage: packtrain {command} [CONFIG.yaml] [--flag value ...]

A flag is written --flag value, --flag=value or --section.flag value; one that is true or false
also --flag or --noflag. Lists are a,b or [a,b]. CONFIG.yaml holds the same names under their
section's name, those of train_config at its top level too; flags win over it. A name that several
sections have sets it in each that the run uses.
"""


def help_text(command: str = "train") -> str:
    """Every flag by section, with type, default and what it does."""
    parts = [_HEAD.format(command=command)]
    for section, rows in groupby(fields_of(RunConfig()), key=lambda row: row.section):
        needs = activation(section)
        title = f"{section}{f' (with {needs})' if needs else ''}: {SECTIONS[section].__doc__}"
        parts.append(fill(title, _WIDTH, subsequent_indent="    "))
        for row in rows:
            now = status(f"{section}.{row.name}")
            later = {"later": " Comes with a later version."}.get(now, "")
            parts.append(f"  --{row.name} {row.type} (default {_default(row.default)})")
            parts.append(fill(row.doc + later, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
        parts.append("")
    return "\n".join(parts)


def _default(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "[]"
    return str(value) if value != "" else "''"
