"""What the groups of a model are worth: cover, depth, order and places against a forward pass."""

import itertools
import time
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from tests.survey_architectures.trace import Trace
from tl_callbacks import LayerGroup, LayerGroups, group_layers
from tl_callbacks.discovery.order import contradictions
from tl_callbacks.parameters import parameters_by_name

Record = dict[str, Any]


def grouped(model: nn.Module) -> tuple[LayerGroups, float, list[str]]:
    """Return a model's groups, the seconds that it took, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        groups = group_layers(model)
        seconds = time.perf_counter() - start
    return groups, seconds, [str(warning.message) for warning in caught]


def statics(model: nn.Module) -> Record:
    """Return what the groups say without a forward pass."""
    groups, seconds, warned = grouped(model)
    parameters = parameters_by_name(model)
    total = sum(parameter.numel() for parameter in parameters.values()) or 1
    blocks = block_names(groups)
    largest = max((group for group in groups if is_block(group.name)), key=lambda g: g.num_parameters, default=None)
    share = largest.num_parameters / total if largest else 0.0
    return {
        "class": type(model).__name__,
        "parameters": total,
        "groups": len(groups),
        "levels": len(groups.levels),
        "blocks": len(blocks),
        "towers": list(groups.towers),
        "parallel": len(groups.levels) < len(groups),
        "head": groups.head is not None,
        "covers": sorted(groups.parameters) == sorted(parameters),
        "large": f"{largest.name} {share:.2f}" if largest and share > 0.5 else None,
        "seconds": round(seconds, 3),
        "warned": warned,
    }


def is_block(name: str) -> bool:
    """Return whether a group is a block: no stem, embedding or head."""
    return name.rpartition(".")[2] not in ("embeddings", "stem", "head")


def block_names(groups: LayerGroups) -> list[str]:
    """Return the names of the groups that are blocks, bottom to top."""
    return [name for name in groups.names if is_block(name)]


def traced(trace: Trace) -> Record:
    """Return how the groups of a traced model agree with the order in which the pass used its parameters."""
    groups, _, _ = grouped(trace.model)
    result: Record = {
        "trace": trace.how if trace.complete else None,
        "seen": round(trace.coverage, 3),
        "error": None if trace.complete else trace.error[:200],
    }
    if not trace.order:
        return {**result, "order": None, "misplaced": None}
    starts = _starts(groups, trace)
    disorder = _disorder(groups, starts)
    used = sorted((_marker(group, starts, trace), group.name) for group in groups if _marker(group, starts, trace))
    wrong, between = _places(groups, starts, trace)
    return {
        **result,
        "blocks_seen": len(starts),
        "order": disorder,
        "misplaced": wrong,
        "between": between,
        "would_warn": [list(pair) for pair in contradictions(groups, [name for _, name in used])[:1]],
    }


def _core(groups: LayerGroups, model: nn.Module) -> dict[str, set[str]]:
    """Return each block group's parameters that lie in the module it is called after."""
    prefix = getattr(model, "base_model_prefix", "")
    core = {}
    for group in groups:
        ways = (f"{group.name}.", f"{prefix}.{group.name}.", group.name)
        core[group.name] = {p for p in group.parameters if is_block(group.name) and p.startswith(ways)}
    return core


def _starts(groups: LayerGroups, trace: Trace) -> dict[str, int]:
    """Return when each block was first used, bottom to top."""
    core = _core(groups, trace.model)
    times = {name: [trace.order[p] for p in core[name] if p in trace.order] for name in block_names(groups)}
    return {name: min(moments) for name, moments in times.items() if moments}


def _marker(group: LayerGroup, starts: Mapping[str, int], trace: Trace) -> int:
    """Return when a group's block, or the largest parameter of a stem or head, was first used; 0 if it was not."""
    if is_block(group.name):
        return starts.get(group.name, 0)
    largest = max(zip(group.sizes, group.parameters, strict=True))[1]
    return trace.order.get(largest, 0)


def _disorder(groups: LayerGroups, starts: Mapping[str, int]) -> list[list[str]]:
    """Return neighbouring blocks of one tower that were used the other way round."""
    towers: dict[str, list[str]] = {}
    for group in groups:
        if group.name in starts:
            towers.setdefault(group.tower, []).append(group.name)
    return [
        [lower, upper]
        for names in towers.values()
        for lower, upper in itertools.pairwise(names)
        if starts[lower] > starts[upper]
    ]


def _places(groups: LayerGroups, starts: Mapping[str, int], trace: Trace) -> tuple[list[str], list[str]]:
    """Return the parameters outside the blocks that stand on the wrong side, and those used between the blocks only.

    A stem is on the wrong side if it is first used after the last block of its tower began; what stands with the last
    block or in the head if it is last used before the first block began; what stands with a block in the middle if it
    is first used before the block below or after the block above began. A stem, tail or head that is used between the
    blocks (a projector of intermediate features) has no side; it is told apart.
    """
    core = _core(groups, trace.model)
    tower = {group.name: group.tower for group in groups}
    wrong, between = [], []
    for group in groups:
        blocks = [name for name in starts if tower[name] == group.tower or not group.tower]
        above = [name for name in groups.names[groups.names.index(group.name) + 1 :] if name in blocks]
        below = [name for name in groups.names[: groups.names.index(group.name)] if name in blocks]
        if not blocks:
            continue
        for name in group.parameters:
            if name in core[group.name] or name not in trace.order:
                continue
            begin, end = trace.order[name], trace.last[name]
            if group.name in blocks and above and below:
                bad, inside = not starts[below[-1]] <= begin <= starts[above[0]], False
            elif above:
                bad, inside = begin > starts[above[-1]], begin > starts[above[0]]
            else:
                bad, inside = end < starts[blocks[0]], end < starts[blocks[-1]]
            if bad or inside:
                (wrong if bad else between).append(f"{name} in {group.name}")
    return wrong, between
