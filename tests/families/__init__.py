"""Tiny models of many families, by name."""

from tests.families import generative, signals, text, vision
from tests.families.core import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {
    family.name: family for module in (text, generative, vision, signals) for family in module.FAMILIES
}
