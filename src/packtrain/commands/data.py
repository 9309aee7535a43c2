"""`packtrain data FLAGS`: what a run would train on: rows, tokens, and which of them are trained.

The first rows are shown as the model will see them: what is trained in green, what it only reads dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from packtrain import log, preflight
from packtrain.configs.run import RunConfig
from packtrain.data.audit import pairs
from packtrain.errors import EXIT_DONE

SHOWN = 3


def run(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Read and check the data as the run would. Raises UserError with every problem."""
    found = preflight.examine(cfg, writes=False)
    for line in found.lines():
        log.say(line)
    tokens, tokenizer = found.inputs.train, found.inputs.tokenizer
    console = Console(highlight=False)
    for row in range(min(SHOWN, tokens.rows)):
        ids, labels = tokens.row(row)
        console.print(f"\n{tokens.where(row)}: {len(ids)} tokens", style="bold")
        if tokenizer is None:
            console.print(" ".join(str(i) for i in ids))
            continue
        shown = Text()
        for text, trained in pairs(ids.tolist(), labels.tolist(), tokenizer):
            shown.append(text, style="green" if trained else "dim")
        console.print(shown)
    return EXIT_DONE
