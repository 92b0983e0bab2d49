"""Which licence a fine-tuned model may state: its owner's, its base's and its data's, held against each other.

The table below says of each licence what it asks of a work made from it, as coarsely as a refusal needs. It is a
guard against plain contradictions and no legal advice: whether weights are a work derived from their training data is
not settled, a licence can be read in more than one way, and what this module lets pass may still be wrong. Ask a
lawyer where it matters.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from hub_cards.terms import IDENTIFIERS, LATER, TERMS


class LicenceError(ValueError):
    """Raised for a licence that contradicts the base's or the data's, and for an identifier the Hub does not know.

    Example:
        >>> resolve("mit", base="cc-by-nc-4.0")
        Traceback (most recent call last):
            ...
        hub_cards.licences.LicenceError: ...
    """


@dataclass(frozen=True)
class Licence:
    """What a card states.

    Args:
        identifier: the Hub's `license:`.
        name: `license_name:`; None unless the identifier is `other`.
        link: `license_link:`; None unless the identifier is `other`.
        notes: warnings and obligations, plain sentences. They quote names of data as they came: a card escapes them.

    Example:
        >>> Licence("mit").notes
        ()
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    notes: tuple[str, ...] = ()


def resolve(
    own: str | None,
    *,
    base: str | None,
    datasets: Mapping[str, str | None] | None = None,
    adapter: bool = False,
    name: str | None = None,
    link: str | None = None,
) -> Licence:
    """Returns the licence that a card may state, with warnings and obligations, or refuses a known contradiction.

    - `own` stated: it is kept or refused, never replaced. Where the base's or the data's licence is not known it is
      kept with a warning: it is the owner's word.
    - `own` None: the base's licence if that asks for the same one (share-alike, or the terms of a named model), since
      no other is allowed; else `other` with a warning that says how to state one. A permissive base leaves the choice
      to the owner, and copying its licence, as other tools do, would be a guess in the owner's name.
    - Base: forbids derived works: refused, an adapter too. Asks for the same licence: `own` is that or a compatible
      later one. Forbids commercial use: so does `own`.
    - Data: forbids commercial use, or derived works: so does `own`, and so must what the base asks for. Share-alike
      is a note, since it is not settled that it binds weights.
    - `own` is `other`: its text is not known here, so only a base without derived works is refused; the rest is noted.

    Args:
        own: the Hub's identifier of the chosen licence, or the `license_name` of the base's; None: none stated.
        base: the base's identifier or, where that is `other`, its `license_name`; None: not known.
        datasets: name of a data set -> the identifier of its licence; None: not known.
        adapter: True if the weights of the base are no part of what is published.
        name: `license_name` to print when the identifier is `other`.
        link: `license_link` to print when the identifier is `other`.

    Raises:
        LicenceError: `own` is no identifier of the Hub, or the licences contradict each other.

    Example:
        >>> resolve("mit", base="apache-2.0").identifier
        'mit'
        >>> resolve(None, base="llama3.1").identifier
        'llama3.1'
        >>> resolve(None, base="apache-2.0").identifier
        'other'
        >>> resolve("apache-2.0", base="mit", datasets={"org/reviews": "cc-by-nc-4.0"})
        Traceback (most recent call last):
            ...
        hub_cards.licences.LicenceError: the licence "apache-2.0" permits commercial use, "cc-by-nc-4.0" of the data \
"org/reviews" does not. State a licence that forbids it, such as "cc-by-nc-4.0", or train on other data.
    """
    base = _known(base)
    data = {dataset: _known(licence) for dataset, licence in (datasets or {}).items()}
    own = None if own == "unknown" else own
    if own is not None and own not in TERMS and own != base:
        near = difflib.get_close_matches(own.lower(), TERMS, n=3, cutoff=0.4)
        raise LicenceError(
            f"the Hub knows no licence {_quoted(own)}. Closest identifiers: {', '.join(near) or 'none'}. Use one of "
            'huggingface.co/docs/hub/repositories-licenses, or "other" with a name and a link.'
        )
    notes = _base_notes(base, adapter) + [
        note for dataset, licence in data.items() for note in _data_notes(dataset, licence)
    ]
    _check_base_and_data(own, base, data, adapter)
    if own is None:
        if base is not None and _rule(base)[0] == "same":
            own = base
            notes.insert(0, f"No licence was stated; {_quoted(base)} of the base asks for the same one.")
        else:
            own = "other"
            notes.insert(0, 'No licence was stated for this model. Its owner states one with license="…".')
    _check_own(own, base, data)
    if own == "other":
        notes += _open_notes(base, data)
    if own in IDENTIFIERS and own != "other":
        return Licence(own, notes=tuple(notes))
    return Licence("other", name=name or (own if own != "other" else None), link=link, notes=tuple(notes))


def _known(licence: str | None) -> str | None:
    """Returns the identifier in lower case, or None where it says nothing."""
    licence = None if licence is None else licence.strip().lower()
    return None if licence in (None, "", "unknown", "other", "none") else licence


def _rule(licence: str) -> tuple[str, bool]:
    return TERMS.get(licence, ("open", True))


def _quoted(text: str) -> str:
    """Returns `text` in quotation marks on one line: it may come from anyone's card."""
    return '"' + "".join(letter if letter.isprintable() else "\ufffd" for letter in text).replace('"', "'")[:120] + '"'


def _check_base_and_data(own: str | None, base: str | None, data: Mapping[str, str | None], adapter: bool) -> None:
    if base is None:
        return
    asks, commercial = _rule(base)
    if asks == "none":
        what = "an adapter made for it" if adapter else "a model made from it"
        raise LicenceError(
            f"the base's licence {_quoted(base)} permits no derived works, so {what} cannot be published. "
            "Choose another base, or ask its owner."
        )
    if asks != "same" or not commercial or own == "other":
        return
    for dataset, licence in data.items():
        if licence is not None and (_rule(licence)[0] == "none" or not _rule(licence)[1]):
            raise LicenceError(
                f"the base's licence {_quoted(base)} has to be kept and permits what {_quoted(licence)} of the data "
                f"{_quoted(dataset)} forbids. No listed licence fits both: train on other data, choose another base, "
                'or state "other" with a text of your own that keeps both.'
            )


def _check_own(own: str, base: str | None, data: Mapping[str, str | None]) -> None:
    if own == "other":
        return
    asks, commercial = _rule(own)
    if base is not None:
        base_asks, base_commercial = _rule(base)
        fitting = (base, *LATER.get(base, "").split())
        if base_asks == "same" and own not in fitting:
            raise LicenceError(
                f"the base's licence {_quoted(base)} asks for the same licence, {_quoted(own)} is another. "
                f"State {' or '.join(map(_quoted, fitting))}, or choose another base."
            )
        if not base_commercial and commercial:
            raise LicenceError(
                f"the licence {_quoted(own)} permits commercial use, {_quoted(base)} of the base does not. "
                f"State a licence that forbids it, such as {_quoted(base)}, or choose another base."
            )
    for dataset, licence in data.items():
        if licence is None:
            continue
        data_asks, data_commercial = _rule(licence)
        if not data_commercial and commercial:
            raise LicenceError(
                f"the licence {_quoted(own)} permits commercial use, {_quoted(licence)} of the data "
                f"{_quoted(dataset)} does not. State a licence that forbids it, such as {_quoted(licence)}, or train "
                "on other data."
            )
        if data_asks == "none" and asks != "none":
            raise LicenceError(
                f"the licence {_quoted(own)} permits derived works, {_quoted(licence)} of the data "
                f"{_quoted(dataset)} does not. State a licence that forbids them, such as {_quoted(licence)}, or train "
                "on other data."
            )


def _base_notes(base: str | None, adapter: bool) -> list[str]:
    if base is None:
        return ["The licence of the base is not known; check it before this model is used or passed on."]
    asks, commercial = _rule(base)
    notes = []
    if asks == "open":
        notes.append(f"The licence {_quoted(base)} of the base is not one of the Hub's; check what it asks for.")
    elif asks == "same":
        notes.append(f"The terms of {_quoted(base)}, the base's licence, pass on to whoever receives this model.")
    else:
        notes.append(f"Keep the notices and the credit that {_quoted(base)}, the base's licence, asks for.")
    if not commercial:
        notes.append(f"The base's licence {_quoted(base)} forbids commercial use.")
    if adapter:
        notes.append(
            f"This adapter holds no weights of the base; who runs it accepts {_quoted(base)} of the base as well."
        )
    return notes


def _data_notes(dataset: str, licence: str | None) -> list[str]:
    if licence is None:
        return [
            f"The licence of the data {_quoted(dataset)} is not known; check it before this model is used or passed on."
        ]
    asks, commercial = _rule(licence)
    where = f"{_quoted(licence)} of the data {_quoted(dataset)}"
    notes = []
    if asks == "open":
        notes.append(f"The licence {where} is not specific; check what it asks for.")
    elif asks == "same":
        notes.append(
            f"The licence {where} asks for the same licence. Whether that binds trained weights is not settled."
        )
    elif licence.startswith(("cc-by", "odc-by", "etalab")):
        notes.append(f"The licence {where} asks for credit.")
    if not commercial:
        notes.append(f"The licence {where} forbids commercial use.")
    if asks == "none":
        notes.append(f"The licence {where} forbids derived works. Whether trained weights are one is not settled.")
    return notes


def _open_notes(base: str | None, data: Mapping[str, str | None]) -> list[str]:
    known = [licence for licence in (base, *data.values()) if licence is not None]
    if any(_rule(licence)[0] == "same" or not _rule(licence)[1] for licence in known):
        return [
            "The licence of this model has to keep all that the licences named here ask for; nothing has checked it."
        ]
    return []
