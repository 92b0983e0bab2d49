"""Fingerprints of data by their content, so that an evaluation can be repeated on the same rows."""

import hashlib
import json
from collections.abc import Mapping

from datasets import ClassLabel, Dataset


def content_fingerprint(dataset: Dataset, columns: Mapping[str, str]) -> str:
    """Return the SHA-256 of the rows' content, the same on every machine and after any caching.

    Of each row a line of JSON: its roles in alphabetic order, ASCII, ended by a newline. The value with the role
    `label` is text: the class's name where the column has names, else the value as Python writes it. The order of
    the rows counts; names and other columns do not.

    Args:
        dataset: the rows.
        columns: role, such as `text` and `label`, to column.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> rows = Dataset.from_dict({"sentence": ["a"], "class": [0]})
        >>> named = rows.cast_column("class", ClassLabel(names=["no", "yes"]))
        >>> line = b'{"label": "no", "text": "a"}' + bytes([10])
        >>> found = content_fingerprint(named, {"text": "sentence", "label": "class"})
        >>> found == hashlib.sha256(line).hexdigest()
        True
    """
    feature = dataset.features[columns["label"]] if "label" in columns else None
    names = feature.names if isinstance(feature, ClassLabel) else None
    digest = hashlib.sha256()
    for batch in dataset.with_format(None).select_columns(sorted(set(columns.values()))).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns.values()), strict=True):
            row = dict(zip(columns, values, strict=True))
            if (label := row.get("label")) is not None:
                row["label"] = names[label] if names and label >= 0 else str(label)
            digest.update(f"{json.dumps(row, sort_keys=True)}\n".encode("ascii"))
    return digest.hexdigest()


def split_facts(dataset: Dataset, columns: Mapping[str, str], split: str) -> dict[str, int | str]:
    """Return what `recipe.json` says of a split: its rows, their content, and its name in the data set.

    Example:
        >>> split_facts(Dataset.from_dict({"text": ["a", "b"]}), {"text": "text"}, "train")["rows"]
        2
    """
    return {"rows": dataset.num_rows, "fingerprint": content_fingerprint(dataset, columns), "split": split}
