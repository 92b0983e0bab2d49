"""Texts as a model is given them: tokenised once, one sample a row, padded on the right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from tl_callbacks.reading.pooling import packed_segments

Row = dict[str, list[int]]

_FILL = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
_KEYS = (*_FILL, "special_tokens_mask")


def tokenizer_of(trainer: Trainer, given: Any) -> Any:
    """Return the tokenizer that was given, else the Trainer's, else None."""
    found = given if given is not None else trainer.processing_class
    return getattr(found, "tokenizer", found)  # a processor has one


def tokenised(item: Any, tokenizer: Any, max_length: int) -> list[Row]:
    """Return the samples of a text or of a tokenised row: one, several of a packed row, none of an empty one.

    Args:
        item: a text, a mapping with `input_ids`, or one with `text`.
        tokenizer: for texts.
        max_length: tokens after which a sample ends.

    Raises:
        TypeError: it is none of these.
        ValueError: it is a text and there is no tokenizer.

    Example:
        >>> tokenised({"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}, None, 512)
        [{'input_ids': [5, 6]}, {'input_ids': [7, 8]}]
    """
    if isinstance(item, Mapping) and "input_ids" not in item and "text" in item:
        item = item["text"]
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(
                "the rows are texts and there is no tokenizer. Pass tokenizer=..., or processing_class= to the Trainer."
            )
        item = tokenizer(item, truncation=True, max_length=max_length)
    if not isinstance(item, Mapping) or "input_ids" not in item:
        raise TypeError(f"expected texts, or rows with `input_ids`, got {type(item).__name__}: {str(item)[:60]!r}.")
    row = {key: _flat(item[key]) for key in (*_KEYS, "position_ids") if item.get(key) is not None}
    places = row.pop("position_ids", None)
    segments = packed_segments(torch.tensor([places])) if places is not None else None
    if segments is None:
        parts = [row]
    else:
        number = segments[0].tolist()
        parts = [
            {key: [v for v, n in zip(values, number, strict=True) if n == part] for key, values in row.items()}
            for part in range(number[-1] + 1)
        ]
    return [{key: values[:max_length] for key, values in part.items()} for part in parts if part["input_ids"]]


def padded(rows: Sequence[Row], pad: int = 0) -> dict[str, Tensor]:
    """Return a batch, (rows, length), padded on the right, with a mask and without what no model takes.

    Args:
        rows: of `tokenised`.
        pad: the id of padding.

    Example:
        >>> padded([{"input_ids": [5, 6]}, {"input_ids": [7]}])["attention_mask"].tolist()
        [[1, 1], [1, 0]]
    """
    full = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    fills = {**_FILL, "input_ids": pad}
    batch = {}
    for key, fill in fills.items():
        if any(key in row for row in full):
            longest = max(len(row.get(key, ())) for row in full)
            batch[key] = torch.tensor(
                [[*row.get(key, ()), *[fill] * (longest - len(row.get(key, ())))] for row in full], dtype=torch.long
            )
    return batch


def _flat(values: Any) -> list[int]:
    found: list[int] = torch.as_tensor(values).flatten().tolist()
    return found
