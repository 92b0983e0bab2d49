"""A small text-classification data set that needs no network: which package is this docstring from?

The texts are read from packages that are installed anyway, with `ast` and without importing them.
Near-duplicates never sit on both sides of the split, so a test score measures more than memory.
"""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import zip_longest

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from prose import content_hash, package_folder, plain_sentence, read_docstrings, similarities
from scipy.sparse.csgraph import connected_components

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

# What else gives a package away: regular expressions.
OTHER_NAMES = {"transformers": ("hugging ?face", "🤗"), "sklearn": ("scikit-?learn",)}


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
    folders = {package: folder for package in packages if (folder := package_folder(package))}
    names = list(folders)
    if len(names) < 2:
        raise ValueError(
            f"of `packages` {tuple(packages)} only {names} can be found, but a classification task "
            "needs two classes. Install another one of them, or name other packages."
        )

    pattern = _name_pattern(names)
    owners, spelling = defaultdict(set), {}
    for label, folder in enumerate(folders.values()):
        for docstring in read_docstrings(folder, max_files):
            if text := plain_sentence(docstring.strip().split("\n\n")[0], pattern):
                owners[text.lower()].add(label)
                spelling.setdefault(text.lower(), text)
    # In the order of their hashes, which mixes the packages.
    texts = sorted((spelling[key] for key, labels in owners.items() if len(labels) == 1), key=content_hash)
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
        content = content_hash(json.dumps([names, columns]))
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
    order = sorted(members.values(), key=lambda rows: content_hash("\n".join(texts[row] for row in rows)))
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


def _name_pattern(packages: list[str]) -> re.Pattern:
    """Return what matches a word with the name of a package in it, or a prefix such as `np.`."""
    names = [re.escape(package) for package in packages]
    for package in packages:
        names += OTHER_NAMES.get(package, ())
    word = rf"\w*(?:{'|'.join(names)})\w*(?:\.(?=\w))?"
    return re.compile(rf"{word}|\b(?:np|nx|pd|sp)\.(?=\w)", re.IGNORECASE)
