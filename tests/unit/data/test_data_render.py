"""Prompts and ids against llama-recipes' own way of making them, written out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packtrain.data.render import TEMPLATES, Encoder, alpaca_prompt, grammar_prompt, samsum_prompt
from packtrain.errors import UserError


def test_prompts_are_llama_recipes_to_the_character() -> None:
    assert grammar_prompt({"input": "he {go}"}) == "Correct this to standard English: he {go}\n---\nCorrected: "
    assert samsum_prompt({"dialogue": "A: hi\nB: ho"}) == "Summarize this dialog:\nA: hi\nB: ho\n---\nSummary:\n"
    assert alpaca_prompt({"instruction": "Add", "input": ""}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd\n\n### Response:"
    )
    assert alpaca_prompt({"instruction": "Add", "input": "1 2"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:"
    )


def test_the_answer_is_a_column_of_each_template() -> None:
    assert {name: t.answer for name, t in TEMPLATES.items()} == {
        "grammar_dataset": "target",
        "samsum_dataset": "summary",
        "alpaca_dataset": "output",
        "llamaguard_toxicchat_dataset": "toxicity",
    }
    assert all(t.answer in t.columns for t in TEMPLATES.values())


texts = st.lists(st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30)), min_size=1, max_size=5)


@settings(deadline=None)
@given(texts)
def test_ids_are_those_of_two_separate_encodes(tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
    found = Encoder(tokenizer)([p for p, _ in pairs], [a for _, a in pairs])
    for (prompt, answer), (prompt_ids, answer_ids) in zip(pairs, found, strict=True):
        assert prompt_ids == tokenizer.encode(tokenizer.bos_token + prompt, add_special_tokens=False)
        assert answer_ids == tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert answer_ids[-1] == tokenizer.eos_token_id


def test_no_bos_token_means_none(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    ((prompt, _),) = Encoder(tokenizer)(["he"], ["x"])
    assert prompt == tokenizer.encode("he", add_special_tokens=False)


def test_no_eos_token_is_an_error(make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"no eos_token.*--tokenizer_name"):
        Encoder(make_tokenizer(bos_token="<s>"))


def test_specials_that_encode_to_pieces_are_joined_as_ids(make_tokenizer: Any) -> None:
    plain = make_tokenizer(bos_token="<s>", eos_token="</s>")
    begin, end = plain.bos_token_id, plain.eos_token_id

    class Pieces:
        """A tokenizer that takes the texts of its special tokens for ordinary ones."""

        bos_token, eos_token, bos_token_id, eos_token_id, name_or_path = "<s>", "</s>", begin, end, "pieces"

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            return plain([text.replace("s>", "s)") for text in texts], **settings)

    ((prompt, answer),) = Encoder(Pieces())(["he go"], ["he goes"])
    assert prompt == [begin, *plain.encode("he go", add_special_tokens=False)]
    assert answer == [*plain.encode("he goes", add_special_tokens=False), end]


def test_a_row_may_be_longer_than_the_tokenizers_own_limit(make_tokenizer: Any, caplog: Any) -> None:
    tokenizer = make_tokenizer(eos_token="</s>", model_max_length=4)
    ((prompt, _),) = Encoder(tokenizer)(["x" * 50], ["y"])
    assert len(prompt) > 4
    assert "longer than" not in caplog.text
