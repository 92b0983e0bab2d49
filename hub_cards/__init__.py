"""From the files of a training run to a card that tells the truth, to the Hub, and back.

The names below are the public ones. Those of `pull` and of the registry need torch, and are imported when first used.
"""

from hub_cards.card import Card, render, write_card
from hub_cards.facts import RunFacts, read_facts
from hub_cards.publication import Publication
from hub_cards.publish import publish
from hub_cards.remote import ConcurrentPushError, PublishError

__all__ = [
    "Card",
    "ConcurrentPushError",
    "Publication",
    "PublishError",
    "RunFacts",
    "publish",
    "read_facts",
    "render",
    "write_card",
]
