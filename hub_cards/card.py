"""Facts to a card: rendered by section from the templates, with everybody's own text kept."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_cards import markdown
from hub_cards.facts import RunFacts
from hub_cards.metadata import merge_metadata, metadata
from hub_cards.pictures import FOLDER, pictures, slug
from hub_cards.sections import DROPPED, OWNED, Section, front_and_body, generated, is_stock, join, keep, split
from hub_cards.summary import strength, title, view

CARD = "README.md"
# Sections that state no facts of the run. What somebody wrote there stays when the facts change.
PROSE = ("Title", "Uses", "Limits", "Licence", "Citation")


class Card:
    """A model card made of sections, which are found, added, replaced and dropped by their path.

    A path is the title of a section, or of a section and of one within it: `Uses`, `Uses/Out of scope`. `str(card)` is
    the whole card with its metadata. What is added or replaced is the author's own, and stays when the card is written
    again from other facts; what is dropped stays dropped.

    Args:
        facts: of the run.

    Example:
        >>> card = Card(RunFacts(global_step=10, max_steps=10, model_class="BertForSequenceClassification"))
        >>> _ = card.add("Ethics", "The texts are public.").drop("Citation")
        >>> card.replace("Uses/Out of scope", "Medical texts.").select("Uses/Out of scope")
        'Medical texts.'
        >>> card.paths[-2:]
        ('Licence', 'Ethics')
    """

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.metadata = metadata(facts)
        self._sections = _render(facts)

    def __str__(self) -> str:
        front = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True, width=100_000)
        return f"---\n{front}---\n\n{join(self._sections)}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sections, in order."""
        return tuple(
            path
            for section in self._sections
            if section.mark != DROPPED
            for top in [section.name or _title(section.text)]
            for path in ([top] if top else []) + [f"{top}/{sub}" for sub in _parts(section.text) if sub]
        )

    def select(self, path: str) -> str:
        """Return a section's text without its heading.

        Raises:
            KeyError: there is no such section; all paths are listed.
        """
        place, sub = self._find(path)
        parts = _parts(self._sections[place].text)
        return _body(parts[sub]) if sub else "\n\n".join(_body(parts[""]).split("\n\n") + [*parts.values()][1:]).strip()

    def add(self, path: str, text: str) -> "Card":
        """Add a section behind the others, or within one, and return the card.

        Raises:
            ValueError: there is one already.
        """
        if path in self.paths:
            raise ValueError(f"the card has a section `{path}` already; expected a new one. Use replace.")
        top, _, sub = path.partition("/")
        own = Section(f"### {sub}\n\n{text.strip()}" if sub else f"## {top}\n\n{text.strip()}")
        self._sections.insert(self._find(top)[0] + 1 if sub else len(self._sections), own)
        return self

    def replace(self, path: str, text: str) -> "Card":
        """Replace a section's text below its heading, and return the card.

        Raises:
            KeyError: there is no such section; all paths are listed.
        """
        place, sub = self._find(path)
        section = self._sections[place]
        parts = _parts(section.text)
        heading = parts[sub].split("\n", 1)[0]
        whole = {**parts, sub: f"{heading}\n\n{text.strip()}"} if sub else {"": f"{heading}\n\n{text.strip()}"}
        self._sections[place] = Section("\n\n".join(whole.values()), section.name, OWNED if section.name else "")
        return self

    def drop(self, path: str) -> "Card":
        """Remove a section, and return the card.

        Raises:
            KeyError: there is no such section; all paths are listed.
        """
        place, sub = self._find(path)
        section = self._sections[place]
        if sub:
            rest = "\n\n".join(part for name, part in _parts(section.text).items() if name != sub)
            self._sections[place] = Section(rest, section.name, OWNED if section.name else "")
        elif section.name:
            self._sections[place] = Section("", section.name, DROPPED)
        else:
            del self._sections[place]
        return self

    def keep(self, existing: str) -> "Card":
        """Take over what is somebody's own in an earlier card: text, edits, and metadata. Return the card.

        Args:
            existing: the card's text, of this machine or of the Hub. A card that a library made and nobody completed
                has nothing of one's own.
        """
        front, body = front_and_body(existing)
        if is_stock(body):
            return self
        self.metadata = merge_metadata(self.metadata, _read_front(front) if front is not None else {})
        self._sections = keep(self._sections, split(body), prose=PROSE)
        return self

    def _find(self, path: str) -> tuple[int, str]:
        top, _, sub = path.partition("/")
        for place, section in enumerate(self._sections):
            known = section.mark != DROPPED and (section.name or _title(section.text)) == top
            if known and (not sub or sub in _parts(section.text)):
                return place, sub
        raise KeyError(f"the card has no section `{path}`; its sections are {', '.join(self.paths)}.")


def render(facts: RunFacts) -> str:
    """Return the card of a run: metadata and all sections. Reads and writes no files; equal facts give equal cards.

    Example:
        >>> card = render(RunFacts(global_step=10, max_steps=10, model_class="BertForSequenceClassification"))
        >>> "not measured" in card
        True
    """
    return str(Card(facts))


def write_card(facts: RunFacts | Card, run_dir: str | Path, *, existing: str | None = None) -> Path:
    """Write the card to `README.md` of a folder, and its pictures beside it; return the path.

    Own text in a `README.md` that is there already stays; so does that of `existing`. The card is written last, and
    whole or not at all.

    Args:
        facts: of the run, or a card made from them.
        run_dir: the run's folder.
        existing: another earlier version of the card, such as the one on the Hub.

    Raises:
        ValueError: the metadata of an earlier card are no YAML mapping.

    Example:
        >>> import tempfile
        >>> facts = RunFacts(global_step=10, max_steps=10, model_class="BertForSequenceClassification")
        >>> write_card(facts, tempfile.mkdtemp()).name
        'README.md'
    """
    card = facts if isinstance(facts, Card) else Card(facts)
    path = Path(run_dir) / CARD
    for earlier in (read_card(path) if path.is_file() else None, existing):
        if earlier is not None:
            card.keep(earlier)
    for name, picture in pictures(card.facts).items():
        (path.parent / FOLDER).mkdir(exist_ok=True)
        _write(path.parent / FOLDER / name, picture)
    _write(path, str(card).encode())
    return path


def read_card(path: str | Path) -> str:
    """Return the text of a card.

    Raises:
        ValueError: it is no UTF-8.

    Example:
        >>> read_card("hub_cards/README.md")[:12]
        '# hub_cards:'
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is no UTF-8 ({error.reason} at byte {error.start}), so what is your own in it cannot be kept; "
            "expected a card in UTF-8. Save it so, or remove it."
        ) from None


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


@cache
def _environment() -> Environment:
    # finalize sees every value that a template prints: what is not marked as Markdown is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        finalize=markdown.escape,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        name: getattr(markdown, name)
        for name in ("code", "cell", "listed", "number", "size", "fenced", "literal", "setting")
    }
    environment.filters["slug"] = lambda name: markdown.Markdown(slug(name))
    environment.globals["strength"] = strength
    return environment


def _render(facts: RunFacts) -> list[Section]:
    sections: list[Section] = []

    def section(name: str, caller: Any) -> str:
        sections.append(generated(name, re.sub(r"\n{3,}", "\n\n", caller())))
        return ""

    template = _environment().get_template("adapter.md.jinja" if facts.is_adapter else "model.md.jinja")
    template.render(facts=facts, section=section, title=title(facts), **view(facts))
    return sections


def _read_front(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of the earlier card are no YAML: {error}. Mend them, or remove them.") from None
    if not isinstance(found, dict):
        raise ValueError(f"the metadata of the earlier card are a {type(found).__name__}, expected keys and values.")
    return found


def _title(text: str) -> str:
    match = re.match(r"#{1,2} (.+)", text)
    return match[1].strip() if match else ""


def _parts(text: str) -> dict[str, str]:
    """Return what precedes the first heading of the third level (empty name), and the text from each of them on."""
    parts, name, fence = {"": ""}, "", ""
    for line in text.split("\n"):
        marker = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if marker and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else marker[1]
        if line.startswith("### ") and not fence:
            name = line[4:].strip()
            parts[name] = ""
        parts[name] += line + "\n"
    return {name: part.strip() for name, part in parts.items()}


def _body(part: str) -> str:
    """Return a part without its heading."""
    return re.sub(r"\A#{1,3} [^\n]*\n*", "", part).strip()
