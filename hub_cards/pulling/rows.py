"""The rows that a card was evaluated on: found again, and recognised by their content."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, load_dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from hub_cards.facts import Data, RunFacts, Split
from hub_cards.paths import is_repo_id
from hub_cards.pulling.loading import shortened

# Not `load_dataset("csv")`, which tells a server of it.
READERS: Mapping[str, Callable[[str], Dataset]] = {
    ".csv": Dataset.from_csv,
    ".tsv": partial(Dataset.from_csv, sep="\t"),
    ".json": Dataset.from_json,
    ".jsonl": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}


def find_rows(facts: RunFacts, split: str, data: Dataset | str | Path | None, token: str | None = None) -> Dataset:
    """Return the rows that a split of the card was evaluated on, after their content was compared.

    Raises:
        ValueError: the data are local and `data` is None, or their name is that of something on this machine, or they
            are not those of the card.
    """
    known = facts.data
    assert known is not None
    expected = known.splits[split]
    if data is None and (known.local or known.name is None):
        raise ValueError(
            f"the card was evaluated on `{known.name}`, a file of another machine; pass data= with these "
            f"{expected.rows} rows, whose content has the SHA-256 {(expected.fingerprint or 'not recorded')[:16]}."
        )
    rows = _load(known, expected, split, data, token)
    missing = set(known.columns.values()) - set(rows.column_names)
    if missing or not known.columns:
        raise ValueError(f"the data have no column {shortened(missing)}; expected {shortened(known.columns.values())}.")
    candidates = [rows]
    held = facts.preprocessing.get("validation_split_percentage")
    if held is not None:  # training held the rows out of `train`
        seed = facts.preprocessing.get("split_seed")
        candidates.append(rows.train_test_split(test_size=held / 100, seed=seed)["test"])
    found = [content_fingerprint(candidate, known.columns) for candidate in candidates]
    if expected.fingerprint not in found:
        recorded = f"{expected.fingerprint[:16]} of {expected.rows} rows" if expected.fingerprint else "one on the card"
        raise ValueError(
            f"the {rows.num_rows} rows are not those of `{split}` on the card: their content has the SHA-256 "
            f"{found[0][:16]}, expected {recorded}. Give the rows that the run was evaluated on as data=."
        )
    return candidates[found.index(expected.fingerprint)]


def content_fingerprint(rows: Dataset, columns: Mapping[str, str]) -> str:
    """Return the SHA-256 of the rows' content, the same on every machine and after any caching.

    Of each row a line of JSON: its roles in alphabetic order, ASCII, ended by a newline. The value with the role
    `label` is text: the class's name where the column has names, else the value as Python writes it.

    Args:
        rows: the data; their order counts.
        columns: role, such as `text` and `label`, to column.

    Example:
        >>> rows = Dataset.from_dict({"text": ["a"], "class": ["no"]})
        >>> found = content_fingerprint(rows, {"text": "text", "label": "class"})
        >>> found == hashlib.sha256(b'{"label": "no", "text": "a"}' + bytes([10])).hexdigest()
        True
    """
    digest = hashlib.sha256()
    plain = rows.with_format(None).select_columns(sorted(set(columns.values())))
    for batch in plain.iter(batch_size=1000):
        values = {role: batch[column] for role, column in columns.items()}
        if "label" in columns:
            values["label"] = _as_text(rows, columns["label"], values["label"])
        for row in zip(*values.values(), strict=True):
            digest.update(f"{json.dumps(dict(zip(values, row, strict=True)), sort_keys=True)}\n".encode("ascii"))
    return digest.hexdigest()


def label_names(rows: Dataset, column: str) -> list[str | None]:
    """Return the labels of rows as text: the class's name where the column has names.

    Example:
        >>> label_names(Dataset.from_dict({"label": [0, 1]}), "label")
        ['0', '1']
    """
    return _as_text(rows, column, rows.with_format(None)[column])


def _as_text(rows: Dataset, column: str, values: Iterable[Any]) -> list[str | None]:
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    return [None if value is None else names[value] if names and value >= 0 else str(value) for value in values]


def _load(known: Data, expected: Split, split: str, data: Dataset | str | Path | None, token: str | None) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if data is None:
        name = known.name or ""
        if not is_repo_id(name) or name in _PACKAGED_DATASETS_MODULES or Path(name).exists():
            raise ValueError(
                f"the card was evaluated on the data set `{name}`, which `datasets` would read from this machine; "
                "expected a name on the Hub, `owner/name`, that no folder here has. Give the rows as data=."
            )
        with _quiet_datasets():
            return load_dataset(
                known.name, known.config, split=expected.source or split, revision=known.revision, token=token
            )
    suffix = Path(data).suffix.lower()
    if suffix not in READERS or not Path(data).is_file():
        raise ValueError(f"`data` is `{data}`; expected a file that is there and ends in one of {', '.join(READERS)}.")
    return READERS[suffix](str(data))


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Ask nobody but the Hub: `datasets` counts downloads elsewhere, and looks for copies at a viewer."""
    names = ("HF_UPDATE_DOWNLOAD_COUNTS", "USE_PARQUET_EXPORT")
    before = {name: getattr(datasets.config, name) for name in names}
    try:
        for name in names:
            setattr(datasets.config, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(datasets.config, name, value)
