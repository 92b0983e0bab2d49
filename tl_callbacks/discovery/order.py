"""In which order a forward pass uses the groups, against the order that they stand in."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.discovery.blocks import join
from tl_callbacks.groups import LayerGroups
from tl_callbacks.names import normalise


def watch_order(model: nn.Module, groups: LayerGroups) -> Callable[[], None]:
    """Check the order of the groups in the next training forward of `model`, and warn with both orders if it differs.

    Pre-hooks note when each group's modules are first called, and are removed after that forward.

    Args:
        model: the model without wrappers.
        groups: its groups.

    Returns:
        A function that removes the hooks; safe to call at any time.

    Example:
        >>> from tl_callbacks import group_layers
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> remove = watch_order(model, group_layers(model))
        >>> _ = model(torch.zeros(1, 2))
        >>> len(model._forward_hooks) + len(model[0]._forward_pre_hooks)
        0
    """
    used, remove = _note_use(model, groups)

    def compare(root: nn.Module, inputs: object, output: object) -> None:
        remove()
        handle.remove()
        if contradiction := contradictions(groups, used):
            lower, upper = contradiction[0]
            listed = " < ".join(name for name in groups.names if name in used)
            warnings.warn(
                f"the forward uses `{upper}` before `{lower}`, but the groups stand in another order. Groups: {listed}"
                f"; forward: {' < '.join(used)}. Unfreezing and layer-wise rates follow the groups. Put "
                "them in the order of use with group_layers(model, example=batch), or by hand with patterns=.",
                UserWarning,
                stacklevel=2,
            )

    handle = model.register_forward_hook(compare)

    def remove_all() -> None:
        remove()
        handle.remove()

    return remove_all


def in_order_of_use(model: nn.Module, groups: LayerGroups, example: Mapping[str, Any]) -> LayerGroups:
    """Return the groups in the order in which one forward without gradient uses them; the head stays on top.

    Groups that the forward does not use stay above the group they stood above. Groups of parallel towers change
    places only within their tower. Random states and the mode of the modules are left as they were.

    Args:
        model: the model.
        groups: its groups.
        example: a batch of its inputs.

    Example:
        >>> class Swapped(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.second, self.first, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.head(self.second(self.first(x)))
        >>> from tl_callbacks import group_layers
        >>> model = Swapped()
        >>> group_layers(model).names
        ('second', 'first', 'head')
        >>> group_layers(model, example={"x": torch.zeros(1, 2)}).names
        ('first', 'second', 'head')
    """
    used, remove = _note_use(model, groups)
    modes = [(module, module.training) for module in model.modules()]
    devices = [p.device for p in itertools.islice(model.parameters(), 1) if p.device.type == "cuda"]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            model(**example)
    finally:
        remove()
        for module, training in modes:
            module.training = training
    if not contradictions(groups, used):
        return groups
    moment = {name: number for number, name in enumerate(used)}
    keys: dict[str, int] = {}
    for tower in (*groups.towers, ""):
        below = -1
        for group in groups:
            if group.tower == tower:
                below = keys[group.name] = moment.get(group.name, below)
    free = [group for group in groups if group.name != groups.head]
    head = [group for group in groups if group.name == groups.head]
    if any(group.beside for group in groups):
        queues = {
            tower: iter(sorted((g for g in free if g.tower == tower), key=lambda g: keys[g.name]))
            for tower in (*groups.towers, "")
        }
        ordered = [replace(next(queues[group.tower]), beside=group.beside) for group in free]
    else:
        ordered = sorted(free, key=lambda group: keys[group.name])
    return replace(groups, groups=(*ordered, *head))


def contradictions(groups: LayerGroups, used: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs (lower, upper) of groups of which a forward uses the upper one first.

    Groups of parallel towers are not compared with each other.

    Args:
        groups: the groups.
        used: names of groups in the order of their first use.

    Example:
        >>> from tl_callbacks import LayerGroup
        >>> groups = LayerGroups((LayerGroup("low", ("a",)), LayerGroup("high", ("b",))))
        >>> contradictions(groups, ["high", "low"])
        [('low', 'high')]
    """
    parallel = any(group.beside for group in groups)
    tower = {group.name: group.tower for group in groups}
    moment = {name: number for number, name in enumerate(used)}
    order = [name for name in groups.names if name in moment]
    return [
        (lower, upper)
        for lower, upper in itertools.combinations(order, 2)
        if moment[upper] < moment[lower] and not (parallel and tower[lower] != tower[upper])
    ]


def _note_use(model: nn.Module, groups: LayerGroups) -> tuple[list[str], Callable[[], None]]:
    """Note the groups in the order in which their modules are called, in a list; return it and how to stop."""
    used: list[str] = []
    handles: list[RemovableHandle] = []

    def noter(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: object) -> None:
            if name not in used:
                used.append(name)

        return note

    for name, module in _markers(model, groups).items():
        handles.append(module.register_forward_pre_hook(noter(name)))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return used, remove


def _markers(model: nn.Module, groups: LayerGroups) -> dict[str, nn.Module]:
    """Return the largest module of each group: its block, rather than a norm or a token that belongs to it too."""
    owner = {name: group.name for group in groups for name in group.parameters}
    found: dict[str, tuple[int, nn.Module]] = {}
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop()
        named = [(normalise(join(path, name)), parameter) for name, parameter in module.named_parameters()]
        owners = {owner[name] for name, _ in named if name in owner}
        if len(owners) == 1 and path:
            name = owners.pop()
            size = sum(parameter.numel() for _, parameter in named)
            found[name] = max(found.get(name, (0, module)), (size, module), key=lambda pair: pair[0])
        elif owners:
            pending += [(join(path, name), child) for name, child in module.named_children()]
    return {group.name: found[group.name][1] for group in groups if group.name in found}
