"""From the files of a training run to a card that tells the truth, to the Hub, and back.

The names below are the public ones. Those that need torch are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hub_cards.card import Card, render, write_card
from hub_cards.facts import RunFacts, read_facts
from hub_cards.licences import LicenceError
from hub_cards.publishing.publication import Publication
from hub_cards.publishing.publish import publish
from hub_cards.publishing.remote import ConcurrentPushError, PublishError
from hub_cards.registry.listing import AdapterInfo, compare_adapters, list_adapters
from hub_cards.scanning.scan import SecretFoundError

if TYPE_CHECKING:
    from hub_cards.pulling.merge import merge_adapter
    from hub_cards.pulling.pull import Pulled, pull
    from hub_cards.pulling.rows import content_fingerprint
    from hub_cards.pulling.verify import Verification, verify
    from hub_cards.registry.adapter_set import AdapterSet, load_adapters
    from hub_cards.registry.combining import merge_adapters

_LAZY = {
    "AdapterSet": "registry.adapter_set",
    "Pulled": "pulling.pull",
    "Verification": "pulling.verify",
    "content_fingerprint": "pulling.rows",
    "load_adapters": "registry.adapter_set",
    "merge_adapter": "pulling.merge",
    "merge_adapters": "registry.combining",
    "pull": "pulling.pull",
    "verify": "pulling.verify",
}

__all__ = [
    "AdapterInfo",
    "AdapterSet",
    "Card",
    "ConcurrentPushError",
    "LicenceError",
    "Publication",
    "PublishError",
    "Pulled",
    "RunFacts",
    "SecretFoundError",
    "Verification",
    "compare_adapters",
    "content_fingerprint",
    "list_adapters",
    "load_adapters",
    "merge_adapter",
    "merge_adapters",
    "publish",
    "pull",
    "read_facts",
    "render",
    "verify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch, when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
