"""Layer groups: an ordered partition of a model's parameter names, bottom (input) to top (head).

A value without tensors, so that it can be printed, stored and compared. How a model is read is in `discovery`.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

from tl_callbacks.names import assign, closest, matches
from tl_callbacks.tables import table


@dataclass(frozen=True)
class LayerGroup:
    """One group of parameters that are opened, rated and anchored together.

    Args:
        name: unique within its `LayerGroups`; usually the path of the block, or `head`.
        parameters: names as `named_parameters()` gives them, normalised.
        sizes: number of scalars of each parameter, in the same order.
        dtype: dtype of the parameters, comma-separated if there are several.
        tower: path of the tower it belongs to, in a model with several; "" for what towers share, such as the head.
        beside: whether it stands beside the group before it: in a parallel tower, at the same depth from the output.

    Example:
        >>> LayerGroup("head", ("classifier.weight", "classifier.bias")).name
        'head'
    """

    name: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    dtype: str = ""
    tower: str = ""
    beside: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the group."""
        return sum(self.sizes)


@dataclass(frozen=True)
class LayerGroups(Sequence[LayerGroup]):
    """Ordered groups, bottom (input) to top (head): each parameter exactly once.

    `group_layers` makes one from a model; `split` and `merge` change it by hand. It holds names and
    counts, never tensors, and prints as a table.

    Args:
        groups: the groups, bottom to top.
        head: name of the group of the task head, the last one, or None where the model has none of its own.
        notes: remarks for people that the table shows, such as a tied head.

    Raises:
        ValueError: a group name or a parameter occurs twice, a group is empty, or `head` is not the last group.

    Example:
        >>> body, head = LayerGroup("body", ("a.weight",), (4,)), LayerGroup("head", ("b.weight",), (2,))
        >>> groups = LayerGroups((body, head), "head")
        >>> groups.names
        ('body', 'head')
        >>> groups["head"].parameters
        ('b.weight',)
        >>> LayerGroups.from_json(groups.to_json()) == groups
        True
    """

    groups: tuple[LayerGroup, ...]
    head: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, items in (
            ("group name", self.names),
            ("parameter", [name for group in self.groups for name in group.parameters]),
        ):
            twice = [item for item, count in Counter(items).items() if count > 1]
            if twice:
                raise ValueError(
                    f"{what} `{twice[0]}` occurs {items.count(twice[0])} times; expected each exactly once. "
                    f"Remove the repetition{f' (and {len(twice) - 1} more)' if len(twice) > 1 else ''}."
                )
        if self.groups and self.groups[0].beside:
            raise ValueError(f"group `{self.names[0]}` is the first and stands beside none; set beside=False.")
        empty = [group.name for group in self.groups if not group.parameters]
        if empty or not self.groups:
            which = f"group `{empty[0]}` has no parameters" if empty else "there are no groups"
            raise ValueError(f"{which}; expected at least one parameter a group. Leave empty groups out.")
        if self.head is not None and self.groups[-1].name != self.head:
            raise ValueError(
                f"head `{self.head}` is not the last group (`{self.groups[-1].name}`); groups are ordered bottom to "
                "top, so the head comes last. Reorder the groups or pass head=None."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, bottom to top."""
        return tuple(group.name for group in self.groups)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, bottom to top."""
        return tuple(name for group in self.groups for name in group.parameters)

    @property
    def levels(self) -> tuple[tuple[LayerGroup, ...], ...]:
        """Groups by depth, bottom to top; a level holds more than one group where towers run in parallel.

        Rates and schedules count levels, so that parallel towers, aligned by depth from the output, are treated alike.
        """
        starts = [place for place, group in enumerate(self.groups) if not group.beside]
        return tuple(self.groups[start:end] for start, end in itertools.pairwise([*starts, len(self.groups)]))

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers, in the order of their lowest groups; empty where there is only one."""
        return tuple(dict.fromkeys(group.tower for group in self.groups if group.tower))

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self.groups)

    @overload
    def __getitem__(self, key: int | str) -> LayerGroup: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[LayerGroup, ...]: ...
    def __getitem__(self, key: int | str | slice) -> LayerGroup | tuple[LayerGroup, ...]:
        if not isinstance(key, str):
            return self.groups[key]
        return self.groups[self.names.index(self.select([key])[0])]

    def select(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the groups that match any of the anchored patterns, bottom to top.

        Args:
            patterns: group names, or patterns as `matches` reads them.

        Raises:
            ValueError: a pattern matches no group.

        Example:
            >>> groups = LayerGroups((LayerGroup("layer.1", ("a",)), LayerGroup("layer.10", ("b",))))
            >>> groups.select(["layer.1"])
            ('layer.1',)
        """
        if isinstance(patterns, str):
            raise TypeError(f"expected a sequence of group names, got the text `{patterns}`. Write (`{patterns}`,).")
        chosen = set()
        for pattern in patterns:
            found = {name for name in self.names if matches(pattern, name)}
            if not found:
                raise ValueError(
                    f"pattern `{pattern}` matches no group. Closest names: {closest(pattern, self.names)}. "
                    "Print group_layers(model) to see all groups."
                )
            chosen |= found
        return tuple(name for name in self.names if name in chosen)

    def by_group(self, values: float | Mapping[str, float], *, default: float) -> dict[str, float]:
        """Return one number per group from a number or a pattern map; the last matching pattern wins.

        Args:
            values: one number for all groups, or anchored patterns of group names to numbers.
            default: the number of groups that no pattern matches.

        Raises:
            ValueError: a pattern matches no group.

        Example:
            >>> groups = LayerGroups((LayerGroup("layer.0", ("a",)), LayerGroup("head", ("b",))))
            >>> groups.by_group({"layer.*": 0.5}, default=1.0)
            {'layer.0': 0.5, 'head': 1.0}
        """
        if not isinstance(values, Mapping):
            return dict.fromkeys(self.names, float(values))
        result = dict.fromkeys(self.names, float(default))
        for pattern, value in values.items():
            result |= dict.fromkeys(self.select([pattern]), float(value))
        return result

    def merge(self, patterns: Iterable[str], name: str) -> "LayerGroups":
        """Return groups in which those matching `patterns`, which must be neighbours, are one group `name`.

        Raises:
            ValueError: a pattern matches nothing, or the matching groups are not neighbours.

        Example:
            >>> groups = LayerGroups(tuple(LayerGroup(f"layer.{i}", (f"w{i}",)) for i in range(3)))
            >>> groups.merge(["layer.0", "layer.1"], "lower").names
            ('lower', 'layer.2')
        """
        chosen = self.select(patterns)
        first = self.names.index(chosen[0])
        if self.names[first : first + len(chosen)] != chosen:
            raise ValueError(
                f"groups {', '.join(f'`{c}`' for c in chosen)} are not neighbours; a merged group needs one place in "
                "the order bottom to top. Merge what lies between them too."
            )
        members = self.groups[first : first + len(chosen)]
        towers = {group.tower for group in members}
        merged = LayerGroup(
            name,
            tuple(parameter for group in members for parameter in group.parameters),
            tuple(size for group in members for size in group.sizes),
            ", ".join(sorted({dtype for group in members for dtype in group.dtype.split(", ") if dtype})),
            tower=towers.pop() if len(towers) == 1 else "",
            beside=members[0].beside,
        )
        head = name if self.head in chosen else self.head
        rest = self.groups[first + len(chosen) :]
        return replace(self, groups=(*self.groups[:first], merged, *rest), head=head)

    def split(self, name: str, patterns: Mapping[str, str]) -> "LayerGroups":
        """Return groups in which `name` is split into several, in the order of `patterns`, bottom to top.

        Args:
            name: the group to split.
            patterns: new group name to anchored pattern of parameter names; each parameter of the group must match
                exactly one.

        Raises:
            ValueError: a pattern matches no parameter of the group, or a parameter matches none or two.

        Example:
            >>> groups = LayerGroups((LayerGroup("body", ("a.weight", "b.weight"), (1, 2), "float32"),))
            >>> groups.split("body", {"low": "a", "high": "b"}).names
            ('low', 'high')
        """
        group = self[name]
        place = self.groups.index(group)
        size = dict(zip(group.parameters, group.sizes, strict=True))
        parts = tuple(
            replace(
                group,
                name=new,
                parameters=found,
                sizes=tuple(size[parameter] for parameter in found),
                beside=group.beside and number == 0,
            )
            for number, (new, found) in enumerate(assign(group.parameters, patterns).items())
        )
        head = parts[-1].name if self.head == group.name else self.head
        return replace(self, groups=(*self.groups[:place], *parts, *self.groups[place + 1 :]), head=head)

    def describe(self, columns: Mapping[str, Callable[[LayerGroup], str]] | None = None) -> str:
        """Return the table of groups, bottom to top: name, parameters, share of the model, dtype.

        Args:
            columns: further columns, title to a function of the group.
        """
        total = sum(group.num_parameters for group in self.groups) or 1
        if len(self.levels) < len(self.groups):
            level = {group.name: str(number) for number, level in enumerate(self.levels) for group in level}
            columns = {"level": lambda group: level[group.name], **(columns or {})}
        rows = [["group", "parameters", "share", "dtype", *(columns or {})]]
        rows += [
            [
                group.name,
                f"{group.num_parameters:,}",
                f"{100 * group.num_parameters / total:.1f} %",
                group.dtype,
                *(column(group) for column in (columns or {}).values()),
            ]
            for group in self.groups
        ]
        return "\n".join([table(rows), *(f"note: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.describe()

    def to_json(self) -> str:
        """Return the groups as JSON text; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "LayerGroups":
        """Return the groups that `to_json` wrote.

        Raises:
            ValueError: the text is not such JSON, or its groups are no partition.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            groups = tuple(
                LayerGroup(**{**g, "parameters": tuple(g["parameters"]), "sizes": tuple(g["sizes"])})
                for g in value["groups"]
            )
            return LayerGroups(groups, value["head"], tuple(value["notes"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"expected the JSON of LayerGroups.to_json(), got something else: {error!r}") from error
