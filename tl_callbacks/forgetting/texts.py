"""Texts as a model is given them: tokenised once, one sample a row, padded on the right."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer

from tl_callbacks.reading.pooling import packed_segments

Row = dict[str, list[int]]
Labels = Literal["tokens", "target", "none"]

_FILL = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
_KEYS = (*_FILL, "special_tokens_mask")


def tokenizer_of(trainer: Trainer, given: Any) -> Any:
    """Return the tokenizer that was given, else the Trainer's, else None."""
    found = given if given is not None else trainer.processing_class
    return getattr(found, "tokenizer", found)  # a processor has one


def tokenised(item: Any, tokenizer: Any, max_length: int, *, labels: Labels = "none") -> list[Row]:
    """Return the samples of a text or of a tokenised row: one, several of a packed row, none of an empty one.

    Padding at either end is left out, where the row has an `attention_mask` that tells it.

    Args:
        item: a text, a mapping with `input_ids`, or one with `text`.
        tokenizer: for texts.
        max_length: tokens after which a sample ends.
        labels: what the labels of a row belong to: its "tokens", or another sequence, the "target"; "none" count.

    Raises:
        TypeError: it is none of these.
        ValueError: it is a text and there is no tokenizer, or it has more or fewer labels than tokens.

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
    keys = (*_KEYS, "position_ids")
    row = {key: _flat(item[key]) for key in keys if item.get(key) is not None and (key != "labels" or labels != "none")}
    target = {"labels": row.pop("labels")} if labels == "target" and "labels" in row else {}
    if "labels" in row and torch.as_tensor(item["labels"]).ndim == 0:
        row["labels"] = []  # a class, also of a row of one token
    for key, values in row.items():
        if len(values) != len(row["input_ids"]):
            advice = " A class is none: leave `labels` out of such rows." if key == "labels" else ""
            raise ValueError(
                f"the `{key}` of a row are {str(item[key])[:60]} and its `input_ids` {len(row['input_ids'])} tokens; "
                f"expected one for each token.{advice} The row: {str(item)[:60]!r}."
            )
    places = row.pop("position_ids", None)
    segments = packed_segments(torch.tensor([places])) if places is not None else None
    number = segments[0].tolist() if segments is not None else [0] * len(row["input_ids"])
    parts = []
    for sample in range(max(number, default=-1) + 1):
        own = {key: [v for v, n in zip(values, number, strict=True) if n == sample] for key, values in row.items()}
        if (part := _without_padding(own))["input_ids"]:
            parts.append({key: values[:max_length] for key, values in {**part, **target}.items()})
    return parts


def _without_padding(row: Row) -> Row:
    if "attention_mask" not in row:
        return row
    kept = [place for place, value in enumerate(row["attention_mask"]) if value]
    return {key: values[kept[0] : kept[-1] + 1] if kept else [] for key, values in row.items()}


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
