"""The same promises where torchrun's agent is the launcher: its restarts work, the first cause is in its table too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[2]
ENTRY = str(ROOT / "getting-started/finetuning/finetuning.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROWS = """\
import os, signal

def get_custom_dataset(config, tokenizer, split):
    rows = [{"input_ids": [0, 5 + n, 6, 1], "labels": [-100, 5 + n, 6, 1]} for n in range(8)]
    return Rows(rows) if split == "train" else rows

class Rows(list):
    pass

def get_data_collator(tokenizer):
    import torch
    calls = []
    def collate(rows):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("bad row")
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return collate
"""


@pytest.mark.slow
def test_its_restarts_begin_anew_and_the_first_cause_is_told(tmp_path: Path) -> None:
    """Rank 1 is killed; the agent starts both again over the same store; then rank 1 raises."""
    tiny.model(tmp_path / "model")
    (tmp_path / "rows.py").write_text(ROWS)
    flags = tiny.flags(
        model_name=tmp_path / "model",
        use_peft=True,
        dataset="custom_dataset",
        custom_dataset__file=tmp_path / "rows.py",
        batch_size_training=1,
        run_validation=False,
        num_epochs=2,
        save_steps=1,
        output_dir=tmp_path / "out",
    )
    agent = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "1", ENTRY, "--enable_fsdp"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *agent, *flags],
        env=ENVIRONMENT,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr
    assert said.count("packtrain: rank 0: another rank is gone") == 1, said
    assert said.count("get_data_collator failed with ValueError: bad row") == 2, said  # said, and in the agent's table
    assert said.count("Traceback (most recent call last)") == 1, said  # the agent's own
    assert "get_data_collator failed with ValueError: bad row" in said[said.index("Root Cause") :]
    result = json.loads((tmp_path / "out/run/result.json").read_text())
    assert (result["status"], result["restarts"]) == ("failed", 1)
    assert result["reason"].endswith("get_data_collator failed with ValueError: bad row")
