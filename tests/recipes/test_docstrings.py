"""The docstring data set: real texts, and two small packages whose every text is known."""

import doctest
import importlib
import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import docstrings
import numpy as np
import prose
import pytest
from docstrings import PACKAGES, draw, load_docstrings
from prose import read_docstrings, similarities

THRESHOLD = 0.65

NEW_PROCESS = """
import json
from docstrings import load_docstrings
splits = load_docstrings()
print(json.dumps({name: [split._fingerprint, split["text"][:]] for name, split in splits.items()}))
"""

ALPHA = '''
"""The text of a module is not used, however long it may be."""
raise RuntimeError("this file is read and never run")

PATTERN = "\\d"  # the compiler warns about this escape

def smooth():
    """Smooth a curve with the `alpha.window` of
    alpha, without changing its ends.

    A second paragraph is not used, nor is this one."""

class Garden:
    """Rows of :class:`~alpha.Plant` that somebody waters."""

    def harvest(self):
        """Bring in whatever is ripe before the frost comes."""

    def _dig(self):
        """Names that start with an underscore are left out."""

async def repeated():
    """Say it again, and again, and then once more."""

def shouted():
    """SAY IT AGAIN, and again, and then once more."""

def shared():
    """Copied from one package into the other one by hand."""

def brief():
    """Alpha alpha alpha alpha alpha alpha: too short."""

def prompt():
    """>>> this is an example and no natural sentence"""

def field():
    """Something follows :param width: the width of it all"""

def numbers():
    """The rows of the table are 1 2 3 4 5 6 7 8 9 10 11"""
'''
BETA = '''
def shared():
    """Copied from one package into the other one by hand."""

def first():
    """Open the window in the morning to let some air in."""

def second():
    """Carry the boxes down to the cellar one by one."""

def third():
    """Nobody has counted the bricks of this old chimney."""

def fourth():
    """Trains towards the coast leave every twenty minutes."""
'''
NOT_READ = '''
def hidden():
    """This sentence lies in a file that must not be read."""
'''
ALPHA_TEXTS = {
    "Smooth a curve with the window of, without changing its ends.",
    "Rows of Plant that somebody waters.",
    "Bring in whatever is ripe before the frost comes.",
    "Say it again, and again, and then once more.",
}


@pytest.fixture(scope="module")
def splits():
    return load_docstrings()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Two packages, `alpha` and `beta`, with four texts each."""
    for package, content in (("alpha", ALPHA), ("beta", BETA)):
        (tmp_path / package / "tests").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text(content, encoding="utf-8")
        (tmp_path / package / "tests" / "inside.py").write_text(NOT_READ, encoding="utf-8")
        (tmp_path / package / "broken.py").write_text(NOT_READ + "def (:", encoding="utf-8")
        (tmp_path / package / "latin.py").write_bytes(NOT_READ.encode() + b"# \xe9\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load_small(**options):
    defaults = {"packages": ("alpha", "beta"), "test_per_class": 1, "train_per_class": 3}
    return load_docstrings(**{**defaults, **options})


def num_leaks(test, train):
    """How many of the test texts have a near-duplicate in train."""
    similar = similarities([*test, *train], threshold=THRESHOLD)
    return len(set(similar[: len(test), len(test) :].nonzero()[0]))


def test_splits_are_balanced_and_typed(splits):
    assert list(splits) == ["train", "test"]
    for split, count in (("train", 150), ("test", 60)):
        features = splits[split].features
        assert splits[split].column_names == ["text", "label", "cluster"]
        assert features["label"].names == list(PACKAGES)
        assert (features["text"].dtype, features["cluster"].dtype) == ("string", "int64")
        assert Counter(splits[split]["label"]) == dict.fromkeys(range(9), count)


def test_texts_are_short_sentences_without_the_names(splits):
    texts = [*splits["train"]["text"], *splits["test"]["text"]]
    assert len({text.lower() for text in texts}) == len(texts) == 9 * 210
    assert min(map(len, texts)) >= 30
    assert max(map(len, texts)) <= 200
    assert min(len(text.split()) for text in texts) >= 5
    names = re.compile("|".join([*PACKAGES, "scikit-learn", r"\bnp\.", r"\bpd\."]), re.IGNORECASE)
    assert not [text for text in texts if names.search(text)]
    raw = read_docstrings(Path(np.__file__).parent, max_files=20)
    assert any(names.search(text) for text in raw)


def test_no_test_text_has_a_near_duplicate_in_train(splits):
    test, train = splits["test"]["text"][:], splits["train"]["text"][:]
    assert num_leaks(test, train) == 0
    mixed = [*test, *train]
    random.Random(0).shuffle(mixed)
    assert num_leaks(mixed[: len(test)], mixed[len(test) :]) > 0.15 * len(test)


def test_clusters_stay_whole(splits):
    train, test = splits["train"]["cluster"][:], splits["test"]["cluster"][:]
    assert not set(train) & set(test)
    assert len(set(train)) < len(train)
    texts, clusters = [*splits["train"]["text"], *splits["test"]["text"]], np.array([*train, *test])
    rows, columns = similarities(texts, threshold=THRESHOLD).nonzero()
    assert (clusters[rows] == clusters[columns]).all()
    assert (rows != columns).sum() > 100


def test_similarity_depends_on_the_two_texts_only():
    pair = ["sort the rows of a table", "Sort the row of a table"]
    alone = similarities(pair, threshold=0.1)[0, 1]
    among_others = similarities([*pair, "close a file", *["sort it"] * 5], threshold=0.1)[0, 1]
    assert among_others == pytest.approx(alone)
    assert 0.8 < alone < 0.99
    assert similarities(pair, threshold=0.99).nnz == 2


def test_a_new_process_builds_the_same_splits(splits):
    result = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS],
        cwd=Path(docstrings.__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    built = json.loads(result.stdout)
    for name, split in splits.items():
        assert built[name] == [split._fingerprint, split["text"][:]]
    assert splits["train"]._fingerprint != splits["test"]._fingerprint


def test_the_fingerprint_follows_the_content(small):
    before = load_small()["test"]._fingerprint
    assert load_small()["test"]._fingerprint == before
    assert load_small(packages=("beta", "alpha"))["test"]._fingerprint != before
    content = BETA.replace("Open", "Close").replace("Carry", "Roll")
    content = content.replace("Nobody", "No one").replace("Trains", "Buses")
    (small / "beta" / "__init__.py").write_text(content, encoding="utf-8")
    assert load_small()["test"]._fingerprint != before


def test_only_max_files_are_read(small):
    everything = set(read_docstrings(small / "beta", max_files=9))
    (small / "beta" / "more.py").write_text(NOT_READ, encoding="utf-8")
    one = set(read_docstrings(small / "beta", max_files=1))
    both = set(read_docstrings(small / "beta", max_files=9))
    assert len(everything) == 5
    assert len(both) == 6
    assert one < both
    with pytest.raises(ValueError, match="distinct texts in 1 files"):
        load_small(max_files=1, train_per_class=9)


def test_the_order_does_not_depend_on_any_seed(small):
    orders = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        orders.append(load_small()["train"]["text"][:])
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_only_public_sentences_of_one_package_are_kept(small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load_small()
    texts = [*splits["train"]["text"], *splits["test"]["text"]]
    labels = [*splits["train"]["label"], *splits["test"]["label"]]
    found = {text for text, label in zip(texts, labels, strict=True) if label == 0}
    assert {text.lower() for text in found} == {text.lower() for text in ALPHA_TEXTS}


def test_packages_are_not_imported(small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the escape
        load_small()
        with pytest.raises(RuntimeError, match="never run"):
            importlib.import_module("alpha")


def test_a_readable_file_outside_tests_adds_its_texts(small):
    with pytest.raises(ValueError, match="package `alpha` has 4 distinct texts"):
        load_small(train_per_class=4)
    (small / "alpha" / "more.py").write_text(NOT_READ, encoding="utf-8")
    other = NOT_READ.replace(
        "This sentence lies in a file that must not be read", "Nobody has seen a stone fly upwards"
    )
    (small / "beta" / "more.py").write_text(other, encoding="utf-8")
    assert load_small(train_per_class=4)["train"].num_rows == 8


def test_near_duplicates_share_a_side_even_across_packages(small):
    (small / "alpha" / "more.py").write_text(NOT_READ, encoding="utf-8")
    (small / "beta" / "more.py").write_text(NOT_READ.replace("lies", "lay"), encoding="utf-8")
    sides = {}
    for threshold in (0.65, 1.0):
        splits = load_small(threshold=threshold)
        rows = [(name, row) for name, split in splits.items() for row in split]
        pair = [(name, row["cluster"]) for name, row in rows if "must not be" in row["text"]]
        sides[threshold] = len(set(pair))
    assert sides == {0.65: 1, 1.0: 2}


def test_one_text_stands_for_its_cluster_in_test(splits):
    assert len(set(splits["test"]["cluster"])) == splits["test"].num_rows
    assert len(set(splits["train"]["cluster"])) < splits["train"].num_rows
    assert not set(splits["test"]["cluster"]) & set(splits["train"]["cluster"])


@pytest.mark.parametrize("n", [9, 50, 200])
def test_a_draw_is_balanced(splits, n):
    drawn = draw(splits["train"], n, seed=0)
    counts = Counter(drawn["label"])
    assert drawn.num_rows == n == len(set(drawn["text"]))
    assert len(counts) == 9
    assert max(counts.values()) - min(counts.values()) == (n % 9 > 0)
    first = Counter(splits["train"]["label"][:n])
    assert max(first.values()) - min(first.values()) > 1


def test_draws_are_nested_and_follow_the_seed(splits):
    train = splits["train"]
    small, large = draw(train, 50, seed=3), draw(train, 200, seed=3)
    assert large["text"][:50] == small["text"][:]
    assert draw(train, 50, seed=3)._fingerprint == small._fingerprint
    other = draw(train, 50, seed=4)
    assert len(set(other["text"]) & set(small["text"])) < 25
    assert set(draw(train, len(train), seed=4)["text"]) == set(train["text"])
    extra = {tuple(sorted(Counter(draw(train, 50, seed)["label"]).items())) for seed in range(5)}
    assert len(extra) > 1


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (8, r"`n` is 8, but `train` has 9 classes .* Pass 9"),
        (1351, r"`n` is 1351, but `train` holds 1350 texts.*train_per_class"),
    ],
)
def test_impossible_draws_are_refused(splits, n, message):
    with pytest.raises(ValueError, match=message):
        draw(splits["train"], n, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packages": ("alpha", "absent")}, r"only \['alpha'\] can be found.* two classes"),
        ({"train_per_class": 9}, r"`alpha` has 4 .*1 for test and 3 .* 1 and 9 .*`max_files`"),
        ({"test_per_class": 0}, r"`test_per_class` is 0.* 1 or more"),
        ({"max_files": -1}, r"`max_files` is -1.* 1 or more"),
        ({"threshold": 0.0}, r"`threshold` is 0.0.* \(0, 1\]"),
        ({"threshold": 1.1}, r"`threshold` is 1.1.* \(0, 1\]"),
    ],
)
def test_impossible_data_sets_are_refused(small, options, message):
    assert load_small()["test"].num_rows == 2
    with pytest.raises(ValueError, match=message):
        load_small(**options)


def test_packages_without_any_text_are_refused(small):
    for package in ("alpha", "beta"):
        (small / package / "__init__.py").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="package `alpha` has 0 distinct texts"):
        load_small()


def test_packages_that_are_not_installed_are_left_out(small):
    splits = load_small(packages=("absent", "alpha", "beta"))
    assert splits["test"].features["label"].names == ["alpha", "beta"]


def test_examples_run():
    results = [doctest.testmod(module) for module in (docstrings, prose)]
    assert (sum(result.attempted for result in results) >= 8, sum(result.failed for result in results)) == (True, 0)
