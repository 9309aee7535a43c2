"""A run with nothing wrong, and a hundred ways to break it; test_bad_input.py runs them all.

    Home     the run: its folders, its flags, and tools that break a part of it
    CASES    name -> what to break, and words that the message about it must hold

A case is a function that breaks one thing and says which flags change: a dict of them (None takes one away), a list
of further words, or None. Its words are what a reader needs: what, where, found, expected, what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

import tiny
from packtrain import preflight
from packtrain.configs.parse import parse

Change = dict[str, Any] | list[str] | None


@dataclass(frozen=True)
class Home:
    """A run with nothing wrong: a model with its tokenizer, rows to train and to evaluate on, a folder for results."""

    folder: Path
    model: Path
    adapter: Path

    @property
    def train(self) -> Path:
        return self.folder / "train.csv"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.csv"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def argv(self, change: Change) -> list[str]:
        """The run's flags; `change` replaces some, takes some away (None), or adds words as they are."""
        right: dict[str, Any] = {
            "model_name": self.model,
            "use_peft": True,
            "dataset": "grammar_dataset",
            "grammar_dataset__train_split": self.train,
            "grammar_dataset__test_split": self.validation,
            "output_dir": self.out,
            "context_length": 128,
            "nproc_per_node": 1,
            "max_train_step": 1,
        }
        if isinstance(change, list):
            return [*tiny.flags(**right), *change]
        return tiny.flags(**(right | (change or {})))

    def config(self, **values: Any) -> None:
        """Change the model's config.json; None takes a key away."""
        self._edit(self.model / "config.json", values)

    def adapter_config(self, **values: Any) -> None:
        """Change the adapter's adapter_config.json."""
        self._edit(self.adapter / "adapter_config.json", values)

    @staticmethod
    def _edit(file: Path, values: dict[str, Any]) -> None:
        merged = json.loads(file.read_text()) | values
        file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))

    def weights(self, **tensors: torch.Tensor | None) -> None:
        """Change the model's tensors; None takes one away. `__` stands for a dot."""
        file = self.model / "model.safetensors"
        merged = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, file)

    def sharded(self) -> Path:
        """The model's weights as three files and an index; the index."""
        tensors = load_file(self.model / "model.safetensors")
        (self.model / "model.safetensors").unlink()
        names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        places = {tensor: names[number % 3] for number, tensor in enumerate(sorted(tensors))}
        for name in names:
            save_file({tensor: tensors[tensor] for tensor, place in places.items() if place == name}, self.model / name)
        index = self.model / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return index

    def custom(self, text: str) -> dict[str, Any]:
        """Flags of a run on a custom data set whose file holds `text`."""
        (self.folder / "own.py").write_text(text)
        return {
            "dataset": "custom_dataset",
            "custom_dataset__file": self.folder / "own.py",
            "grammar_dataset__train_split": None,
            "grammar_dataset__test_split": None,
        }

    def alpaca(self, file: Path) -> dict[str, Any]:
        """Flags of a run on alpaca_dataset."""
        return {
            "dataset": "alpaca_dataset",
            "alpaca_dataset__data_path": file,
            "grammar_dataset__train_split": None,
            "grammar_dataset__test_split": None,
        }

    def jsonl(self, *lines: str) -> dict[str, Any]:
        """Flags of a run that trains on these lines."""
        file = self.folder / "train.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return {"grammar_dataset__train_split": file}

    def yaml(self, text: str) -> list[str]:
        """A run whose settings beyond the flags are in run.yaml."""
        (self.folder / "run.yaml").write_text(text)
        return [str(self.folder / "run.yaml")]

    def result(self) -> dict[str, Any] | None:
        """What run/result.json says, if there is one."""
        file = self.out / "run" / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None


class Case(NamedTuple):
    """Something to break, and the words of the message about it."""

    break_it: Callable[[Home], Change]
    words: tuple[str, ...]
    record: bool
    """Whether run/result.json can tell it too."""


CASES: dict[str, Case] = {}


def case(*words: str, record: bool = True) -> Callable[[Callable[[Home], Change]], Callable[[Home], Change]]:
    """Enter the decorated function into CASES under its name."""

    def enter(function: Callable[[Home], Change]) -> Callable[[Home], Change]:
        CASES[function.__name__] = Case(function, words, record)
        return function

    return enter


# ---- flags ----------------------------------------------------------------------------------------------------------


@case("--colour: no such flag; packtrain train --help lists them all")
def unknown_flag(home: Home) -> Change:
    return ["--colour", "blue"]


@case("--batch_sise_training: no such flag; did you mean --batch_size_training?")
def misspelt_flag(home: Home) -> Change:
    return ["--batch_sise_training", "2"]


@case("--learning_rate: no such flag; did you mean --lr?")
def other_tools_flag(home: Home) -> Change:
    return ["--learning_rate", "1e-4"]


@case("--lora_confg.r: no such flag; did you mean --lora_config.r?")
def misspelt_section(home: Home) -> Change:
    return ["--lora_confg.r", "8"]


@case("--lora_config: is a section", "--lora_config.NAME")
def section_alone(home: Home) -> Change:
    return ["--lora_config", "8"]


@case("--lr: expected a number, found 'fast'")
def text_for_a_number(home: Home) -> Change:
    return {"lr": "fast"}


@case("--batch_size_training: expected a whole number, found '2.5'")
def fraction_for_a_whole_number(home: Home) -> Change:
    return {"batch_size_training": 2.5}


@case("--use_peft: expected true or false, found 'maybe'")
def word_for_a_boolean(home: Home) -> Change:
    return {"use_peft": "maybe"}


@case("--dataset: expected one of", "found 'grammer_dataset'; did you mean grammar_dataset?")
def misspelt_choice(home: Home) -> Change:
    return {"dataset": "grammer_dataset"}


@case("--model_name: expected text", "found no value")
def flag_without_its_value(home: Home) -> Change:
    return ["--model_name"]


@case("'alpaca': expected a flag (--name) or one CONFIG.yaml")
def stray_word(home: Home) -> Change:
    return ["alpaca"]


@case("--lr: expected a number above 0, found -0.1")
def negative_learning_rate(home: Home) -> Change:
    return {"lr": -0.1}


@case("--lora_dropout: expected 0 or more, and less than 1, found 1.5")
def dropout_above_one(home: Home) -> Change:
    return {"lora_dropout": 1.5}


@case("--model_name: expected a model's folder or hub id, found none")
def no_model(home: Home) -> Change:
    return {"model_name": None}


@case("--random_init", "--model_name", "expected one of the two")
def two_models(home: Home) -> Change:
    return {"random_init": home.model}


@case("--hsdp: means HYBRID_SHARD", "NO_SHARD", "leave out one of the two")
def two_sharding_strategies(home: Home) -> Change:
    return {"hsdp": True, "sharding_strategy": "NO_SHARD"}


@case("--from_peft_checkpoint: trains an adapter", "add --use_peft")
def adapter_without_use_peft(home: Home) -> Change:
    return {"from_peft_checkpoint": home.adapter, "use_peft": None}


@case("--num_virtual_tokens: belongs to prefix_config (--use_peft --peft_method prefix)")
def flag_of_another_method(home: Home) -> Change:
    return {"num_virtual_tokens": 5}


@case("--freeze_LLM_only: is for vision models", "leave it out")
def vision_flag(home: Home) -> Change:
    return ["--freeze_LLM_only"]


@case("--lr: expected a number, found '***'")
def secret_in_the_wrong_place(home: Home) -> Change:
    return {"lr": "hf_abcdefghijklmnop"}


@case("several things are wrong:", "--lr: expected", "--sede: no such flag; did you mean --seed?", "run.yaml:2: epocs")
def several_wrong_settings(home: Home) -> Change:
    return [*home.yaml("num_workers_dataloader: 0\nepocs: 3\n"), "--lr", "fast", "--sede", "1"]


# ---- CONFIG.yaml ----------------------------------------------------------------------------------------------------


@case("nowhere.yaml: there is no such file; expected a CONFIG.yaml")
def yaml_missing(home: Home) -> Change:
    return [str(home.folder / "nowhere.yaml")]


@case("run.yaml:3: not valid YAML: expected ',' or ']'")
def yaml_syntax(home: Home) -> Change:
    return home.yaml("lr: 1e-4\nseed: [1\n")


@case("run.yaml:3: rank: no such setting; did you mean lora_config.r?")
def yaml_unknown_name(home: Home) -> Change:
    return home.yaml("seed: 1\nlora_config:\n  rank: 8\n")


@case("run.yaml:2: seed: expected a whole number, found 'many'")
def yaml_wrong_type(home: Home) -> Change:
    return home.yaml("lr: 1e-4\nseed: many\n")


@case("run.yaml:3: lr: says again what line 1 says")
def yaml_twice(home: Home) -> Change:
    return home.yaml("lr: 1e-4\nseed: 1\nlr: 2e-4\n")


@case("run.yaml:1:", "tags are not read here")
def yaml_tag(home: Home) -> Change:
    return home.yaml("seed: !!python/object/apply:os.system ['true']\n")


@case("run.yaml:1: the file: expected settings, `name: value` a line")
def yaml_list(home: Home) -> Change:
    return home.yaml("- lr\n- seed\n")


@case("run.yaml:2: not UTF-8 (byte 0xe9)", "save the file as UTF-8")
def yaml_not_utf8(home: Home) -> Change:
    words = home.yaml("")
    Path(words[0]).write_bytes(b"seed: 1\noutput_dir: caf\xe9\n")
    return words


# ---- the model's folder ---------------------------------------------------------------------------------------------


@case(
    "--model_name",
    "modle: no such folder (did you mean",
    "model?); expected a folder with config.json, tokenizer and safetensors, or a hub id",
)
def model_folder_missing(home: Home) -> Change:
    return {"model_name": home.folder / "modle"}


@case("--model_name", "model.safetensors: is a file; expected a folder")
def model_is_a_file(home: Home) -> Change:
    return {"model_name": home.model / "model.safetensors"}


@case(
    "--model_name some-org/some-llama: neither a folder here nor a hub id in the local cache",
    "HF_HUB_OFFLINE",
    "hf download some-org/some-llama",
)
def hub_id_offline(home: Home) -> Change:
    return {"model_name": "some-org/some-llama"}


@case("--model_name ../../Llama: no such folder; expected")
def relative_folder_missing(home: Home) -> Change:
    return {"model_name": "../../Llama"}


@case(": no such folder; expected a folder with config.json")
def model_name_too_long(home: Home) -> Change:
    return {"model_name": "tell me a story " * 30}


@case("--model_name a--b/c: no such folder, and no hub id")
def no_hub_id(home: Home) -> Change:
    return {"model_name": "a--b/c"}


@case("--model_name", "no config.json there; expected a Hugging Face folder of a Llama model")
def no_config(home: Home) -> Change:
    (home.model / "config.json").unlink()
    return None


@case("model/config.json: cannot be read", "line 1 column", "mend it, or copy or download it again")
def config_is_no_json(home: Home) -> Change:
    (home.model / "config.json").write_text("{'vocab_size': 384}")
    return None


@case("model/config.json: expected a JSON object, found a list")
def config_is_a_list(home: Home) -> Change:
    (home.model / "config.json").write_text("[]")
    return None


@case("config.json: model_type is 'qwen2', expected 'llama'")
def another_model(home: Home) -> Change:
    home.config(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    return None


@case("config.json: rope_scaling: rope_type is 'yarn', expected one of default, linear, dynamic, llama3")
def unknown_rope(home: Home) -> Change:
    home.config(rope_parameters=None, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    return None


@case("num_attention_heads is 0, expected a whole number above 0", "hidden_act is 'gelu', expected silu")
def config_values_wrong(home: Home) -> Change:
    home.config(num_attention_heads=0, hidden_act="gelu")
    return None


@case("quantization_config is 'gptq'", "use the original model")
def quantized_model(home: Home) -> Change:
    home.config(quantization_config={"quant_method": "gptq", "bits": 4})
    return None


@case("--random_init", "nowhere.json: no such folder")
def random_init_missing(home: Home) -> Change:
    return {"model_name": None, "random_init": home.folder / "nowhere.json", "tokenizer_name": home.model}


# ---- the tokenizer --------------------------------------------------------------------------------------------------


@case("--model_name", "no tokenizer there (tokenizer.json or tokenizer.model)", "--tokenizer_name")
def no_tokenizer(home: Home) -> Change:
    (home.model / "tokenizer.json").unlink()
    return None


@case("--model_name", "its tokenizer cannot be read")
def broken_tokenizer(home: Home) -> Change:
    (home.model / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"')
    return None


@case("--model_name", "its tokenizer cannot be read", "copy or download tokenizer.json")
def tokenizer_of_another_program(home: Home) -> Change:
    (home.model / "tokenizer.json").write_text('{"version": 7}')
    return None


@case("--tokenizer_name", "nowhere: no such folder; expected a folder with tokenizer.json")
def tokenizer_folder_missing(home: Home) -> Change:
    return {"tokenizer_name": home.folder / "nowhere"}


@case("has no eos_token", "tokenizer_config.json", "--tokenizer_name")
def tokenizer_without_end(home: Home) -> Change:
    file = home.model / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    return None


@case("the tokenizer has 400 tokens, and the model's embedding 384 rows", "--modules_to_save embed_tokens,lm_head")
def tokenizer_longer_than_the_embedding(home: Home) -> Change:
    tiny.tokenizer(extra=16).save_pretrained(home.model)
    return None


# ---- files of rows --------------------------------------------------------------------------------------------------


@case("nowhere.csv: there is no such file; give one with --grammar_dataset.train_split FILE")
def data_missing(home: Home) -> Change:
    return {"grammar_dataset__train_split": home.folder / "nowhere.csv"}


@case("grammar_validation.csv: there is no such file; give one with --grammar_dataset.test_split FILE")
def validation_left_out(home: Home) -> Change:
    return {"grammar_dataset__test_split": None}


@case("is a folder, expected a file", "--grammar_dataset.train_split")
def data_is_a_folder(home: Home) -> Change:
    return {"grammar_dataset__train_split": home.model}


@case("rows.txt: the name ends in .txt, expected .csv, .json, .jsonl, .parquet")
def unknown_format(home: Home) -> Change:
    file = home.folder / "rows.txt"
    file.write_text("a,b\n")
    return {"grammar_dataset__train_split": file}


@case("train.csv: the file is empty (0 bytes)", "--grammar_dataset.train_split")
def empty_file(home: Home) -> Change:
    home.train.write_text("")
    return None


@case("train.csv: there is no row in it (a header alone is none)")
def header_only(home: Home) -> Change:
    home.train.write_text("input,target\n")
    return None


@case("train.csv: no column [target]; found [input, corrected], expected [input, target]: rename columns")
def missing_column(home: Home) -> Change:
    home.train.write_text("input,corrected\nhe go,he goes\n")
    return None


@case("train.csv:1: the header names 'input' more than once")
def column_twice(home: Home) -> Change:
    home.train.write_text("input,input,target\na,b,c\n")
    return None


@case("train.csv:3: row 2: 3 fields, expected 2 (input, target); a comma in text needs quotes", "--on_bad_rows skip")
def comma_without_quotes(home: Home) -> Change:
    home.train.write_text("input,target\nhe go,he goes\nhe go, now,he goes now\n")
    return None


@case("train.csv:3: row 2: a quote opened in this row is never closed")
def quote_never_closed(home: Home) -> Change:
    home.train.write_text('input,target\nhe go,he goes\n"he go,he goes\n')
    return None


@case("train.csv:4: row 3: target is empty, expected text", "1 of 41 rows cannot be trained on", "--on_bad_rows skip")
def empty_answer(home: Home) -> Change:
    tiny.grammar(home.train, [*tiny.pairs(2), ("he go", " "), *tiny.pairs(38)])
    return None


@case("train.csv:2: row 1", "20 of 20 rows (the first 5 are above) cannot be trained on: there is nothing to train on")
def every_answer_empty(home: Home) -> Change:
    tiny.grammar(home.train, [(wrong, "") for wrong, _ in tiny.pairs(20)])
    return {"on_bad_rows": "skip"}


@case("train.csv:3: not UTF-8 at byte", "(0xac)", "latin-1", "iconv -f CP1252 -t UTF-8")
def not_utf8(home: Home) -> Change:
    home.train.write_bytes(b"input,target\nhe go,he goes\n5 \xac,5 EUR\n")
    return None


@case("train.csv:1: not UTF-8", "it looks like gzip: unpack it first (gunzip -c")
def gzipped(home: Home) -> Change:
    home.train.write_bytes(gzip.compress(b"input,target\nhe go,he goes\n"))
    return None


@case("train.csv: this is a Git LFS pointer", "git lfs pull")
def data_is_an_lfs_pointer(home: Home) -> Change:
    home.train.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return None


@case("rows.parquet: not a readable parquet file")
def broken_parquet(home: Home) -> Change:
    file = home.folder / "rows.parquet"
    file.write_bytes(b"PAR1nothing")
    return {"grammar_dataset__train_split": file}


@case("train.jsonl:37: row 37: not valid JSON at column", "1 of 40 rows")
def bad_json_line(home: Home) -> Change:
    lines = [json.dumps({"input": wrong, "target": right}) for wrong, right in tiny.pairs(40)]
    lines[36] = lines[36][:20]
    return home.jsonl(*lines)


@case("train.jsonl: line 1 begins a JSON array, expected one object a line; rename the file to .json")
def array_in_jsonl(home: Home) -> Change:
    return home.jsonl(json.dumps([{"input": "a", "target": "b"}]))


@case("train.jsonl:2: row 2: the line is a list, expected an object")
def list_in_jsonl(home: Home) -> Change:
    return home.jsonl('{"input": "a", "target": "b"}', '["a", "b"]')


@case("train.jsonl:2: row 2: target is a number, expected text")
def number_for_text(home: Home) -> Change:
    return home.jsonl('{"input": "a", "target": "b"}', '{"input": "a", "target": 7}')


@case("train.jsonl:1: row 1: input is null, expected text")
def null_for_text(home: Home) -> Change:
    return home.jsonl('{"input": null, "target": "b"}', '{"input": "a", "target": "b"}')


@case("train.jsonl:2: row 2: no column target; found [input, answer]")
def one_row_lacks_a_column(home: Home) -> Change:
    return home.jsonl('{"input": "a", "target": "b"}', '{"input": "a", "answer": "b"}')


@case(
    "train.csv:2: row 1: its prompt has",
    "context_length is 8",
    "raise --context_length",
    "40 of 40 rows (the first 5 are above)",
)
def every_row_too_long(home: Home) -> Change:
    return {"context_length": 8}


@case("rows.json: the file holds an object, expected an array of objects")
def object_for_an_array(home: Home) -> Change:
    file = home.folder / "rows.json"
    file.write_text('{"data": []}')
    return home.alpaca(file)


@case("validation is the first 5 % of the rows, and of 12 that is none", "at least 20", "--run_validation False")
def too_few_rows_for_validation(home: Home) -> Change:
    return home.alpaca(tiny.alpaca(home.folder / "rows.json", 12))


@case("knkarthick/samsum: split 'train' cannot be had", "--samsum_dataset.train_split FILE")
def hub_data_offline(home: Home) -> Change:
    return {
        "dataset": "samsum_dataset",
        "grammar_dataset__train_split": None,
        "grammar_dataset__test_split": None,
    }


# ---- custom data sets -----------------------------------------------------------------------------------------------

ROW = '{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "attention_mask": [1, 1, 1]}'
GOOD = f"def get_custom_dataset(config, tokenizer, split):\n    return [{ROW}] * 4\n"


@case("nowhere.py: there is no such file; give one with --custom_dataset.file FILE.py[:FUNCTION]")
def custom_file_missing(home: Home) -> Change:
    return home.custom("") | {"custom_dataset__file": home.folder / "nowhere.py"}


@case("own.py: no function get_custom_dataset; found [make_rows]", "--custom_dataset.file")
def custom_function_missing(home: Home) -> Change:
    return home.custom("def make_rows(config, tokenizer, split):\n    return []\n")


@case("own.py:2: the file failed with SyntaxError")
def custom_file_does_not_parse(home: Home) -> Change:
    return home.custom("import math\ndef get_custom_dataset(config, tokenizer, split:\n")


@case("own.py:2: get_custom_dataset(dataset_config, tokenizer, 'train') failed with KeyError")
def custom_function_raises(home: Home) -> Change:
    return home.custom("def get_custom_dataset(config, tokenizer, split):\n    return {}['instruction']\n")


@case("get_custom_dataset(train): gave a value of type int, expected a list or data set of rows")
def custom_function_gives_a_number(home: Home) -> Change:
    return home.custom("def get_custom_dataset(config, tokenizer, split):\n    return 7\n")


@case("get_custom_dataset(train): gave no rows")
def custom_function_gives_nothing(home: Home) -> Change:
    return home.custom("def get_custom_dataset(config, tokenizer, split):\n    return []\n")


@case("row 1: no labels; found [input_ids]")
def custom_rows_without_labels(home: Home) -> Change:
    return home.custom("def get_custom_dataset(config, tokenizer, split):\n    return [{'input_ids': [3, 4]}]\n")


@case("row 1: lengths differ: input_ids 3, labels 2")
def custom_lengths_differ(home: Home) -> Change:
    return home.custom(GOOD.replace("[-100, 4, 5]", "[4, 5]"))


@case("token 9999 (place 2 of input_ids) is outside the model's vocabulary of 384", "--tokenizer_name")
def ids_beyond_the_vocabulary(home: Home) -> Change:
    return home.custom(GOOD.replace("[3, 4, 5]", "[3, 4, 9999]"))


@case("no label that could be trained", "4 of 4 rows")
def custom_rows_teach_nothing(home: Home) -> Change:
    return home.custom(GOOD.replace("[-100, 4, 5]", "[-100, -100, -100]"))


@case("own.py:4: get_data_collator(tokenizer) failed with RuntimeError: no")
def collator_raises(home: Home) -> Change:
    return home.custom(GOOD + "def get_data_collator(tokenizer):\n    raise RuntimeError('no')\n")


@case("get_data_collator gave a value of type int, expected a function of a list of rows")
def collator_is_a_number(home: Home) -> Change:
    return home.custom(GOOD + "def get_data_collator(tokenizer):\n    return 7\n")


@case("get_data_collator's result has no labels", "expected a dict of input_ids, labels and attention_mask")
def collator_forgets_the_labels(home: Home) -> Change:
    return home.custom(
        GOOD
        + "def get_data_collator(tokenizer):\n    return lambda rows: {'input_ids': [r['input_ids'] for r in rows]}\n"
    )


@case("--batching_strategy packing", "own.py has a get_data_collator", "give padding")
def collator_and_packing(home: Home) -> Change:
    text = GOOD + "def get_data_collator(tokenizer):\n    return lambda rows: rows\n"
    return home.custom(text) | {"batching_strategy": "packing"}


# ---- weights --------------------------------------------------------------------------------------------------------


@case("1 tensor is missing: model.norm.weight", "config.json and the weights must be of one model")
def tensor_missing(home: Home) -> Change:
    home.weights(model__norm__weight=None)
    return None


@case("1 tensor is not of this model: model.norm.wait (nearest of the model's: model.norm.weight [64])")
def tensor_unknown(home: Home) -> Change:
    home.weights(model__norm__wait=torch.zeros(64))
    return None


@case("1 tensor is of the wrong shape: model.norm.weight is [32], expected [64]")
def tensor_misshaped(home: Home) -> Change:
    home.weights(model__norm__weight=torch.zeros(32))
    return None


@case("1 tensor is of the wrong dtype: model.norm.weight is I8", "F32, BF16, F16")
def tensor_of_integers(home: Home) -> Change:
    home.weights(model__norm__weight=torch.zeros(64, dtype=torch.int8))
    return None


@case("of the wrong shape", "config.json and the weights must be of one model")
def config_of_another_size(home: Home) -> Change:
    home.config(intermediate_size=128)
    return None


@case("model.safetensors: its bytes are not those that the hub has (SHA-256 ", "and download it again")
def hubs_weights_flipped(home: Home) -> Change:
    snapshot, blobs = (home.folder / "models--a--b" / name for name in ("snapshots/0123", "blobs"))
    shutil.copytree(home.model, snapshot)
    blobs.mkdir()
    data = bytearray((snapshot / "model.safetensors").read_bytes())
    blob = blobs / hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    blob.write_bytes(data)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    return {"model_name": snapshot}


@case("model.safetensors: ", "bytes on disk, its header says", "copy or download it again")
def weights_cut_short(home: Home) -> Change:
    file = home.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return None


@case("model.safetensors: is a Git LFS pointer", "git lfs pull")
def weights_are_an_lfs_pointer(home: Home) -> Change:
    (home.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return None


@case("model.safetensors: says that its header has", "it is no safetensors file, or damaged")
def weights_are_noise(home: Home) -> Change:
    (home.model / "model.safetensors").write_bytes(b"\xff" * 4096)
    return None


@case("1 of 3 shards", "missing: model-00002-of-00003.safetensors", "copy or download them again")
def shard_missing(home: Home) -> Change:
    home.sharded().with_name("model-00002-of-00003.safetensors").unlink()
    return None


@case("model.safetensors.index.json: names files outside of the folder: ../model-00001-of-00003.safetensors")
def index_leads_outside(home: Home) -> Change:
    index = home.sharded()
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    return None


@case("model.safetensors.index.json: cannot be read", "copy or download it again")
def index_is_no_json(home: Home) -> Change:
    home.sharded().write_text("{")
    return None


@case("is a link to", "copy the file there")
def weights_link_outside(home: Home) -> Change:
    file = home.model / "model.safetensors"
    file.rename(home.folder / "elsewhere.safetensors")
    file.symlink_to(home.folder / "elsewhere.safetensors")
    return None


@case("holds pickled weights only (pytorch_model.bin); only safetensors is read", "save_pretrained")
def only_a_pickle(home: Home) -> Change:
    (home.model / "model.safetensors").rename(home.model / "pytorch_model.bin")
    return None


@case("neither model.safetensors nor model.safetensors.index.json is there")
def no_weights(home: Home) -> Change:
    (home.model / "model.safetensors").unlink()
    return None


# ---- adapters -------------------------------------------------------------------------------------------------------


@case(
    "--target_modules: 'q_porj' matches no linear layer (nearest: q_proj)",
    "there are q_proj, k_proj, v_proj, o_proj, gate_proj",
)
def target_matches_nothing(home: Home) -> Change:
    return {"target_modules": "[q_porj,v_proj]"}


@case("--target_modules: the regex '.*attention.*' matches no whole name of a linear layer")
def pattern_matches_nothing(home: Home) -> Change:
    return {"target_modules": ".*attention.*"}


@case("--target_modules: expected names or a regular expression, found '(q_proj'")
def pattern_is_broken(home: Home) -> Change:
    return {"target_modules": "(q_proj"}


@case("--modules_to_save: 'embed_token' matches no module (nearest: embed_tokens)")
def modules_to_save_matches_nothing(home: Home) -> Change:
    return {"modules_to_save": "embed_token"}


@case("--lora_config.target_modules and modules_to_save both name q_proj", "take it out of one of them")
def adapted_and_trained_whole(home: Home) -> Change:
    return {"modules_to_save": "q_proj"}


@case("--from_peft_checkpoint", "nowhere: no such folder; expected a folder with adapter_config.json")
def adapter_missing(home: Home) -> Change:
    return {"from_peft_checkpoint": home.folder / "nowhere"}


@case("no adapter_config.json there; expected an adapter's folder, saved by packtrain or peft")
def adapter_without_config(home: Home) -> Change:
    (home.adapter / "adapter_config.json").unlink()
    return {"from_peft_checkpoint": home.adapter}


@case("adapter_config.json: cannot be read", "save, copy or download the adapter again")
def adapter_config_is_no_json(home: Home) -> Change:
    (home.adapter / "adapter_config.json").write_text("r: 8")
    return {"from_peft_checkpoint": home.adapter}


@case("adapter_config.json: use_dora is True, which is not supported; only plain LoRA without it is")
def adapter_is_dora(home: Home) -> Change:
    home.adapter_config(use_dora=True)
    return {"from_peft_checkpoint": home.adapter}


@case("adapter_config.json: peft_type is 'IA3'")
def adapter_of_another_kind(home: Home) -> Change:
    home.adapter_config(peft_type="IA3")
    return {"from_peft_checkpoint": home.adapter}


@case("--lora_config.r: is 16, and the adapter in", "was trained with 4; leave it out")
def flag_at_odds_with_the_adapter(home: Home) -> Change:
    return {"from_peft_checkpoint": home.adapter, "lora_config__r": 16}


@case("adapter_model.safetensors: ", "of the wrong shape", "is [4, 64], expected [4, 32]", "base model")
def adapter_of_another_model(home: Home) -> Change:
    tiny.model(home.model, hidden_size=32)
    return {"from_peft_checkpoint": home.adapter}


@case("adapter_model.safetensors: ", "bytes on disk, its header says")
def adapter_cut_short(home: Home) -> Change:
    file = home.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {"from_peft_checkpoint": home.adapter}


@case("its weights are pickled (adapter_model.bin)", "save_pretrained")
def adapter_is_a_pickle(home: Home) -> Change:
    (home.adapter / "adapter_model.safetensors").rename(home.adapter / "adapter_model.bin")
    return {"from_peft_checkpoint": home.adapter}


# ---- where results go -----------------------------------------------------------------------------------------------


@case("--output_dir", "out is a file, expected a folder; give another", record=False)
def output_is_a_file(home: Home) -> Change:
    home.out.write_text("")
    return None


@case("--output_dir /proc/packtrain:", "cannot be written to", "give another folder", record=False)
def output_cannot_be_written(home: Home) -> Change:
    return {"output_dir": "/proc/packtrain"}


def _earlier(home: Home, **facts: Any) -> None:
    (home.out / "run").mkdir(parents=True)
    (home.out / "run" / "result.json").write_text(json.dumps(facts))


@case(
    "--output_dir",
    "holds a finished run with other settings (--lr: 0.5 then, 0.0001 now)",
    "--overwrite_output_dir",
    record=False,
)
def folder_of_a_finished_run(home: Home) -> Change:
    fingerprint = preflight.examine(parse(home.argv(None))).inputs.fingerprint
    _earlier(home, status="done", fingerprint=fingerprint | {"--lr": 0.5})
    return None


@case("--output_dir", "cannot be written to (File name too long)", record=False)
def output_name_too_long(home: Home) -> Change:
    return {"output_dir": home.folder / ("x" * 300)}


@case("--output_dir", "out/run is a file, expected a folder; give another", record=False)
def run_is_a_file(home: Home) -> Change:
    home.out.mkdir()
    (home.out / "run").write_text("")
    return None


@case("--output_dir", "in use by process", "wait for it, end it, or choose another folder", record=False)
def folder_in_use(home: Home) -> Change:
    now = {"updated_at": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    _earlier(home, status="running", step=3, **now)
    return None


@case("run/result.json: cannot be read", "move it away, or choose another --output_dir", record=False)
def result_is_no_json(home: Home) -> Change:
    _earlier(home)
    (home.out / "run" / "result.json").write_text("{")
    return None


# ---- the machine ----------------------------------------------------------------------------------------------------


@case("--hsdp: sharding_group_size 3 x replica_group_size 1 is 3, but there are 1 ranks")
def sharding_groups_do_not_fit(home: Home) -> Change:
    return {"hsdp": True, "sharding_group_size": 3}


# ---- several at once ------------------------------------------------------------------------------------------------


@case(
    "config.json: hidden_act is 'gelu'",
    "no tokenizer there",
    "train.csv: no column [target]",
    "validation.csv: the file is empty",
    "out is a file",
    record=False,
)
def everything_at_once(home: Home) -> Change:
    home.config(hidden_act="gelu")
    (home.model / "tokenizer.json").unlink()
    home.train.write_text("input,corrected\na,b\n")
    home.validation.write_text("")
    home.out.write_text("")
    return None
