"""The licence of a publication: what base and data state on the Hub, held against what the publisher states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml
from huggingface_hub import CardData, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from hub_cards import licences
from hub_cards.facts import RunFacts
from hub_cards.publishing.remote import Remote
from hub_cards.publishing.staging import is_unwritten
from hub_cards.sections import front_and_body


def settle_licence(facts: RunFacts, api: HfApi, own: str | None, there: Remote | None) -> RunFacts:
    """Return the facts with the licences of base and data, as their cards have them, and the one that follows.

    Args:
        facts: of the run, with the base's name and commit.
        api: the client.
        own: the licence that the publisher states; None: the one of the repository's card, if somebody stated one.
        there: the repository as it was read.

    Raises:
        LicenceError: they contradict each other.
        ValueError: a data set cannot be read on the Hub.
    """
    base, data, link = facts.base, facts.data, None
    if base.name is not None:
        about = api.model_info(base.name, revision=base.revision).card_data
        stated = _read(about)
        base, link = replace(base, license=_stated(stated)), stated.get("license_link")
    if data is not None and data.name is not None and not data.local:
        try:
            card = api.dataset_info(data.name, revision=data.revision).card_data
        except RepositoryNotFoundError:
            raise ValueError(
                f"the data set `{data.name}` cannot be read on the Hub; expected one that your token may read. Where "
                'it is a file of yours, say so: "local": true in the data of recipe.json.'
            ) from None
        data = replace(data, license=_stated(_read(card)))
    found = licences.resolve(
        own or _own_licence(there) or (facts.licence.identifier if facts.licence else None),
        base=base.license,
        datasets={data.name: data.license} if data and data.name and not data.local else {},
        adapter=facts.is_adapter,
        link=link,
    )
    return replace(facts, base=base, data=data, licence=found)


def _read(card: CardData | None) -> dict[str, Any]:
    return dict(card.to_dict()) if card is not None else {}  # type: ignore[no-untyped-call]


def _stated(card: Mapping[str, object]) -> str | None:
    """Return the licence of a card: its name where the Hub does not know it; None where there is none, or several."""
    found = card.get("license")
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    if found == "other":
        found = card.get("license_name") or "other"
    return found if isinstance(found, str) else None


def _own_licence(there: Remote | None) -> str | None:
    """Return the licence that the repository's card states, unless nobody has stated it."""
    card = there.card if there is not None else None
    front, _ = front_and_body(card or "")
    if card is None or front is None or is_unwritten(card):
        return None
    try:
        stated = yaml.safe_load(front)
    except yaml.YAMLError:
        return None  # `write_card` says what is wrong
    found = _stated(stated) if isinstance(stated, dict) else None
    return None if found == "other" and not stated.get("license_link") else found
