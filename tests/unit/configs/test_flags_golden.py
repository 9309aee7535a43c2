"""tests/golden/flags.txt: every flag, its type, its default and what obeys it. Who changes a flag changes this file.

python tests/unit/configs/test_flags_golden.py     writes it anew
"""

from __future__ import annotations

from pathlib import Path

from packtrain.configs.run import RunConfig, fields_of
from packtrain.configs.support import status

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "flags.txt"


def lines() -> list[str]:
    """section.name  type  default  obeyed | restates | later | refused"""
    return [
        f"{row.section}.{row.name}  {row.type}  {row.default!r}  {status(f'{row.section}.{row.name}')}"
        for row in fields_of(RunConfig())
    ]


def test_the_flags_are_those_of_the_golden_file() -> None:
    written = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert lines() == written, f"if that is meant: python {Path(__file__).name}, and docs/migrating.md if a flag went"


if __name__ == "__main__":
    GOLDEN.write_text("\n".join([*lines(), ""]), encoding="utf-8")
