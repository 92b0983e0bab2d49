"""A card's text as sections, and whose they are: ours, which are written anew, and the reader's own, which stay.

A generated section stands between two comments that carry a hash of its text. So a section that somebody has edited is
known, on this machine or on the Hub, and everything outside the comments is somebody's own text.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

OWNED, DROPPED = "owned", "dropped"
# Of the libraries' own cards, which are no one's text: the Trainer's until its comment is removed, and PEFT's template.
_TRAINER_STOCK = (
    "This model card has been generated automatically according to the information the Trainer had access to"
)
_TEMPLATE_STOCK, _TEMPLATE_GAP = "# Model Card for Model ID", "[More Information Needed]"
_BLOCK = re.compile(
    r"<!-- tl:begin (?P<name>.+?) \((?P<mark>[0-9a-f]{12}|owned|dropped)\) -->\n?"
    r"(?P<text>.*?)\n?<!-- tl:end (?P=name) \((?P=mark)\) -->",
    re.DOTALL,
)
_FRONT = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MARKER = re.compile(r"^<!-- tl:(?:begin|end) .+? \([0-9a-z]+\) -->\n?", re.MULTILINE)


@dataclass(frozen=True)
class Section:
    """A section between its comments, or somebody's own text (no name)."""

    text: str
    name: str = ""
    mark: str = ""  # hash of the text as it was generated, or OWNED or DROPPED

    @property
    def edited(self) -> bool:
        """Whether somebody changed it after it was generated."""
        return self.mark != digest(self.text)

    def __str__(self) -> str:
        if not self.name:
            return self.text
        marker = f"{self.name} ({self.mark})"
        return f"<!-- tl:begin {marker} -->\n{self.text}\n<!-- tl:end {marker} -->"


def generated(name: str, text: str) -> Section:
    """Return a section as a template makes it."""
    return Section(text.strip(), name, digest(text))


def digest(text: str) -> str:
    """Return the hash of a section's text, the same whatever an editor does to blanks at ends of lines.

    Example:
        >>> digest("a b ") == digest("a b")
        True
    """
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def split(body: str) -> list[Section]:
    """Return the sections of a card without its metadata, in order. A marker without its other half is dropped.

    Example:
        >>> [section.name for section in split(f"mine {generated('Uses', 'text')} mine too")]
        ['', 'Uses', '']
    """
    body = body.replace("\r\n", "\n")
    sections, end = [], 0
    for match in _BLOCK.finditer(body):
        sections += _own(body[end : match.start()])
        sections.append(Section(match["text"].strip(), match["name"], match["mark"]))
        end = match.end()
    return sections + _own(body[end:])


def join(sections: Sequence[Section]) -> str:
    """Return the card's text."""
    return "\n\n".join(str(section) for section in sections) + "\n"


def front_and_body(card: str) -> tuple[str | None, str]:
    r"""Return the YAML of a card's metadata, without the lines around it, and what follows; None where there is none.

    Example:
        >>> front_and_body("---\nlicense: mit\n---\n# My model\n")
        ('license: mit', '# My model\n')
        >>> front_and_body("# My model")
        (None, '# My model')
    """
    found = _FRONT.match(card)
    return (found[1], card[found.end() :]) if found else (None, card)


def is_stock(body: str) -> bool:
    """Return whether a card was made by a library and never completed."""
    return _TRAINER_STOCK in body or (_TEMPLATE_STOCK in body and body.count(_TEMPLATE_GAP) > 9)


def keep(new: Sequence[Section], old: Sequence[Section], *, prose: Sequence[str]) -> list[Section]:
    """Return the new sections with everything of the old card that is somebody's own.

    - Own text stays behind the section that it followed.
    - A dropped section stays dropped, and a replaced one replaced.
    - An edited section stays as edited while what would be generated is what was generated then. If the facts have
      changed since, edited prose stays, and an edited section of facts is kept beneath the new facts.

    Args:
        new: the card as it would be generated, possibly with own text already.
        old: an earlier card.
        prose: names of the sections that state no facts of the run.
    """
    before = {section.name: section for section in old if section.name}
    kept: list[Section] = []
    anchors = _anchors(old, {section.name for section in new})
    own = {section.text for section in new if not section.name}
    for section in (Section(""), *new):
        if section.text or section.name:
            kept.extend(_kept(section, before.get(section.name), prose))
        if section.name or not section.text:
            texts = anchors.pop(section.name, [])
            kept += [Section(text) for text in texts if not any(text in other for other in own)]
    versions = [section.text for section in kept if not section.name]  # of two, one within the other, the longer
    return [s for s in kept if s.name or not any(s.text != text and s.text in text for text in versions)]


def _kept(new: Section, old: Section | None, prose: Sequence[str]) -> list[Section]:
    if not new.name or old is None or not old.edited or (new.edited and new.mark in (OWNED, DROPPED)):
        return [new]
    if old.mark in (OWNED, DROPPED) or old.mark == new.mark:
        return [old]
    if new.name in prose:
        return [replace(old, mark=new.mark)]
    return [new, Section(old.text)] if old.text else [new]


def _anchors(old: Sequence[Section], known: set[str]) -> dict[str, list[str]]:
    """Return own texts by the section that they follow; the empty name for those before the first."""
    found: dict[str, list[str]] = {}
    last = ""
    for section in old:
        if section.name:
            last = section.name if section.name in known else last
            if section.name not in known and section.edited and section.text:
                found.setdefault(last, []).append(section.text)
        else:
            found.setdefault(last, []).append(section.text)
    return found


def _own(text: str) -> list[Section]:
    text = _MARKER.sub("", text).strip()
    return [Section(text)] if text else []
