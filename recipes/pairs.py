"""Text pairs for what a sentence model could do before: which paragraph follows this first line of a docstring?

They come from installed packages that the classification of `docstrings.py` does not read: finding the right one is
something that the pretrained model can do and that fine-tuning is not told to keep.
"""

import json
from collections.abc import Sequence

from datasets import Dataset
from docstrings import PACKAGES as TASK_PACKAGES
from prose import content_hash, package_folder, plain_sentence, read_docstrings, similarities

PACKAGES = (
    "accelerate",
    "datasets",
    "evaluate",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "joblib",
    "jsonschema",
    "matplotlib",
    "peft",
    "sentence_transformers",
)


def load_pairs(
    count: int = 200,
    *,
    packages: Sequence[str] = PACKAGES,
    apart_from: Sequence[str] = (),
    max_files: int = 100,
    threshold: float = 0.65,
) -> Dataset:
    """Build pairs from the docstrings of installed packages: the first line, and the paragraph that follows it.

    Both are whole sentences of plain prose. No text is a near-duplicate of another one, of its own partner neither. All
    choices follow hashes of the content: the same installed packages give the same pairs.

    Args:
        count: pairs, one or more.
        packages: top-level packages, less those that are not installed; none of those that the task reads.
        apart_from: texts of which no near-duplicate may be among the pairs, such as those of the task.
        max_files: files read of each package, chosen by the hash of their path.
        threshold: similarity, in (0, 1], from which on two texts are near-duplicates.

    Returns:
        `count` rows with the columns `query` and `document`.

    Raises:
        ValueError: a number is out of range, one of `packages` is read by the task, or there are too few pairs.

    Example:
        >>> pairs = load_pairs(20, packages=("fsspec", "joblib"))
        >>> pairs.num_rows, pairs.column_names
        (20, ['query', 'document'])
    """
    if min(count, max_files) < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"`count` is {count}, `max_files` is {max_files} and `threshold` is {threshold}; expected 1 or more, and a "
            "threshold in (0, 1]. Leave an argument out to have its default."
        )
    if shared := sorted({*packages} & {*TASK_PACKAGES}):
        raise ValueError(f"`packages` names `{shared[0]}`, whose docstrings are the task's texts. Name other packages.")
    folders = [folder for package in packages if (folder := package_folder(package))]
    found = {
        pair for folder in folders for docstring in read_docstrings(folder, max_files) if (pair := _pair(docstring))
    }
    pairs = sorted(found, key=lambda pair: content_hash("\n".join(pair)))
    kept = _distinct(pairs, list(apart_from), threshold)[:count]
    if len(kept) < count:
        raise ValueError(
            f"{len(folders)} of the {len(packages)} `packages` are installed and give {len(kept)} distinct pairs, but "
            f"`count` is {count}. Lower it, raise `max_files`, or install and name other packages."
        )
    columns = {"query": [pair[0] for pair in kept], "document": [pair[1] for pair in kept]}
    return Dataset.from_dict(columns).select(range(count), new_fingerprint=content_hash(json.dumps(columns)))


def _pair(docstring: str) -> tuple[str, str] | None:
    """Return the first line and the paragraph behind it, or None where one of them is no sentence."""
    paragraphs = docstring.strip().split("\n\n")
    if len(paragraphs) < 2 or "\n" in paragraphs[0]:
        return None
    query, document = plain_sentence(paragraphs[0]), plain_sentence(paragraphs[1])
    # A colon announces what is left out: a list, or code.
    return (query, document) if query and document and not document.endswith(":") else None


def _distinct(pairs: list[tuple[str, str]], others: list[str], threshold: float) -> list[tuple[str, str]]:
    """Return the pairs, in their order, that have no near-duplicate among those before them or in `others`."""
    if not pairs:
        return []
    texts = [text for pair in pairs for text in pair] + others
    similar = similarities([text.lower() for text in texts], threshold=threshold)
    taken, kept = {*range(2 * len(pairs), len(texts))}, []
    for number, pair in enumerate(pairs):
        places = (2 * number, 2 * number + 1)
        near = {int(row) for place in places for row in similar[place].indices}
        if not near & taken and similar[places[0], places[1]] == 0:
            taken.update(places)
            kept.append(pair)
    return kept
