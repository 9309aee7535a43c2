"""CONFIG.yaml: the same names and rules as flags, and file and line in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from packtrain.configs.parse import parse
from packtrain.configs.run import RunConfig
from packtrain.errors import UserError


def read(tmp_path: Path, text: str | bytes, *flags: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse([str(file), "--model_name", "M", *flags])


def problems(tmp_path: Path, text: str | bytes, *flags: str) -> list[str]:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, *flags)
    return [problem.removeprefix(f"{tmp_path}/") for problem in error.value.problems]


@pytest.mark.parametrize(
    ("text", "dotted", "value"),
    [
        ("lr: 1e-4", "train_config.lr", 1e-4),
        ("lr: 1", "train_config.lr", 1.0),
        ("train_config:\n  lr: 1e-4", "train_config.lr", 1e-4),
        ("train_config: {lr: 1e-4}", "train_config.lr", 1e-4),
        ("train_config.lr: 1e-4", "train_config.lr", 1e-4),
        ("pure_bf16: true", "fsdp_config.pure_bf16", True),
        ("fsdp_config:\n  pure_bf16: True", "fsdp_config.pure_bf16", True),
        ("use_peft: true\nr: 4", "lora_config.r", 4),
        ("lora_config:\n  target_modules: [q_proj, 'v_proj']", "lora_config.target_modules", ("q_proj", "v_proj")),
        ("lora_config:\n  target_modules:\n  - q_proj\n  - v_proj", "lora_config.target_modules", ("q_proj", "v_proj")),
        ("lora_config:\n  target_modules: q_proj,v_proj", "lora_config.target_modules", ("q_proj", "v_proj")),
        ("lora_config:\n  target_modules: '.*(q|v)_proj'", "lora_config.target_modules", ".*(q|v)_proj"),
        ("lora_config:\n  target_modules: all-linear", "lora_config.target_modules", "all-linear"),
        ("lora_config:\n  modules_to_save: []", "lora_config.modules_to_save", ()),
        ("lora_config:\n  modules_to_save:", "lora_config.modules_to_save", ()),
        ("tokenizer_name: '123'", "train_config.tokenizer_name", "123"),
        ("tokenizer_name: 123", "train_config.tokenizer_name", "123"),
        ("tokenizer_name: null", "train_config.tokenizer_name", None),
        ("tokenizer_name: ~", "train_config.tokenizer_name", None),
        ("tokenizer_name: None", "train_config.tokenizer_name", None),
        ("tokenizer_name:", "train_config.tokenizer_name", None),
        ("output_dir: 2024-01-01", "train_config.output_dir", "2024-01-01"),
        ("output_dir: |-\n  a b", "train_config.output_dir", "a b"),
        ("output_dir: \N{GREEK SMALL LETTER ALPHA}", "train_config.output_dir", "\N{GREEK SMALL LETTER ALPHA}"),
        ("hsdp: true", "fsdp_config.sharding_strategy", "HYBRID_SHARD"),
        ("mixed_precision: false", "fsdp_config.mixed_precision", False),
        ("context_length: 1_024", "train_config.context_length", 1024),
        ("dataset: grammar_dataset\ntrain_split: a.csv", "grammar_dataset.train_split", "a.csv"),
        ("\ufefflr: 2", "train_config.lr", 2.0),
        ("--- # comment\nlr: 2 # rate", "train_config.lr", 2.0),
        ("lora_config:\nlr: 2", "train_config.lr", 2.0),
        ("", "train_config.lr", 1e-4),
        ("# nothing yet\n", "train_config.lr", 1e-4),
    ],
)
def test_a_file_says_the_same_as_flags(tmp_path: Path, text: str, dotted: str, value: object) -> None:
    got = read(tmp_path, text).get(dotted)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nlrr: 3", "run.yaml:2: lrr: no such setting; did you mean lr?"),
        ("lora_config:\n\n  rr: 3", "run.yaml:3: rr: no such setting; did you mean lora_config.r?"),
        ("lora_confg:\n  r: 3", "run.yaml:1: lora_confg: no such setting; did you mean lora_config?"),
        ("lora_config: 3", "run.yaml:1: lora_config: expected settings, `name: value` a line, found '3'"),
        ("lora_config: [r]", "run.yaml:1: lora_config: expected settings, `name: value` a line, found a list"),
        ("lora_config:\n  r:\n    x: 3", "run.yaml:2: r: expected a whole number, found a dict"),
        ("seed: 1\nlr: abc", "run.yaml:2: lr: expected a number, found 'abc'"),
        ("lr: '1e-4'", "run.yaml:1: lr: expected a number, found the quoted text '1e-4'"),
        ("lr: .inf", "run.yaml:1: lr: expected a number, found '.inf'"),
        ("lr:", "run.yaml:1: lr: expected a number, found None"),
        ("lr: [1]", "run.yaml:1: lr: expected a number, found a list"),
        ("seed: 2.0", "run.yaml:1: seed: expected a whole number, found '2.0'"),
        ("use_peft: yes", "run.yaml:1: use_peft: expected true or false, found 'yes'"),
        ("use_peft: 'true'", "run.yaml:1: use_peft: expected true or false, found the quoted text 'true'"),
        ("batching_strategy: pack", "run.yaml:1: batching_strategy: expected one of packing, padding, found 'pack'"),
        ("lora_config:\n  target_modules: [[a]]", "run.yaml:2: target_modules: expected a list of names or a regular"),
        # out of range, and at odds
        ("seed: 1\n\nlr: -1", "run.yaml:3: lr: expected a number above 0, found -1.0"),
        ("lora_config:\n  lora_dropout: 1", "run.yaml:2: lora_dropout: expected 0 or more, and less than 1, found 1.0"),
        (
            "deterministic: true",
            "run.yaml:1: deterministic: forcing bit-exact kernels comes with a later version (found T",
        ),
        ("hsdp: true\nsharding_strategy: NO_SHARD", "run.yaml:1: hsdp: means HYBRID_SHARD, while "),
        ("r: 4", "run.yaml:1: r: belongs to lora_config (--use_peft --peft_method lora)"),
        # said twice
        ("lr: 1\nseed: 1\nlr: 2", "run.yaml:3: lr: says again what line 1 says; expected one of the two"),
        ("lora_config:\n  r: 1\n  r: 2", "run.yaml:3: r: says again what line 2 says; expected one of the two"),
        ("lora_config: {}\nlora_config: {}", "run.yaml:2: lora_config: says again what line 1 says; expected one of"),
        ("lr: 1\ntrain_config:\n  lr: 2", "run.yaml:3: lr: says again what "),
        # not a file of settings
        ("- lr", "run.yaml:1: the file: expected settings, `name: value` a line, found a list"),
        ("just words", "run.yaml:1: the file: expected settings, `name: value` a line, found 'just words'"),
        ("? [a]\n: 3", "run.yaml:1: expected a setting's name, found a list"),
        ("lr: 1\n---\nlr: 2", "run.yaml:2: not valid YAML: but found another document"),
        ("seed: 1\nlr: [1", "run.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n\tlr: 1", "run.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("lr: 1\n  seed: 1", "run.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("lr: 'a", "run.yaml:1: not valid YAML: found unexpected end of stream"),
        ("seed: 1\nnotes: \x01", "run.yaml:2: not valid YAML: the character U+0001 may not stand there"),
        (b"seed: 1\nnotes: \xff", "run.yaml:2: not UTF-8 (byte 0xff); save the file as UTF-8"),
        ("lr: 1".encode("utf-16"), "run.yaml:1: not UTF-8 (byte 0xff); save the file as UTF-8"),
        (b"#" * (2**20 + 1), "run.yaml: has 1,048,577 bytes, more than any settings need"),
        # what YAML can do and settings need not
        ("lr: !!float 1", "run.yaml:1: !!float: tags are not read here; write the value alone"),
        ("lr: !!python/object/apply:os.system [ls]", "run.yaml:1: !!python/object/apply:os.system: tags are not read"),
        ("!mine\nlr: 1", "run.yaml:1: !mine: tags are not read here; write the value alone"),
        ("a: &x {r: 1}\nlora_config: *x", "run.yaml:2: *x: aliases are not read here; write the value out"),
        ("a: &x {r: 1}\nlora_config:\n  <<: *x", "run.yaml:3: *x: aliases are not read here; write the value out"),
        ("<<: {lr: 1}", "run.yaml:1: <<: no such setting"),
        ("lr: " + "[" * 5000, "run.yaml:1: nested too deeply; expected sections, their settings, and lists of names"),
    ],
)
def test_every_mistake_names_file_and_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = problems(tmp_path, text)
    assert any(problem.startswith(said) for problem in found), found
    assert len(found) == 1, found


def test_a_bomb_of_aliases_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (problem,) = problems(tmp_path, "\n".join(lines))
    assert problem.startswith("run.yaml:2: *a0: aliases are not read here")


def test_all_problems_of_file_and_flags_come_in_one_message(tmp_path: Path) -> None:
    text = "lr: abc\nbogus: 1\nlora_config:\n  r: 0\n  r: 1\nnum_epochs: 0\n"
    found = problems(tmp_path, text, "--seed", "x", "--zzzzzz")
    starts = ("run.yaml:1: lr", "run.yaml:2: bogus", "run.yaml:4: r", "run.yaml:5: r", "run.yaml:6: num_epochs")
    for start in (*starts, "--seed", "--zzzzzz"):
        assert sum(problem.startswith(start) for problem in found) == 1, (start, found)
    assert len(found) == 7


def test_a_name_for_several_fields_gives_way_to_one_for_a_single_field(tmp_path: Path) -> None:
    for text in (
        "dataset: synthetic_dataset\nseed: 1\nsynthetic_dataset:\n  seed: 2\n",
        "dataset: synthetic_dataset\nsynthetic_dataset:\n  seed: 2\nseed: 1\n",
    ):
        cfg = read(tmp_path, text)
        assert (cfg.train_config.seed, cfg.synthetic_dataset.seed) == (1, 2)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    cfg = read(tmp_path, "lr: 1\nlora_config:\n  r: 4\n", "--lr", "2", "--lora_config.r", "8")
    assert (cfg.train_config.lr, cfg.lora_config.r) == (2.0, 8)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse([str(tmp_path / "no.yaml")])
    assert error.value.problems == [f"{tmp_path}/no.yaml: there is no such file; expected a CONFIG.yaml"]
    (tmp_path / "dir.yaml").mkdir()
    with pytest.raises(UserError) as error:
        parse([str(tmp_path / "dir.yaml"), "--lr", "-1"])
    assert error.value.problems == [
        f"{tmp_path}/dir.yaml: cannot be read (Is a directory); expected a CONFIG.yaml",
        "--lr: expected a number above 0, found -1.0",
    ]


def test_secrets_in_a_file_are_not_echoed(tmp_path: Path) -> None:
    secret = "hf_QwErTyUiOpAsDfGhJk"
    for text in (f"lr: {secret}", f"{secret}: 1", f"hf_token: {secret}", f"lr: *{secret}", f"lr: [{secret}"):
        assert secret not in "\n".join(problems(tmp_path, text))
