"""What a run writes down about itself at its start and its end: run/config.yaml, skipped.jsonl, result.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packtrain.checkpoint.files import write_text
from packtrain.checkpoint.store import ResultFile
from packtrain.configs.run import RunConfig


class Record:
    """Of the rank that `leads`; the others only remember. Further `facts` stand in result.json from the start."""

    def __init__(
        self,
        cfg: RunConfig,
        root: Path,
        *,
        leads: bool,
        fingerprint: Mapping[str, Any],
        skipped: Sequence[Mapping[str, Any]],
        **facts: Any,
    ) -> None:
        self.root, self.run = root, root / "run"
        self._began = time.monotonic()
        self._file: ResultFile | None = None
        self._facts: dict[str, Any] = dict(facts)
        if leads:
            self.run.mkdir(parents=True, exist_ok=True)
            cfg.write(self.run / "config.yaml")
            if skipped:
                write_text(self.run / "skipped.jsonl", "".join(f"{json.dumps(row)}\n" for row in skipped))
            self._file = ResultFile(self.run / "result.json", fingerprint=fingerprint, **facts)

    def note(self, **facts: Any) -> None:
        """Remember facts for the next time the file is written."""
        self._facts |= facts
        if self._file is not None:
            self._file.note(**facts)

    def finish(self, status: str, reason: str | None, **results: Any) -> dict[str, Any]:
        """The last word, written by the leader."""
        results["seconds"] = time.monotonic() - self._began
        if self._file is not None:
            return self._file.finish(status, reason, **results)
        return self._facts | {"status": status, "reason": reason} | results
