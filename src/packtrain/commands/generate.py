"""Text from a model, or a model and an adapter: `packtrain generate`, and what the demo measures with.

    run         the command: a prompt, a file or a conversation in, the answer on standard output
    load        transformers' model and tokenizer, the adapter on top through peft
    complete    greedy or sampled continuations of many prompts, a batch at a time

Generation is transformers' and peft's work on purpose: what they read is what users deploy.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from packtrain.checkpoint.adapter import slots_of
from packtrain.checkpoint.hub import resolve
from packtrain.configs.flat import flat_help, parse_flat
from packtrain.configs.generation import GenerationConfig
from packtrain.errors import EXIT_DONE, UserError

TEMPLATE_SECONDS = 5.0
"""How long a chat template may take."""


def run(argv: Sequence[str]) -> int:
    """Print the answer to the prompt that `argv` names."""
    if {"--help", "-h"} & set(argv):
        print(flat_help("generate", GenerationConfig))
        return EXIT_DONE
    cfg = parse_flat(argv, GenerationConfig)
    if cfg.model_name is None:
        raise UserError("--model_name: missing; expected a Hugging Face folder or a hub id")
    messages = _conversation(cfg)
    text = None if messages else _prompt(cfg)
    model, tokenizer = load(cfg.model_name, cfg.peft_model, default_device())
    if messages:
        if not tokenizer.chat_template:
            raise UserError(f"--conversation: the tokenizer of {cfg.model_name} has no chat template; use --prompt")
        ids = templated(tokenizer, messages)
    else:
        ids = prompt_ids(tokenizer, str(text))
    set_seed(cfg.seed)
    print(answer_all(model, tokenizer, [ids], **sampling(cfg))[0])
    return EXIT_DONE


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampling(cfg: GenerationConfig) -> dict[str, Any]:
    """The settings under transformers' names; those of drawing only where there is any."""
    chosen: dict[str, Any] = {
        "max_new_tokens": cfg.max_new_tokens,
        "do_sample": cfg.do_sample,
        "repetition_penalty": cfg.repetition_penalty,
        "length_penalty": cfg.length_penalty,
        "use_cache": cfg.use_cache,
    }
    if cfg.min_length is not None:
        chosen["min_length"] = cfg.min_length
    if cfg.do_sample:
        chosen |= {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
    return chosen


def load(model_name: str, peft_model: str | None, device: torch.device) -> tuple[Any, Any]:
    """(model, tokenizer) ready to generate: bf16 on a GPU, fp32 on a CPU. Raises UserError where one is missing."""
    disable_progress_bar()
    folder = resolve(model_name, "--model_name")
    adapter = resolve(peft_model, "--peft_model") if peft_model else None
    if adapter:
        slots_of(adapter)  # peft would read a pickle
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = adapter if adapter and (adapter / "tokenizer_config.json").exists() else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        ).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model_name {model_name}: cannot be read ({str(error).splitlines()[0]})") from None
    if adapter:
        try:
            model = PeftModel.from_pretrained(model, str(adapter))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--peft_model {peft_model}: cannot be read ({str(error).splitlines()[0]})") from None
    return model.eval(), tokenizer


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """ids(bos + prompt), as in training: no other special tokens."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids: list[int] = begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


def templated(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation by the tokenizer's chat template, up to where the answer begins.

    A template is a stranger's program: transformers runs it in Jinja's sandbox, and here it has TEMPLATE_SECONDS.
    Raises UserError if it fails, reaches for what it may not, or does not end.
    """
    try:
        with _time_limit(TEMPLATE_SECONDS):
            ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TimeoutError, TypeError, ValueError) as error:
        raise UserError(
            f"the tokenizer's chat template failed on this conversation ({type(error).__name__}: {error}); look at "
            "chat_template in its folder, or use packtrain generate --prompt"
        ) from None
    if not ids:
        raise UserError("the tokenizer's chat template makes nothing of this conversation; use --prompt")
    return ids


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds of the block, in a main thread; elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise TimeoutError(f"it had not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[str]:
    """The continuation of each prompt; `settings` go to transformers' generate."""
    return answer_all(model, tokenizer, [prompt_ids(tokenizer, prompt) for prompt in prompts], **settings)


@torch.inference_mode()
def answer_all(
    model: Any, tokenizer: Any, ids: Sequence[list[int]], *, batch_size: int = 16, **settings: Any
) -> list[str]:
    """What follows each list of ids, without special tokens. Padded on the left, shortest first, to waste little."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(ids[i]) for i in chosen)
        block = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen], device=model.device)
        out = model.generate(input_ids=block, attention_mask=mask, pad_token_id=pad, **settings)
        for i, row in zip(chosen, out[:, width:], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def _prompt(cfg: GenerationConfig) -> str:
    if cfg.prompt is not None:
        return cfg.prompt.replace("\\n", "\n")
    if cfg.prompt_file is not None:
        return _read(cfg.prompt_file, "--prompt_file")
    if sys.stdin.isatty():
        raise UserError("nothing to go on from: give --prompt TEXT, --prompt_file FILE or --conversation FILE.json")
    return sys.stdin.read()


def _conversation(cfg: GenerationConfig) -> list[dict[str, str]]:
    """The messages of --conversation; none without it."""
    if cfg.conversation is None:
        return []
    try:
        messages = json.loads(_read(cfg.conversation, "--conversation"))
    except json.JSONDecodeError as error:
        raise UserError(f"--conversation {cfg.conversation}:{error.lineno}: not JSON ({error.msg})") from None
    right = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    )
    if not right or not messages:
        raise UserError(
            f'--conversation {cfg.conversation}: expected a list of {{"role": ..., "content": ...}} messages'
        )
    return list(messages)


def _read(file: str, flag: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {file}: cannot be read ({error})") from None
