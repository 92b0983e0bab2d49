"""A small text-classification data set that needs no network: which package is this docstring from?

The texts are read from packages that are installed anyway, with `ast` and without importing them.
Near-duplicates never sit on both sides of the split, so a test score measures more than memory.
"""

import ast
import hashlib
import importlib.util
import json
import os
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import scipy.sparse
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import TfidfVectorizer

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "sklearn",
    "pandas",
    "sympy",
    "networkx",
    "python",
)

# Tests, and copies of other packages' code, which would carry the wrong label.
SKIPPED_FOLDERS = re.compile(
    r"tests?|_?testing|idlelib|lib2to3|(site|dist)-packages"
    r"|_?externals?|_vendor(ed)?|vendored_templates|array_api_(compat|extra)"
)
# What else gives a package away: regular expressions.
OTHER_NAMES = {"transformers": ("hugging ?face", "🤗"), "sklearn": ("scikit-?learn",)}

ROLE_OR_QUOTE = re.compile(r":[\w:]+:`[~!]?([^`<]*)[^`]*`|\[\w+\]_|`")
MARKUP = re.compile(
    r">>>|:\w+[ :]|\):|@|::|--|==|\.\. |https?:|[{}\\$|]"
    r"|\b(?:Args|Arguments|Returns?|Parameters|Raises|Examples?|Notes?|Usage):"
)


def load_docstrings(
    *,
    packages: tuple[str, ...] = PACKAGES,
    test_per_class: int = 60,
    train_per_class: int = 150,
    max_files: int = 100,
    threshold: float = 0.65,
) -> DatasetDict:
    """Build the splits `train` and `test` from the docstrings of the installed packages.

    A text is the first paragraph of the docstring of a public function, class or method, without
    the names of the packages. Exact duplicates are removed, and texts that occur in two packages.
    Near-duplicates are clustered, and a cluster goes to one split or to none: whole to `train`, by
    one of its texts to `test`, whose texts so are independent. All choices follow hashes of the
    content: the same installed packages give the same splits.

    Args:
        packages: top-level packages, one class each, less those that are not installed; `python`
            is the standard library.
        test_per_class: texts of each class in `test`.
        train_per_class: texts of each class in `train`, the pool that `draw` draws from.
        max_files: files read of each package, chosen by the hash of their path.
        threshold: similarity, in (0, 1], from which on two texts are near-duplicates (see
            `similarities`). At 0.65 they differ in a few words; at 0.5 chains of them join a third
            of all texts.

    Returns:
        Splits with the columns `text`, `label` and `cluster`: texts with the same number are
        near-duplicates, to be kept together when `train` is split further.

    Raises:
        ValueError: a number is out of range, fewer than two of `packages` are installed, or one
            of them has too few texts.

    Example:
        >>> splits = load_docstrings(packages=("numpy", "python"), train_per_class=100)
        >>> splits["test"].num_rows, splits["train"].features["label"].names
        (120, ['numpy', 'python'])
    """
    counts = {"test": test_per_class, "train": train_per_class}
    if min(test_per_class, train_per_class, max_files) < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"`test_per_class` is {test_per_class}, `train_per_class` is {train_per_class}, "
            f"`max_files` is {max_files} and `threshold` is {threshold}; expected 1 or more, and a "
            "threshold in (0, 1]. Leave an argument out to have its default."
        )
    folders = {package: folder for package in packages if (folder := _package_folder(package))}
    names = list(folders)
    if len(names) < 2:
        raise ValueError(
            f"of `packages` {tuple(packages)} only {names} can be found, but a classification task "
            "needs two classes. Install another one of them, or name other packages."
        )

    pattern = _name_pattern(names)
    owners, spelling = defaultdict(set), {}
    for label, folder in enumerate(folders.values()):
        for docstring in _read_docstrings(folder, max_files):
            if text := _clean(docstring, pattern):
                owners[text.lower()].add(label)
                spelling.setdefault(text.lower(), text)
    # In the order of their hashes, which mixes the packages.
    texts = sorted((spelling[key] for key, labels in owners.items() if len(labels) == 1), key=_hash)
    labels = [min(owners[text.lower()]) for text in texts]

    clusters = {split: {} for split in counts}
    if texts:
        clusters = _split_clusters(texts, labels, counts, threshold)
    for label, package in enumerate(names):
        found = {split: sum(labels[row] == label for row in clusters[split]) for split in counts}
        if found != counts:
            raise ValueError(
                f"package `{package}` has {labels.count(label)} distinct texts in {max_files} "
                f"files: {found['test']} for test and {found['train']} for train, but "
                f"{test_per_class} and {train_per_class} are needed. Raise `max_files`, lower "
                "`test_per_class` or `train_per_class`, or leave it out of `packages`."
            )

    label_type = ClassLabel(names=names)
    features = Features(text=Value("string"), label=label_type, cluster=Value("int64"))
    splits = DatasetDict()
    for split in ("train", "test"):
        rows = sorted(clusters[split])
        columns = {
            "text": [texts[row] for row in rows],
            "label": [labels[row] for row in rows],
            "cluster": [clusters[split][row] for row in rows],
        }
        dataset = Dataset.from_dict(columns, features=features)
        content = _hash(json.dumps([names, columns]))
        splits[split] = dataset.select(range(len(rows)), new_fingerprint=content)
    return splits


def draw(train: Dataset, n: int, seed: int) -> Dataset:
    """Return `n` labelled texts of `train`, the same number of each class give or take one.

    The draws of one seed are nested: the first 50 rows of `draw(train, 200, seed)` are
    `draw(train, 50, seed)`, so that a learning curve over `n` only ever adds texts.

    Args:
        train: the pool, with a column `label` of type `ClassLabel`.
        n: texts to draw, from the number of classes to the size of the pool.
        seed: decides which texts, and which classes have one more.

    Returns:
        `n` rows of `train`, the classes taking turns.

    Raises:
        ValueError: `n` is smaller than the number of classes, or larger than the pool.

    Example:
        >>> features = Features(label=ClassLabel(names=["no", "yes"]))
        >>> pool = Dataset.from_dict({"label": [0, 1, 1, 1, 0, 1]}, features=features)
        >>> sorted(draw(pool, 4, seed=0)["label"])
        [0, 0, 1, 1]
    """
    labels, num_classes = train["label"][:], train.features["label"].num_classes
    if n < num_classes:
        raise ValueError(
            f"`n` is {n}, but `train` has {num_classes} classes and a text of each is drawn. "
            f"Pass {num_classes} or a larger number."
        )
    if n > len(labels):
        raise ValueError(
            f"`n` is {n}, but `train` holds {len(labels)} texts. "
            "Pass a smaller one, or build a larger pool with load_docstrings(train_per_class=...)."
        )
    generator = random.Random(seed)
    rows = generator.sample(range(len(labels)), len(labels))
    classes = generator.sample(range(num_classes), num_classes)
    queues = [[row for row in rows if labels[row] == label] for label in classes]
    turns = [row for turn in zip_longest(*queues) for row in turn if row is not None]
    return train.select(turns[:n])


def similarities(texts: list[str], *, threshold: float) -> scipy.sparse.csr_matrix:
    """Return the similarity of each two texts, where it is `threshold` or more.

    The cosine between counts of four-character pieces, words padded with spaces. The counts are
    not weighted by rarity, so that the similarity of two texts depends on these two only.

    Args:
        texts: N texts.
        threshold: similarities below it are left out.

    Returns:
        Symmetric and sparse, in [0, 1], 1 on the diagonal, shape (N, N).

    Example:
        >>> texts = ["sort the rows of a table", "Sort the row of a table", "open a file"]
        >>> similarities(texts, threshold=0.65).toarray().round(1).tolist()
        [[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(4, 4), use_idf=False)
    pieces = vectorizer.fit_transform(texts)
    blocks = []
    for start in range(0, len(texts), 1000):  # the whole product is almost dense
        block = pieces[start : start + 1000] @ pieces.T
        block.data[block.data < threshold] = 0
        block.eliminate_zeros()
        blocks.append(block)
    return scipy.sparse.vstack(blocks, format="csr")


def _split_clusters(
    texts: list[str],
    labels: list[int],
    counts: dict[str, int],
    threshold: float,
) -> dict[str, dict[int, int]]:
    """Return the rows of each split in `counts`, with the number of their cluster."""
    _, components = connected_components(similarities(texts, threshold=threshold), directed=False)
    members = defaultdict(list)
    for row, component in enumerate(components):
        members[component].append(row)
    # The hash of the whole cluster: the smallest hash of its texts would put large ones first.
    order = sorted(members.values(), key=lambda rows: _hash("\n".join(texts[row] for row in rows)))
    room = {split: Counter(dict.fromkeys(labels, count)) for split, count in counts.items()}
    clusters = {split: {} for split in counts}
    for number, cluster in enumerate(order):
        for split in counts:
            # Intervals over test texts take them for independent: one text stands for its cluster there.
            rows = cluster[:1] if split == "test" else cluster
            needed = Counter(labels[row] for row in rows)
            if needed <= room[split]:
                room[split] -= needed
                clusters[split].update(dict.fromkeys(rows, number))
                break
    return clusters


def _clean(docstring: str, names: re.Pattern) -> str | None:
    """Return the first paragraph as plain text without `names`, or None where it is no sentence."""
    text = ROLE_OR_QUOTE.sub(r"\1", docstring.strip().split("\n\n")[0])
    if MARKUP.search(text):
        return None
    text = " ".join(names.sub(" ", text).split())
    text = re.sub(r" ([.,;:)])(?= |$)", r"\1", text)
    num_letters = sum(character.isalpha() or character == " " for character in text)
    num_words = len(re.findall(r"\S*[^\W\d_]{2}\S*", text))
    natural = 30 <= len(text) <= 200 and num_words >= 5 and num_letters >= 0.85 * len(text)
    return text if natural else None


def _name_pattern(packages: list[str]) -> re.Pattern:
    """Return what matches a word with the name of a package in it, or a prefix such as `np.`."""
    names = [re.escape(package) for package in packages]
    for package in packages:
        names += OTHER_NAMES.get(package, ())
    word = rf"\w*(?:{'|'.join(names)})\w*(?:\.(?=\w))?"
    return re.compile(rf"{word}|\b(?:np|nx|pd|sp)\.(?=\w)", re.IGNORECASE)


def _package_folder(package: str) -> Path | None:
    """Return the folder of an installed package, found without importing it."""
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    is_package = spec and spec.origin and spec.submodule_search_locations
    return Path(spec.origin).parent if is_package else None


def _read_docstrings(folder: Path, max_files: int) -> Iterator[str]:
    """Yield the docstrings of the public functions, classes and methods below `folder`."""
    files = []
    for parent, subfolders, leaves in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not SKIPPED_FOLDERS.fullmatch(name)]
        files += [Path(parent, leaf) for leaf in leaves if leaf.endswith(".py")]
    files.sort(key=lambda file: _hash(file.relative_to(folder).as_posix()))
    for file in files[:max_files]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in other people's files
                nodes = [ast.parse(file.read_text(encoding="utf-8"))]
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in nodes:  # grows: statements only, because ast.walk takes as long as parsing
            nodes.extend(getattr(node, "body", ()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node)
                if docstring and not node.name.startswith("_"):
                    yield docstring


def _hash(text: str) -> str:
    """Return a hash that is the same in every process, unlike `hash`."""
    return hashlib.sha256(text.encode()).hexdigest()
