"""Sentences from the docstrings of installed packages, read with `ast` and without importing them."""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer

# Tests, and copies of other packages' code, which would carry the wrong label.
SKIPPED_FOLDERS = re.compile(
    r"tests?|_?testing|idlelib|lib2to3|(site|dist)-packages"
    r"|_?externals?|_vendor(ed)?|vendored_templates|array_api_(compat|extra)"
)

ROLE_OR_QUOTE = re.compile(r":[\w:]+:`[~!]?([^`<]*)[^`]*`|\[\w+\]_|`")
MARKUP = re.compile(
    r">>>|:\w+[ :]|\):|@|::|--|==|\.\. |https?:|[{}\\$|]"
    r"|\b(?:Args|Arguments|Returns?|Parameters|Raises|Examples?|Notes?|Usage):"
)


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package, found without importing it."""
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    is_package = spec and spec.origin and spec.submodule_search_locations
    return Path(spec.origin).parent if is_package else None


def read_docstrings(folder: Path, max_files: int) -> Iterator[str]:
    """Yield the docstrings of the public functions, classes and methods below `folder`."""
    files = []
    for parent, subfolders, leaves in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not SKIPPED_FOLDERS.fullmatch(name)]
        files += [Path(parent, leaf) for leaf in leaves if leaf.endswith(".py")]
    files.sort(key=lambda file: content_hash(file.relative_to(folder).as_posix()))
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


def plain_sentence(paragraph: str, names: re.Pattern | None = None) -> str | None:
    r"""Return a paragraph of a docstring as plain text, without `names`, or None where it is no sentence.

    Example:
        >>> plain_sentence("Sort the `rows` of a table,\nthe smallest first.")
        'Sort the rows of a table, the smallest first.'
    """
    text = ROLE_OR_QUOTE.sub(r"\1", paragraph)
    if MARKUP.search(text):
        return None
    text = " ".join((names.sub(" ", text) if names else text).split())
    text = re.sub(r" ([.,;:)])(?= |$)", r"\1", text)
    num_letters = sum(character.isalpha() or character == " " for character in text)
    num_words = len(re.findall(r"\S*[^\W\d_]{2}\S*", text))
    natural = 30 <= len(text) <= 200 and num_words >= 5 and num_letters >= 0.85 * len(text)
    return text if natural else None


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


def content_hash(text: str) -> str:
    """Return a hash that is the same in every process, unlike `hash`."""
    return hashlib.sha256(text.encode()).hexdigest()
