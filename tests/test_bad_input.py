"""Bad input ends in exit code 2 and one clean message within seconds, before any model is built.

Every case of broken.py runs in this process; a few run again as the commands that users type, where time counts too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import packtrain
import tiny
from broken import CASES, Case, Home
from packtrain import cli, finetuning
from packtrain.errors import EXIT_USER, UserError

REPOSITORY = Path(__file__).parent.parent
RECIPE = REPOSITORY / "getting-started" / "finetuning" / "finetuning.py"
SECONDS, QUIET = 10.0, 2.0
"""How long a user waits for the message at most, on a machine whose load is below QUIET."""


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's and an adapter's folder, to copy from."""
    model = tiny.model(tmp_path_factory.mktemp("model"))
    return model, tiny.adapter(tmp_path_factory.mktemp("adapter"), model)


@pytest.fixture
def home(tmp_path: Path, originals: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Home:
    """A run that is right, in which no model can be built."""
    made = Home(tmp_path, tmp_path / "model", tmp_path / "adapter")
    for original, copy in zip(originals, (made.model, made.adapter), strict=True):
        shutil.copytree(original, copy)
    tiny.grammar(made.train, 40)
    tiny.grammar(made.validation, 4)
    monkeypatch.setattr(finetuning, "build", _no_model)
    return made


def _no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model was built")


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> Answer:
    """The `packtrain` command in this process."""
    capsys.readouterr()
    return Answer(cli.main(argv), *capsys.readouterr())


def check(case: Case, home: Home, answer: Answer) -> None:
    """The message is clean and says what it must; result.json says the same."""
    lines = answer.err.splitlines()
    assert answer.code == EXIT_USER
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert sum(line.startswith("packtrain: ") for line in lines) == 1
    assert len(lines) == len(set(lines)), "something is said twice"
    assert all(words in answer.err for words in case.words), answer.err
    if case.record:
        result = home.result()
        assert result is not None
        assert (result["status"], result["step"]) == ("failed", 0)
        assert all(line in answer.err for line in result["reason"].splitlines())
        assert all(words in result["reason"] or words.endswith("wrong:") for words in case.words)


@pytest.mark.parametrize("name", CASES)
def test_one_clean_message(
    name: str, home: Home, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    answer = run(["train", *home.argv(case.break_it(home))], capsys)
    said = answer.err.partition("packtrain: ")[2].removeprefix("several things are wrong:\n")
    first = said.partition("\n")[0]
    record_property("said", said)
    record_property("M8", f"{int(any(words in first for words in case.words))} of 1")
    check(case, home, answer)


def test_what_is_right_is_not_refused(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", *home.argv(None)], capsys).code == 0
    assert run(["check", *home.argv({"from_peft_checkpoint": home.adapter})], capsys).code == 0
    with pytest.raises(AssertionError, match="a model was built"):
        cli.main(["train", *home.argv(None)])


UNGUARDED: dict[str, tuple[str, Any]] = {
    "tensor_missing": ("packtrain.checkpoint.folder.HfFolder.problems", lambda *_: []),
    "target_matches_nothing": ("packtrain.peft.lora.problems", lambda *_: []),
    "adapter_of_another_model": ("packtrain.adapters.adapter_problems", lambda *_: []),
    "list_in_jsonl": ("packtrain.data.tokens._refuse", lambda *_, **__: None),
    "missing_column": ("packtrain.data.sources._checked", lambda table, *_: table),
    "bad_json_line": ("packtrain.data.tokens._refuse", lambda *_, **__: None),
    "not_utf8": ("packtrain.data.files._text", lambda path, _: path.read_text("latin-1")),
    "empty_answer": ("packtrain.data.tokens._refuse", lambda *_, **__: None),
    "every_row_too_long": ("packtrain.data.tokens._untrainable", lambda *_: ""),
    "custom_rows_teach_nothing": ("packtrain.data.tokens._untrainable", lambda *_: ""),
    "ids_beyond_the_vocabulary": ("packtrain.data.tokens._unknown", lambda *_: ""),
    "too_few_rows_for_validation": ("packtrain.data.sources._alpaca_part", lambda table, *_: table),
    "shard_missing": ("packtrain.checkpoint.folder.HfFolder.problems", lambda *_: []),
    "hubs_weights_flipped": ("packtrain.checkpoint.folder.HfFolder.damaged", lambda *_: []),
    "weights_cut_short": ("packtrain.checkpoint.folder.HfFolder.problems", lambda *_: []),
    "config_of_another_size": ("packtrain.checkpoint.folder.HfFolder.problems", lambda *_: []),
    "folder_in_use": ("packtrain.checkpoint.store._living_owner", lambda *_: None),
}
"""Case -> the guard that it needs, and what stands in its place when it is off."""


@pytest.mark.parametrize("name", UNGUARDED)
def test_without_its_guard_a_case_fails(
    name: str, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(*UNGUARDED[name])
    with pytest.raises((AssertionError, UserError, LookupError)):
        test_one_clean_message(name, home, capsys, lambda *_: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian --lr 1", "packtrain trian: no such command; did you mean train?"),
        ("xyz", "packtrain xyz: no such command; there are train, demo, data, check"),
        ("--lr 1", "--lr: expected a command before it: packtrain train --lr ..."),
        ("run.yaml", "run.yaml: expected a command before it: packtrain train run.yaml ..."),
        ("report --output_dir x", "packtrain report: comes with a later version; there are train, demo"),
        ("check --lr fast", "--lr: expected a number, found 'fast'"),
        ("data", "--model_name: expected a model's folder or hub id, found none"),
        ("generate --promt hello", "--promt: no such flag; did you mean --prompt?"),
        ("generate --prompt hello", "--model_name: missing; expected a Hugging Face folder or a hub id"),
    ],
)
def test_commands(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(words.split(), capsys)
    assert (answer.code, answer.out) == (EXIT_USER, "")
    assert said in answer.err
    assert answer.err.count("\n") == 1 or "several" in answer.err


def test_looking_at_data_asks_nothing_of_the_output(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.out.write_text("")
    assert run(["data", *home.argv(None)], capsys).code == 0
    assert run(["check", *home.argv(None)], capsys).code == EXIT_USER


def test_a_message_does_not_wait_for_the_hub(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    hub = {"dataset": "samsum_dataset", "grammar_dataset__train_split": None, "grammar_dataset__test_split": None}
    answer = run(["train", *home.argv(hub | {"model_name": home.folder / "nowhere"})], capsys)
    assert "nowhere: no such folder" in answer.err
    assert "samsum" not in answer.err


def test_from_python_all_problems_come_in_one_error(home: Home) -> None:
    with pytest.raises(UserError) as caught:
        packtrain.finetune(model_name=str(home.model), learning_rate="fast", sede=1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["learning_rate", "sede"]
    home.train.write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        packtrain.finetune(
            model_name=str(home.model),
            dataset="grammar_dataset",
            output_dir=str(home.out),
            grammar_dataset={"train_split": str(home.train), "test_split": str(home.validation)},
        )


def test_result_json_tells_the_last_failure_to_start_and_keeps_a_run(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["train", *home.argv({"lr": "fast"})], capsys)
    run(["train", *home.argv({"model_name": home.folder / "nowhere"})], capsys)
    assert "no such folder" in (home.result() or {})["reason"]
    assert [path.name for path in home.out.iterdir()] == ["run"]
    (home.out / "run" / "metrics.jsonl").write_text("")
    run(["train", *home.argv({"lr": "fast"})], capsys)
    assert "no such folder" in (home.result() or {})["reason"], "a run that began keeps its own word"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _torchrun() -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc_per_node=2",
        f"--master_port={_free_port()}",
        str(RECIPE),
    ]


PACKTRAIN = ["-m", "packtrain", "train"]


@pytest.mark.parametrize(
    ("name", "command", "code"),
    [
        ("unknown_flag", PACKTRAIN, EXIT_USER),
        ("yaml_syntax", PACKTRAIN, EXIT_USER),
        ("everything_at_once", [str(RECIPE)], EXIT_USER),
        ("shard_missing", [*PACKTRAIN, "--nproc_per_node", "2"], EXIT_USER),
        ("misspelt_flag", None, 1),
        ("missing_column", None, 1),
    ],
    ids=lambda value: "torchrun" if value is None else None,
)
def test_as_typed(name: str, command: list[str] | None, code: int, home: Home) -> None:
    """None: torchrun with two workers, whose agent ends in 1 whatever its workers' exit code is."""
    case = CASES[name]
    flags = home.argv(case.break_it(home))
    at = flags.index("--nproc_per_node")
    del flags[at : at + 2]
    began, load = time.monotonic(), os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, *(command or _torchrun()), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=home.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seconds, load = time.monotonic() - began, max(load, os.getloadavg()[0])
    print(f"{name}: {seconds:.1f} s at a load of {load:.1f}")
    ours, theirs = done.stderr, ""
    if command is None:  # the agent has its own last word, with a traceback of itself
        ours, _, theirs = ours.partition("Traceback (most recent call last)")
        ours = "".join(line for line in ours.splitlines(keepends=True) if "torch/distributed/elastic" not in line)
        assert "ChildFailedError" in theirs
    assert done.returncode == code
    check(case, home, Answer(EXIT_USER, done.stdout, ours))
    assert "packtrain: " not in theirs
    assert "Traceback" not in theirs
    assert seconds < SECONDS or load > QUIET
