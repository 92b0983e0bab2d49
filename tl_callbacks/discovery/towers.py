"""Arranges a model's towers, and places what stands below, above and between their blocks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from tl_callbacks.discovery.blocks import children, contains_stack, join, own_parameters, parts
from tl_callbacks.discovery.rules import (
    BARE,
    BRIDGE,
    HEAD,
    LAST,
    MODALITIES,
    QUERY,
    SERVES,
    STEM,
    TO_TEXT,
    is_below,
    sides,
)


@dataclass
class Group:
    """A layer group to be: a name ("" for a stem), its tower ("" where there is one only), the paths of its parts."""

    name: str
    tower: str
    paths: list[str] = field(default_factory=list)


@dataclass
class Layout:
    """The groups of a module by level, bottom to top, those of parallel towers side by side; and the head's parts."""

    levels: list[list[Group]]
    head: list[str] = field(default_factory=list)

    def add_below(self, path: str, tower: str) -> None:
        """Put a part into the stem."""
        if len(self.levels[0]) > 1 or self.levels[0][0].name:
            self.levels.insert(0, [Group("", tower)])
        self.levels[0][0].paths.append(path)

    def add_above(self, path: str) -> None:
        """Put a part into the top group: a final norm or a pooler works at the depth of the last block."""
        self.levels[-1][-1].paths.append(path)


@dataclass
class _Segment:
    name: str
    place: int
    layout: Layout
    modality: str | None


@dataclass
class Reader:
    """Reads a module tree into a layout.

    Args:
        own_groups: returns the groups that a module knows of itself, as (name, parameter paths), or None.
        in_series: towers that are to stand one on the other, bottom to top, rather than side by side.
    """

    own_groups: Callable[[nn.Module], list[tuple[str, tuple[str, ...]]] | None]
    in_series: Sequence[str] = ()
    parallel: list[str] = field(default_factory=list)

    def read(self, module: nn.Module, path: str = "", tower: str = "") -> Layout:
        """Return the layout of a module."""
        if (known := self.own_groups(module)) is not None:
            return _known(known, path, tower)
        heads = set(head_parts(module, is_root=not path))
        leaves: list[tuple[int, str]] = [(-1, name) for name in own_parameters(module) if name not in heads]
        found: list[tuple[str, int, Any]] = []
        for place, (name, blocks) in enumerate(parts(module, is_root=not path)):
            child = module.get_submodule(name)
            if name in heads:
                continue
            if blocks:
                found.append((name, place, blocks))
            elif self._has_depth(child, name, module):
                found.append((name, place, child))
            else:
                leaves.append((place, name))
        found.sort(key=lambda item: LAST.match(item[0]) is not None)
        several = len(found) > 1
        segments = []
        for name, place, content in found:
            label = join(path, name) if several else tower
            if isinstance(content, nn.Module):
                layout = self.read(content, join(path, name), label)
            else:
                layout = Layout([[Group(join(path, b.name), label, [join(path, p) for p in b.paths])] for b in content])
            segments.append(_Segment(name, place, layout, _modality(name, content)))
        if not segments:
            return _flat(module, [name for _, name in leaves], sorted(heads), path, tower)
        for place, name in leaves:
            _place(module, place, name, segments, path)
        layout = self._combine(segments, path)
        if heads:
            for name in layout.head:
                layout.add_above(name)
            layout.head = [join(path, name) for name in heads]
        return layout

    def _has_depth(self, child: nn.Module, name: str, parent: nn.Module) -> bool:
        if self.own_groups(child) is not None:
            return True
        if not contains_stack(child, name) or not STEM.search(name):
            return contains_stack(child, name)
        others = [(other, part) for other, part in children(parent) if not STEM.search(other)]
        return not any(contains_stack(part, other) for other, part in others)  # a stem only below something deeper

    def _combine(self, segments: list[_Segment], path: str) -> Layout:
        """Return the layout of several towers: side by side if they read different inputs, else one on the other."""
        branches: dict[str, list[_Segment]] = {}
        under: list[Layout] = []  # what is in no branch: before the first of them,
        over: list[Layout] = []  # and what joins them
        several = len({segment.modality for segment in segments if segment.modality}) > 1
        for segment in segments:
            last = next(reversed(branches), None)
            if several and (segment.modality or last not in (None, "text")):
                branches.setdefault(segment.modality or cast(str, last), []).append(segment)
            else:
                (over if branches else under).append(segment.layout)
        if not branches:
            return _series(under)
        chains = {join(path, chain[0].name): _series([s.layout for s in chain]) for chain in branches.values()}
        self.parallel += chains
        ordered = [name for name in self.in_series if name in chains]
        if ordered:
            both = _series([chains[name] for name in [*(name for name in chains if name not in ordered), *ordered]])
        else:
            both = _parallel(list(chains.values()))
        return _series([*under, both, *over])


def _series(layouts: list[Layout]) -> Layout:
    for lower in layouts[:-1]:
        for name in lower.head:
            lower.add_above(name)
    return Layout([level for layout in layouts for level in layout.levels], layouts[-1].head)


def _parallel(chains: list[Layout]) -> Layout:
    """Return chains side by side, aligned by depth from the output."""
    heads = [chain for chain in chains if chain.head]
    if len(heads) > 1:
        for chain in heads:
            for name in chain.head:
                chain.add_above(name)
    levels = [
        [group for chain in chains if len(chain.levels) >= height for group in chain.levels[-height]]
        for height in range(max(len(chain.levels) for chain in chains), 0, -1)
    ]
    return Layout(levels, heads[0].head if len(heads) == 1 else [])


def _place(module: nn.Module, place: int, name: str, segments: list[_Segment], path: str) -> None:
    """Put what is no block into the stem or the top of the segment where it works."""
    full = join(path, name)
    for pattern, served, from_below in SERVES:
        found = [segment for segment in segments if served.search(segment.name)]
        if pattern.search(name) and (found or pattern is QUERY):
            _add(found or segments, full, below=from_below)
            return
    before = [segment for segment in segments if segment.place < place]
    after = [segment for segment in segments if segment.place > place]
    below, above = sides(module, name, is_own=place < 0)
    kinds = {segment.modality for segment in segments if segment.modality}
    own = [segment for segment in segments if segment.modality and MODALITIES[segment.modality].search(name)]
    others = [segment for segment in segments if segment.modality not in (None, "text")]
    if len(kinds) > 1 and others and BRIDGE.search(name) and (not own or TO_TEXT.search(name)):
        _add(others, full, below=False)
    elif len(segments) > 1 and len(own) == 1:
        _add(own, full, below=below)
    elif below or not (before or above):
        _add(after or before[-1:], full, below=True)
    else:
        _add(before or segments, full, below=False)


def _add(segments: list[_Segment], path: str, *, below: bool) -> None:
    """Put a part below the first or above the last of some segments."""
    if below:
        layout = segments[0].layout
        layout.add_below(path, layout.levels[0][0].tower)
    else:
        segments[-1].layout.add_above(path)


def head_parts(module: nn.Module, *, is_root: bool) -> list[str]:
    """Return the names of the children and parameters of a module that are its head."""
    named = children(module)
    prefix = getattr(module, "base_model_prefix", "")
    bare = type(module).__module__.startswith("transformers.") and BARE.match(type(module).__name__)
    base = dict(named).get(prefix) if prefix and not bare else None
    if base is not None:
        names = [name for name, _ in named]
        below = [name for name in names[: names.index(prefix)] if is_below(module, name)]
        pretrained = [name for name, child in named if hasattr(child, "base_model_prefix")]
        return [n for n in names if n not in (prefix, *below, *pretrained)] + own_parameters(module)
    if not is_root or len(named) < 2:
        return []
    with_depth = [number for number, (name, child) in enumerate(named) if contains_stack(child, name)]
    if hasattr(module, "base_model_prefix"):
        if bare:
            return []
        rest = [name for name, _ in named[max(with_depth, default=len(named) - 2) + 1 :]]
        after = [name for name in rest if not is_below(module, name) and "enc_to_dec" not in name]
        return after or [name for name, _ in named if HEAD.match(name)]
    by_name = [name for number, (name, _) in enumerate(named) if HEAD.match(name) and number not in with_depth]
    return by_name or ([named[-1][0]] if len(named) - 1 not in with_depth else [])


def _known(known: list[tuple[str, tuple[str, ...]]], path: str, tower: str) -> Layout:
    groups = [Group(join(path, name), tower, [join(path, p) for p in names]) for name, names in known]
    head = groups.pop().paths if known[-1][0] == "head" and len(groups) > 1 else []
    return Layout([[group] for group in groups], head)


def _flat(module: nn.Module, leaves: list[str], heads: list[str], path: str, tower: str) -> Layout:
    """Return one group a child of a module without depth, in the order of registration."""
    own = [name for name in leaves if name in own_parameters(module)]
    groups = [Group(join(path, name), tower, [join(path, name)]) for name in leaves if name not in own]
    if own:
        groups.insert(0, Group(join(path, "stem"), tower, [join(path, name) for name in own]))
    if not groups:
        groups = [Group(join(path, name), tower, [join(path, name)]) for name in heads]
        heads = []
    return Layout([[group] for group in groups], [join(path, name) for name in heads])


def _modality(name: str, content: object) -> str | None:
    if "decoder" in name:
        return None
    found = [kind for kind, pattern in MODALITIES.items() if pattern.search(name)]
    if not found and isinstance(content, nn.Module):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(content).__name__).lower()
        found = [kind for kind, pattern in MODALITIES.items() if pattern.search(words)]
    return found[0] if len(found) == 1 else None
