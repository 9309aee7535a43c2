"""--help: complete, in sections, and in the words of the fields."""

from __future__ import annotations

from packtrain.configs.help import help_text
from packtrain.configs.run import FIELDS, RunConfig, fields_of
from packtrain.configs.support import status


def test_every_flag_stands_below_its_section() -> None:
    section, seen = "", []
    for line in help_text("train").splitlines():
        if line.startswith("  --"):
            seen.append(f"{section}.{line.split()[0].removeprefix('--')}")
        elif line[:1].isalpha():
            section = line.split()[0].rstrip(":")
    assert seen == list(FIELDS)


def test_types_defaults_sentences_and_what_comes_later() -> None:
    text = help_text("check")
    flat = " ".join(text.split())
    assert text.startswith("usage: packtrain check [CONFIG.yaml]")
    assert "  --lr FLOAT (default 0.0001)" in text
    assert "  --target_modules NAMES|REGEX (default q_proj,v_proj)" in text
    assert "  --modules_to_save NAMES (default [])" in text
    assert "  --batching_strategy packing|padding (default packing)" in text
    assert "lora_config (with --use_peft --peft_method lora): Low-rank updates" in flat
    for row in fields_of(RunConfig()):
        assert row.doc in flat
    waiting = sum(status(dotted) == "later" for dotted in FIELDS)
    assert flat.count("Comes with a later version.") == waiting
    assert max(len(line) for line in text.splitlines() if not line.startswith("  --")) <= 100
