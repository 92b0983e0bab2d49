"""Looks through all files before anything is uploaded: secrets, e-mail addresses, absolute paths, pickles.

The guard is against accidents, not against a person who wants to smuggle a secret out. What is found is shown with its
line, and never in full.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hub_cards.scanning.contents import Problem, contents
from hub_cards.scanning.detect import find_secrets, find_tokens
from hub_cards.scanning.encodings import LONG, joined, packed, views
from hub_cards.scanning.locations import EMAIL, PATH, find_emails, find_homes, find_paths

_DEPTH = 3  # encodings inside encodings: base64 of base64 of a token is found
_WIDTH = 100  # characters of a line that are shown
_VOCABULARY = re.compile(
    r"(?i)(?:.*[-_.])?vocab(?:[-_.].*)?\.(?:txt|json)|.*merges\.txt|.*\.(?:tiktoken|model|spm|bpe)"
)
_RANK = {EMAIL: 1, PATH: 2}  # all others 0: a token inside a path is told as a token


@dataclass(frozen=True)
class Finding:
    """One thing that must not be published.

    Args:
        file: the file's name in the repository.
        line: the line, from 1; 0 where there are no lines: a picture, a header, the file as a whole.
        kind: what it is, such as `Hugging Face token` or `absolute path`.
        excerpt: about 100 characters of the line, with all that was found in it masked.

    Example:
        >>> print(Finding("adapter_config.json", 3, "absolute path", '"base": "/hom…"'))
        adapter_config.json:3: absolute path: "base": "/hom…"
    """

    file: str
    line: int
    kind: str
    excerpt: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.kind}: {self.excerpt}"


class SecretFoundError(ValueError):
    """Raised before an upload: lists every finding and says what to do.

    Args:
        findings: what `scan` returned; not empty. Kept as the attribute `findings`.

    Example:
        >>> SecretFoundError([Finding("a.md", 1, "absolute path", "/hom…")]).findings[0].line
        1
    """

    def __init__(self, findings: Iterable[Finding]):
        self.findings = tuple(findings)
        what = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        super().__init__(
            f"{what} in the files to be published:\n"
            + "\n".join(f"  {finding}" for finding in self.findings)
            + "\nExpected no tokens, keys, e-mail addresses, absolute paths or pickles. Nothing was uploaded. "
            "Remove them; a token that was real may have been seen by others, so rotate it. "
            "Pass allow=[...] with the exact string for one that may be public."
        )


class _Hit(NamedTuple):
    start: int  # in the text of the file
    end: int
    kind: str
    text: str  # with escapes and encodings undone


def check(files: Mapping[str, Path | bytes], allow: Iterable[str] = ()) -> None:
    """Raises when any of the files holds something that must not be published; changes nothing.

    Args:
        files: name in the repository -> the file or its bytes.
        allow: strings that may be public, see `scan`.

    Raises:
        SecretFoundError: `scan` finds something; the message lists all of it.

    Example:
        >>> check({"README.md": b"# A model"})
    """
    if findings := scan(files, allow=allow):
        raise SecretFoundError(findings)


def scan(files: Mapping[str, Path | bytes], *, allow: Iterable[str] = ()) -> list[Finding]:
    r"""Returns what must not be published of `files`, in the order of the files and their lines.

    Tokens and keys of providers, passwords, e-mail addresses and absolute paths, in texts of any usual encoding, under
    escapes, base64 and hexadecimal digits; in the names of the files, in the header of safetensors files and in the
    text chunks of PNG pictures. A pickle under any name is a finding, and so is a text that cannot be decoded.

    In vocabularies (`vocab.txt`, `vocab.json`, `merges.txt`, and these two parts of `tokenizer.json`) the only paths
    that count are home folders: the vocabulary of a code model holds `/usr/local`.

    Args:
        files: name in the repository -> the file or its bytes.
        allow: strings that may be public. What was found is dropped when it is one of them or a part of one, before or
            after decoding.

    Returns:
        The findings; empty when all may be published.

    Raises:
        OSError: a file cannot be read.
        TypeError: `allow` is one string, or a file is neither a path nor bytes.

    Example:
        >>> for finding in scan({"config.json": b'{\n  "base": "/home/ada/model"\n}'}):
        ...     print(finding)
        config.json:2: absolute path:   "base": "/ho…"
        >>> scan({"config.json": b'{"base": "/opt/model"}'}, allow=["/opt/model"])
        []
    """
    if isinstance(allow, str | bytes):
        raise TypeError(f"allow is the one string {allow!r}, expected several. Pass allow=[{allow!r}].")
    allowed = tuple(text for text in allow if text)
    findings: list[Finding] = []
    for name, source in files.items():
        if not isinstance(source, Path | bytes):
            raise TypeError(f"`{name}` is a {type(source).__name__}, expected a pathlib.Path or bytes.")
        in_name = [hit for hit in _hits(name, _DEPTH) if hit.kind != PATH and not _is_allowed(hit, name, allowed)]
        shown = _masked(name, 0, len(name), in_name)
        findings += [Finding(shown, 0, hit.kind, f"the file's name, {shown}") for hit in in_name]
        for content in contents(name, source):
            if isinstance(content, Problem):
                findings.append(Finding(shown, 0, *content))
            else:
                findings += _findings(shown, PurePosixPath(name).name, content.text, content.lines, allowed)
    return findings


def _findings(shown: str, name: str, text: str, lines: bool, allowed: tuple[str, ...]) -> Iterator[Finding]:
    vocabulary = _vocabulary(name, text)
    hits = [
        hit
        for hit in _hits(text, _DEPTH)
        if not _is_allowed(hit, text, allowed) and not (hit.kind == PATH and _is_general(hit, vocabulary))
    ]
    hits.sort(key=lambda hit: (_RANK.get(hit.kind, 0), hit.start - hit.end, hit.start))
    told: list[_Hit] = []
    for hit in hits:
        if not any(other.start <= hit.start and hit.end <= other.end for other in told):
            told.append(hit)
    told.sort()
    newline = "\n" if "\n" in text else "\r"
    at, line = 0, 1
    for hit in told:
        line += text.count(newline, at, hit.start)
        at = hit.start
        low = max(text.rfind(newline, 0, hit.start) + 1, hit.start - _WIDTH // 2)
        high = text.find(newline, hit.start)
        high = min(high if high >= 0 else len(text), max(hit.start, min(hit.end, hit.start + _WIDTH)) + _WIDTH // 2)
        yield Finding(shown, line if lines else 0, hit.kind, _masked(text, low, high, hits))


def _hits(text: str, depth: int) -> Iterator[_Hit]:
    """Yields all that is found in `text`, its escaped forms and what is encoded in it, at its place in `text`."""
    every = list(views(text))
    view = every[-1]
    if len(text) > LONG and len(every) > 1 and sum(high - low for low, high in every[1].changed()) > len(text) // 2:
        del every[0]  # escapes all over a long text, as in a tokenizer.json in ASCII: it is read without them only
    for layer in every:
        for low, high in layer.changed():
            part = layer.text[low:high]
            for finder in (find_secrets, find_emails, find_paths):
                for hit in finder(part):
                    if low and hit.start == 0:
                        continue  # it may have begun before the part, and was seen there
                    start, end = layer.origin(low + hit.start, low + hit.end)
                    yield _Hit(start, end, hit.kind, part[hit.start : hit.end])
    if (glued := joined(view)) is not None:
        for hit in find_tokens(glued.text):
            yield _Hit(*glued.origin(hit.start, hit.end), hit.kind, glued.text[hit.start : hit.end])
    if depth:
        for piece in packed(view.text):
            for inner in _hits(piece.inside, depth - 1):
                yield _Hit(*view.origin(piece.start, piece.end), inner.kind, inner.text)


def _is_allowed(hit: _Hit, text: str, allowed: tuple[str, ...]) -> bool:
    return any(hit.text in public or text[hit.start : hit.end] in public for public in allowed)


def _vocabulary(name: str, text: str) -> list[tuple[int, int]]:
    """Returns the stretches of a file that list the pieces of a tokenizer."""
    if _VOCABULARY.fullmatch(name):
        return [(0, len(text))]
    spans: list[tuple[int, int]] = []
    if name.endswith("tokenizer.json"):
        end = 0
        for match in re.finditer(r'"(?:vocab|merges)"\s*:\s*(?=[\[{])', text):
            if match.start() >= end:
                try:
                    _, end = json.JSONDecoder().raw_decode(text, match.end())
                except ValueError:
                    continue
                spans.append((match.end(), end))
    return spans


def _is_general(hit: _Hit, vocabulary: list[tuple[int, int]]) -> bool:
    index = bisect_right(vocabulary, (hit.start, len(hit.text) + hit.end)) - 1
    is_inside = index >= 0 and hit.end <= vocabulary[index][1]
    return is_inside and not any(find_homes(hit.text))


def _masked(text: str, low: int, high: int, hits: Iterable[_Hit]) -> str:
    """Returns `text[low:high]` with at most four characters of each hit, and no control characters."""
    pieces, at = [], low
    for start, end, kind, _ in sorted(hit for hit in hits if hit.start < high and hit.end > low):
        # What a rule cut off may belong to the secret, so the mask goes on to the end of the word.
        end += len(re.match(r"[^\s\"'`<>,;)\]}]*", text[end : end + 400])[0])  # type: ignore[index]
        if end <= at:
            continue
        if start >= at:
            shown = 1 if kind == EMAIL else min(4, (end - start) // 4)
            pieces += [text[at:start], text[start : start + shown], "…"]
        elif at == low:
            pieces.append("…")
        at = end
    pieces.append(text[at:high] if at < high else "")
    return "".join(character if character.isprintable() else "\ufffd" for character in "".join(pieces))
