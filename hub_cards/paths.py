"""Local paths: what is one, and facts without them."""

import re
from typing import Any

# Two parts at least, and not behind a word, a colon, a dot or a slash: no part of a URL, `org/name` or `../x/y`.
_PART = r"[^\s/\\\"'`<>|,;:]+"
_POSIX = rf"(?<![\w.:/~\-])(?:file://)?(?:~[\w.\-]*)?/(?:{_PART}/)+(?:{_PART})?|(?<![\w.:/~\-])~[\w.\-]*/(?:{_PART})?"
_WINDOWS = rf"(?<!\w)[A-Za-z]:[\\/]+(?:{_PART}[\\/]+)*(?:{_PART})?|\\\\{_PART}(?:\\+{_PART})+"
_PATH = re.compile(f"{_WINDOWS}|{_POSIX}")
_WHOLE = re.compile(
    r"(?:file://|/|~[\w.\-]*/|[A-Za-z]:[\\/]|\\\\)(?!.*\s[-/~\\])[^\n]*[/\\][^\n]*"
)  # it may hold blanks
_REPO = re.compile(r"[A-Za-z0-9_](?:[\w.\-]{0,94}[A-Za-z0-9_])?(?:/[A-Za-z0-9_](?:[\w.\-]{0,94}[A-Za-z0-9_])?)?")


def is_repo_id(name: str) -> bool:
    """Return whether a name can be a repository's on the Hub: `name` or `owner/name`.

    Example:
        >>> is_repo_id("google-bert/bert-base-uncased"), is_repo_id("./runs/x"), is_repo_id("/models/bert")
        (True, False, False)
    """
    return _REPO.fullmatch(name) is not None and "--" not in name and ".." not in name


def last_part(path: str) -> str:
    r"""Return the last part of a path of any system.

    Example:
        >>> last_part("/models/minilm/"), last_part("C:\\models\\minilm")
        ('minilm', 'minilm')
    """
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def without_paths(value: Any) -> Any:
    """Return a JSON value in which every absolute path, also within a text, is cut to its last part.

    Example:
        >>> without_paths({"output_dir": "/scratch/jo/run", "name": "org/name", "note": "see /scratch/jo/a.csv"})
        {'output_dir': 'run', 'name': 'org/name', 'note': 'see a.csv'}
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if _WHOLE.fullmatch(value):
        return last_part(value)
    return _PATH.sub(lambda match: last_part(match.group()), value)
