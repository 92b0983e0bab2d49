"""The text pairs that retention is measured on: real ones, and a small package whose every pair is known."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import docstrings
import pairs
import pytest
from datasets import Dataset
from docstrings import load_docstrings
from pairs import PACKAGES, load_pairs
from prose import similarities

THRESHOLD = 0.65
FEW = ("fsspec", "joblib")
GAMMA = '''
def kept():
    """Water the plants on the balcony every evening.

    They dry out within a day when the
    sun shines, so `nobody` should forget them.

    A third paragraph is not used, nor is this one."""

def again():
    """Water the plants on the balcony in every evening.

    Its first line is a near-duplicate of another one."""

def same():
    """Shut the gate to the meadow behind the house.

    Shut the gates to the meadow behind the house."""

def alone():
    """A first line that has nothing at all behind it."""

def long():
    """A first sentence that goes on and on
    over a second line of the docstring.

    And a paragraph that would have been good enough."""

def arguments():
    """Paint the fence of the garden in another colour.

    Args:
        colour: any colour that somebody likes well."""

def listed():
    """Name the birds that were seen here this morning.

    There were more of them than on other mornings:"""

def other():
    """Sharpen the knives in the drawer of the kitchen.

    The whetstone lies beside them and wants some water."""
'''
KEPT = {
    "Water the plants on the balcony every evening.": (
        "They dry out within a day when the sun shines, so nobody should forget them."
    ),
    "Sharpen the knives in the drawer of the kitchen.": "The whetstone lies beside them and wants some water.",
}


@pytest.fixture(scope="module")
def task() -> list[str]:
    return [text for split in load_docstrings(test_per_class=54).values() for text in split["text"]]


@pytest.fixture(scope="module")
def real(task: list[str]) -> Dataset:
    """The pairs of the demo."""
    return load_pairs(apart_from=task)


@pytest.fixture
def gamma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "gamma"
    folder.mkdir()
    (folder / "__init__.py").write_text(GAMMA)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_pairs_are_distinct_sentences(real: Dataset) -> None:
    assert (real.num_rows, real.column_names) == (200, ["query", "document"])
    texts = [*real["query"], *real["document"]]
    assert min(map(len, texts)) >= 30
    assert max(map(len, texts)) <= 200
    similar = similarities([text.lower() for text in texts], threshold=THRESHOLD)
    rows, columns = similar.nonzero()
    assert (rows == columns).all()
    assert similar.nnz == 400
    shifted = similarities([text.lower() for text in texts], threshold=0.2)
    assert shifted.nnz > 800  # control: there are some that are a little alike


def test_no_pair_is_a_near_duplicate_of_the_tasks_texts(real: Dataset, task: list[str]) -> None:
    assert not {*PACKAGES} & {*docstrings.PACKAGES}
    texts = [*real["query"], *real["document"]]
    similar = similarities([text.lower() for text in [*texts, *task]], threshold=THRESHOLD)
    assert similar[: len(texts), len(texts) :].nnz == 0


def test_what_is_to_be_apart_is_kept_out() -> None:
    plain = load_pairs(20, packages=FEW)
    query, document = plain[0]["query"], plain[0]["document"]
    for text in (query, query.upper(), query + " Too", document):
        assert query not in load_pairs(20, packages=FEW, apart_from=[text])["query"][:]


def test_a_new_process_builds_the_same_pairs_and_fewer_are_the_first_of_them() -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"from pairs import load_pairs; print(load_pairs(20, packages={FEW})._fingerprint)"],
        cwd=Path(docstrings.__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, fewer = load_pairs(20, packages=FEW), load_pairs(10, packages=FEW)
    assert result.stdout.strip() == found._fingerprint != fewer._fingerprint
    assert fewer["query"][:] == found["query"][:10]


def test_first_lines_and_the_paragraphs_behind_them(gamma: Path) -> None:
    found = load_pairs(2, packages=("gamma", "absent"))
    first = {"Water the plants on the balcony every evening.", "Water the plants on the balcony in every evening."}
    rows = dict(zip(found["query"], found["document"], strict=True))
    assert len(first & set(rows)) == 1  # one of two near-duplicates
    assert {query: rows.get(query) for query in KEPT if query not in first} == {
        query: document for query, document in KEPT.items() if query not in first
    }
    (gamma / "__init__.py").write_text(GAMMA.replace("balcony in every evening", "roof, and those in the hall"))
    more = load_pairs(3, packages=("gamma",))
    assert KEPT.items() <= dict(zip(more["query"], more["document"], strict=True)).items()


def test_bad_arguments_are_refused(gamma: Path) -> None:
    with pytest.raises(ValueError, match="1 of the 2 `packages` are installed and give 2 distinct pairs, but `count`"):
        load_pairs(9, packages=("gamma", "absent"))
    with pytest.raises(ValueError, match="0 of the 1 `packages` are installed and give 0 distinct pairs"):
        load_pairs(9, packages=("absent",))
    with pytest.raises(ValueError, match="`packages` names `numpy`, whose docstrings are the task's texts"):
        load_pairs(9, packages=("numpy", "gamma"))
    with pytest.raises(ValueError, match=r"`count` is 0, `max_files` is 100 and `threshold` is 0\.65; expected 1 or"):
        load_pairs(0)


def test_examples_run() -> None:
    result = doctest.testmod(pairs)
    assert (result.attempted, result.failed) == (2, 0)
