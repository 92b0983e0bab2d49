"""Arranges a model's towers, and places what stands below, above and between their blocks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from tl_callbacks.discovery.blocks import children, contains_stack, join, own_parameters, parts, size

# What works below the blocks though it may be registered after them, and what works above though it may come before.
_BELOW = re.compile(
    r"(?<!un)embed(?!ding_(projection|norm)$)|token|position|rel(ative)?_|(^|_)pos_|_pos$|per_layer|^ple$|post_conv"
)
# What is fed to a later tower from outside, and the towers that read it.
_READERS = (
    (re.compile(r"quer(y|ies)|ref(erence)?_?point"), re.compile(r"decoder|former|perceiver|resampler")),
    (re.compile(r"^level_embed"), re.compile(r"encoder")),
    (re.compile(r"quantiz"), re.compile(r"decoder")),
)
_ABOVE = re.compile(
    r"unembed|final|^ln_f$|^norm_f$|ln_post|norm_post|post_?(layer)?norm|_out$|^out_|^head|_heads?$|classif|pool|logit|predict|"
    r"decode_|output|neck|fpn|pan_|lateral|temperature"
)
_BRIDGE = re.compile(r"proj|connector|adapt|bridge|merger|resampl|align|norm|to_dec")
_STEM = re.compile(r"embed|stem|feature_extract|subsampl")
_HEAD = re.compile(r"^(lm_head|heads?|head_\w+|classifier|score|fc|fc_out|output_layer|qa_outputs|cls|out)$")
_TO_TEXT = re.compile(r"^language_proj")  # leads from another tower to the language model
_LAST = re.compile(r"^(x|cross|fusion)_")  # what joins the towers
_TASK = re.compile(r"For[A-Z]|Head|WithProjection")
_MODALITIES = {
    "text": re.compile(r"text|language|(^|_)ll?m(_|$)"),
    "vision": re.compile(r"vision|visual|image|video|pixel|vit(_|$)|vpm"),
    "audio": re.compile(r"audio|speech|acoustic"),
    "other": re.compile(r"protein|graph"),
}


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
        for place, (name, blocks) in enumerate(parts(module)):
            child = module.get_submodule(name)
            if name in heads:
                continue
            if blocks:
                found.append((name, place, blocks))
            elif self._has_depth(child, name, module):
                found.append((name, place, child))
            else:
                leaves.append((place, name))
        found.sort(key=lambda item: _LAST.match(item[0]) is not None)
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
        if not contains_stack(child, name):
            return False
        return not _STEM.search(name) or size(child) > 0.3 * size(parent)

    def _combine(self, segments: list[_Segment], path: str) -> Layout:
        """Return the layout of several towers: side by side if they read different inputs, else one on the other."""
        branches: dict[str, list[_Segment]] = {}
        if len({s.modality for s in segments if s.modality}) > 1:
            for segment in segments:
                last = next(reversed(branches), None)
                if segment.modality or (last and last != "text"):
                    branches.setdefault(segment.modality or cast(str, last), []).append(segment)
        if len(branches) < 2:
            return _series([segment.layout for segment in segments])
        chains = [_series([segment.layout for segment in chain]) for chain in branches.values()]
        names = [join(path, chain[0].name) for chain in branches.values()]
        self.parallel += names
        below = [s.layout for s in segments if not any(s in chain for chain in branches.values())]
        ordered = [name for name in self.in_series if name in names]
        if ordered:
            both = _series([chains[names.index(name)] for name in [n for n in names if n not in ordered] + ordered])
        else:
            both = _parallel(chains)
        first = min(chain[0].place for chain in branches.values())
        under = [s.layout for s in segments if s.layout in below and s.place < first]
        over = [s.layout for s in segments if s.layout in below and s.place > first]
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
    for pattern, reads in _READERS:
        if pattern.search(name):
            readers = [segment for segment in segments if reads.search(segment.name)] or segments[:1]
            readers[0].layout.add_below(full, _label(readers[0]))
            return
    before = [segment for segment in segments if segment.place < place]
    after = [segment for segment in segments if segment.place > place]
    below, above, bridge = is_below(module, name), bool(_ABOVE.search(name)), bool(_BRIDGE.search(name))
    kinds = {segment.modality for segment in segments if segment.modality}
    own = [segment for segment in segments if segment.modality and _MODALITIES[segment.modality].search(name)]
    others = [segment for segment in segments if segment.modality not in (None, "text")]
    if len(kinds) > 1 and others and bridge and (not own or _TO_TEXT.search(name)):
        others[-1].layout.add_above(full)
        return
    elif len(segments) > 1 and len(own) == 1:
        before, after = (own, []) if not below or above else ([], own)
    if not above and (not before or (below and not after)):
        target = after[0] if not before else before[0 if place > 0 and len(kinds) < 2 else -1]
        if before and not after:
            target = before[-1]
        target.layout.add_below(full, _label(target))
    elif not before:
        segments[-1].layout.add_above(full)
    elif after and below and not above:
        after[0].layout.add_below(full, _label(after[0]))
    else:
        before[-1].layout.add_above(full)


def _label(segment: _Segment) -> str:
    return segment.layout.levels[0][0].tower


def is_below(module: nn.Module, name: str) -> bool:
    """Return whether a part of a module works below its blocks: by its name, or as a lookup table."""
    if _BELOW.search(name):
        return True
    child = getattr(module, name)
    return isinstance(child, nn.Module) and any(isinstance(part, nn.Embedding) for part in child.modules())


def head_parts(module: nn.Module, *, is_root: bool) -> list[str]:
    """Return the names of the children and parameters of a module that are its head."""
    named = children(module)
    prefix = getattr(module, "base_model_prefix", "")
    bare = type(module).__module__.startswith("transformers.") and not _TASK.search(type(module).__name__)
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
        after = [name for name, _ in named[max(with_depth, default=len(named) - 2) + 1 :] if not is_below(module, name)]
        return after or [name for name, _ in named if _HEAD.match(name)]
    by_name = [name for number, (name, _) in enumerate(named) if _HEAD.match(name) and number not in with_depth]
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
    found = [kind for kind, pattern in _MODALITIES.items() if pattern.search(name)]
    if not found and isinstance(content, nn.Module):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(content).__name__).lower()
        found = [kind for kind, pattern in _MODALITIES.items() if pattern.search(words)]
    return found[0] if len(found) == 1 else None
