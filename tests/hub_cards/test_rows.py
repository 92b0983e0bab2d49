"""Fingerprints of data: the content counts, and nothing else."""

import doctest
import hashlib
from typing import Any

import fingerprints
import pytest
import revisions
from datasets import ClassLabel, Dataset, Features, Value

from hub_cards import content_fingerprint

COLUMNS = {"text": "text", "label": "label"}
NAMED = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))


def made(**columns: Any) -> Dataset:
    return Dataset.from_dict({"text": ["a", "\u00e9\n"], "label": [0, 1], **columns}, features=None)


def test_it_is_the_hash_of_lines_that_can_be_written_by_hand() -> None:
    lines = b'{"label": "no", "text": "a"}\n{"label": "yes", "text": "\\u00e9\\n"}\n'
    named = made().cast(NAMED)
    assert content_fingerprint(named, COLUMNS) == hashlib.sha256(lines).hexdigest()
    assert content_fingerprint(made(label=["no", "yes"]), COLUMNS) == hashlib.sha256(lines).hexdigest()
    other = named.rename_columns({"text": "b", "label": "a"})
    assert content_fingerprint(other, {"label": "a", "text": "b"}) == hashlib.sha256(lines).hexdigest()
    assert content_fingerprint(made(more=[1, 2]).with_format("numpy"), COLUMNS) == content_fingerprint(made(), COLUMNS)


@pytest.mark.parametrize(
    "other",
    [
        made(text=["a", "b"]),
        made(label=[0, 0]),
        made().select([1, 0]),
        made().select([0]),
        made(text=["a", None]),
        made(label=[0, None]),
        made().cast(NAMED),
    ],
)
def test_any_other_content_has_another(other: Dataset) -> None:
    assert content_fingerprint(other, COLUMNS) != content_fingerprint(made(), COLUMNS)


def test_more_rows_than_a_batch_and_rows_that_were_chosen() -> None:
    rows = Dataset.from_dict({"text": [str(n) for n in range(2500)], "label": [n % 2 for n in range(2500)]})
    lines = "".join(f'{{"label": "{n % 2}", "text": "{n}"}}\n' for n in range(2500))
    assert content_fingerprint(rows, COLUMNS) == hashlib.sha256(lines.encode()).hexdigest()
    shuffled = rows.shuffle(seed=0)
    back = shuffled.select(sorted(range(2500), key=lambda n: int(shuffled[n]["text"])))
    assert back._fingerprint != rows._fingerprint
    assert content_fingerprint(back, COLUMNS) == content_fingerprint(rows, COLUMNS)


@pytest.mark.parametrize("module", [fingerprints, revisions])
def test_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
