"""Reads a timm model's layers, bottom to top, from its own `group_matcher`: `timm_parts`.

A matcher is timm's statement of how deep each parameter lies. It is read here without timm: any module with a callable
`group_matcher` is taken for such a model. What matchers leave out or misplace is put where it was registered.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple, cast

from torch import nn

from tl_callbacks.names import normalise
from tl_callbacks.parameters import dimensions, true_size

# timm's mark for "belongs to the group before it", as the last number of an ordinal.
_WITH_PREVIOUS = 99999.0

# How most of timm's models call their blocks: read where a model's own matcher finds none.
_USUAL = {
    "blocks": [
        (r"^(?:stages|layers|levels)\.(\d+)\.blocks\.(\d+)", None),
        (r"^(?:stages|layers|levels)\.(\d+)", (0,)),
        (r"^blocks\.(\d+)", None),
    ]
}


class _Place(NamedTuple):
    """Where a matcher puts a parameter: depth, what the group is called, and how good that name is (0 is best)."""

    ordinal: tuple[float, ...]
    label: str
    rank: int


def timm_parts(model: nn.Module) -> list[tuple[str, tuple[str, ...]]] | None:
    r"""Return a timm model's groups as (name, parameter names), bottom to top, or None if no matcher tells them.

    Groups are those of `model.group_matcher(coarse=False)`, called by the path of their block. Apart from timm's own
    reading of it: the head is the classifier alone; parameters that the matcher leaves out stay with their neighbours
    in the order of registration instead of joining the head, so that tokens are at the bottom and what stands between
    the last block and the classifier in the top block's group; and a norm layer on its own joins the layer below.

    Args:
        model: a timm model itself, not a module that holds one.

    Returns:
        Disjoint groups that cover the model, with unique names: `embeddings` or `stem` first, then the blocks, and
        `head` last where the model has a classifier. Parameter names are those of `model.named_parameters()`. None
        if the model has no matcher, or one that finds no blocks.

    Example:
        >>> class Tiny(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        ...         self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        ...         self.norm = nn.LayerNorm(2)
        ...     def group_matcher(self, coarse=False):
        ...         return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
        ...     def get_classifier(self):
        ...         return self.head
        >>> [name for name, _ in timm_parts(Tiny())]
        ['stem', 'blocks.0', 'blocks.1', 'head']
    """
    matcher = _matcher(model)
    if matcher is None:
        return None
    head = classifier_parameters(model)
    shapes = {name: dimensions(parameter) for name, parameter in model.named_parameters()}
    body = [name for name in shapes if name not in head]
    for source in (matcher, _read(_USUAL)):
        places = {name: place for name in body if (place := source(name)) is not None}
        if len({place.ordinal for place in places.values()}) > 1:
            break
    else:
        return None
    _merge(places, body)
    _join_norms(places, shapes)
    _adopt(places, body)
    ordered = list(_grouped(body, places).values())
    result = list(zip(_titles(ordered, places), map(tuple, ordered), strict=True))
    return [*result, ("head", head)] if head else result


def classifier_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a timm model's classifier or classifiers, () if it has none.

    Which modules these are says `pretrained_cfg["classifier"]`, else `get_classifier()`. Where neither is there any
    more, it is what stands in its place: a layer of one's own as `head` of a model whose classifier was `head.fc`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model.pretrained_cfg = {"classifier": "1"}
        >>> classifier_parameters(model)
        ('1.weight', '1.bias')
    """
    said = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    paths = (said,) if isinstance(said, str) else tuple(said)
    modules = dict(model.named_modules())
    names = _names(model, [modules[path] for path in paths if path in modules]) or _names(model, _answer(model))
    if names or getattr(model, "num_classes", None) == 0:
        return names
    above = [path.split(".")[0] for path in paths if path not in modules]
    return _names(model, [modules[path] for path in above if path in modules])


def _answer(model: nn.Module) -> list[nn.Module]:
    """Return what a timm model says its classifiers are; nothing where a replaced module makes it fail."""
    try:
        answer = cast(Any, model).get_classifier()
    except AttributeError:
        return []
    return [one for one in (answer if isinstance(answer, tuple) else (answer,)) if isinstance(one, nn.Module)]


def _names(model: nn.Module, modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """Return the names of the modules' parameters, without the empty ones of a classifier for no classes."""
    ids = {id(parameter) for module in modules for parameter in module.parameters() if true_size(parameter)}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in ids)


def _matcher(model: nn.Module) -> Callable[[str], _Place | None] | None:
    """Return the model's matcher as a function of a parameter's name, None if it has none."""
    source = getattr(model, "group_matcher", None)
    if not callable(source):
        return None
    try:
        return _read(source(coarse=False))
    except Exception:  # whatever a broken matcher raises, the model can still be read without it
        return _read({})


def _read(matcher: Any) -> Callable[[str], _Place | None]:
    """Return a matcher, a mapping of expressions or a function, as a function of a parameter's name."""
    if isinstance(matcher, Mapping):
        rules = list(_rules(matcher))
        return lambda name: next((place for rule in rules if (place := rule(normalise(name)))), None)
    return _by_function(matcher)


def _rules(matcher: Mapping[str, Any]) -> Iterator[Callable[[str], _Place | None]]:
    """Yield a function for each expression: an ordinal is the entry's number, the numbers captured, and the suffix."""
    for number, (key, entries) in enumerate(matcher.items()):
        if isinstance(entries, str):
            yield _rule(re.compile(entries), number, (), key)
        else:
            yield from (_rule(re.compile(pattern), number, tuple(suffix or ())) for pattern, suffix in entries or ())


def _rule(
    pattern: re.Pattern[str], number: int, suffix: tuple[float, ...], key: str = ""
) -> Callable[[str], _Place | None]:
    def place(name: str) -> _Place | None:
        found = pattern.match(name)
        if found is None:
            return None
        captured = tuple(float(group) for group in found.groups() if group and group.isdigit())
        label = name[: found.end()] + re.split(r"\.", name[found.end() :])[0] if captured else key
        rank = 2 if not captured else 1 if suffix else 0
        return _Place((float(number), *captured, *map(float, suffix)), label, rank)

    return place


def _by_function(matcher: Callable[[str], Any]) -> Callable[[str], _Place | None]:
    """Return a matcher that is a function, with later stacks kept above earlier ones.

    A function may set the blocks of a second stack beside the last ones of the first (CaiT's token-only blocks), though
    they run after all of them. So a block that is registered after a deeper one is a group of its own above it.
    """
    highest: list[_Place] = []
    known: dict[tuple[str, tuple[float, ...]], _Place] = {}

    def place(name: str) -> _Place | None:
        try:
            answer = matcher(normalise(name))
            ordinal = tuple(map(float, answer)) if isinstance(answer, Iterable) else (float(answer),)
        except Exception:  # a matcher that fails on a name leaves the parameter out
            return None
        if not all(map(math.isfinite, ordinal)):
            return None
        block, numbered = _block(name)
        if (block, ordinal) not in known:
            new = _Place(ordinal, block, 0 if numbered else 1)
            if highest and ordinal < highest[0].ordinal:
                above = (*highest[0].ordinal, float(len(known)))
                new = new._replace(ordinal=above) if numbered else highest[0]._replace(rank=3)
            highest[:] = [max([new, *highest], key=lambda one: one.ordinal)]
            known[block, ordinal] = new
        return known[block, ordinal]

    return place


def _block(name: str) -> tuple[str, bool]:
    """Return the path of the block at the top of a model that a parameter is in, and whether it is numbered."""
    parts = normalise(name).split(".")[:-1] or [name]
    numbered = len(parts) > 1 and parts[1].isdigit()
    return ".".join(parts[: 1 + numbered]), numbered


def _merge(places: dict[str, _Place], body: list[str]) -> None:
    """Give what goes with the previous group that group's place; drop what is registered before all of that group."""
    order = {name: number for number, name in enumerate(body)}
    starts: dict[tuple[float, ...], int] = {}
    for name, place in places.items():
        if place.ordinal[-1] != _WITH_PREVIOUS:
            starts.setdefault(place.ordinal, order[name])
    for name, place in list(places.items()):
        if place.ordinal[-1] == _WITH_PREVIOUS:
            below = max((ordinal for ordinal in starts if ordinal < place.ordinal), default=None)
            del places[name]
            if below is not None and order[name] > starts[below]:
                places[name] = _Place(below, place.label, 3)


def _join_norms(places: dict[str, _Place], dimensions: Mapping[str, int]) -> None:
    """Give groups without a matrix, which are norm layers that a matcher counts as blocks, the place below them."""
    below: tuple[float, ...] | None = None
    for ordinal, names in _grouped(places, places).items():
        if below is not None and all(dimensions[name] < 2 for name in names):
            places |= {name: places[name]._replace(ordinal=below, rank=3) for name in names}
        else:
            below = ordinal


def _grouped(names: Iterable[str], places: Mapping[str, _Place]) -> dict[tuple[float, ...], list[str]]:
    """Return the names by ordinal, bottom to top."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        groups.setdefault(places[name].ordinal, []).append(name)
    return dict(sorted(groups.items()))


def _adopt(places: dict[str, _Place], body: list[str]) -> None:
    """Give each parameter that the matcher left out the place of the neighbour it shares more of its path with.

    On a tie that is the one registered before it. Parameters of the model itself and those before all others are at the
    bottom: tokens, position embeddings, a norm after them.
    """
    lowest = min(places.values())
    bottom = _Place((-1.0,), "", 3) if lowest.rank == 0 else lowest._replace(rank=3)
    placed = dict(places)
    for number, name in enumerate(body):
        if name in placed:
            continue
        before = next((one for one in reversed(body[:number]) if one in placed), None)
        after = next((one for one in body[number:] if one in placed), None)
        if "." not in name or before is None:
            places[name] = bottom
        else:
            nearer = after is not None and _shared(name, after) > _shared(name, before)
            places[name] = placed[cast(str, after) if nearer else before]._replace(rank=3)


def _shared(one: str, other: str) -> int:
    """Return how many parts two paths have in common from their beginning."""
    return len(_common([one, other]))


def _common(paths: Iterable[str]) -> list[str]:
    """Return the parts that all paths begin with."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _titles(groups: list[list[str]], places: Mapping[str, _Place]) -> list[str]:
    """Return unique names of ordered groups: the bottom, then the path of each group's block."""
    titles: list[str] = []
    for number, names in enumerate(groups):
        best = min((places[name] for name in names), key=lambda place: place.rank)
        if not number and best.rank > 0:
            titles.append("embeddings" if any("embed" in name or "." not in name for name in names) else "stem")
            continue
        path = ".".join(_common(name.rpartition(".")[0] for name in names))
        candidates = [best.label, path, names[0].split(".")[0]]
        candidates += [f"{best.label or names[0]}.{count}" for count in range(2, len(groups) + 2)]
        taken = {"", "head", *titles}
        titles.append(next(title for title in candidates if title not in taken))
    return titles
