"""A data set of your own: `--dataset custom_dataset --custom_dataset.file examples/custom_dataset.py`.

packtrain calls `get_custom_dataset(dataset_config, tokenizer, split)` (or FUNCTION, with `FILE.py:FUNCTION`) once for
`--custom_dataset.train_split` and once for `--custom_dataset.test_split`. It returns rows to go through one by one: a
list, a generator, a `datasets.Dataset`, a torch `Dataset`. A row is a dict of three lists of the same length:

    input_ids         token ids
    labels            the same ids where a token is to be learned, -100 where it is only read
    attention_mask    1 for tokens, 0 for padding at an end; padding is taken off

Rows longer than `--context_length` are cut at their end. A function `get_data_collator(tokenizer)` in this file, if
there is one, makes the batches instead of packtrain; that needs `--batching_strategy padding`.
"""

import random

IGNORE = -100
ROWS = {"train": 400, "validation": 40}


def get_custom_dataset(dataset_config, tokenizer, split):
    """Sums of two numbers, asked in words. Only the answer and the end of sequence are learned."""
    numbers = random.Random(split)
    return [sum_row(numbers.randrange(100), numbers.randrange(100), tokenizer) for _ in range(ROWS[split])]


def sum_row(a, b, tokenizer):
    """One row. Prompt and answer are encoded apart, so that the labels begin exactly with the answer."""
    prompt = tokenizer.encode(f"{tokenizer.bos_token or ''}What is {a} plus {b}?\n", add_special_tokens=False)
    answer = tokenizer.encode(f"{a + b}{tokenizer.eos_token}", add_special_tokens=False)
    return {
        "input_ids": prompt + answer,
        "labels": [IGNORE] * len(prompt) + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
    }
