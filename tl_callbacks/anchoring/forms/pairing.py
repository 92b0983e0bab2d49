"""What is anchored: parameters with their references, and what LoRA adds to a weight, by the optimizer's groups."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from tl_callbacks.anchoring.forms.form import Anchored, AnchoredUpdate
from tl_callbacks.anchoring.operations.lora import LoraUpdate, update_norm
from tl_callbacks.anchoring.operations.pulls import distance
from tl_callbacks.groups import LayerGroup


def pair(
    parameters: Mapping[str, nn.Parameter],
    references: Mapping[str, Tensor],
    strengths: Mapping[str, float],
    optimizer: Optimizer,
    updates: Iterable[LoraUpdate] = (),
) -> tuple[list[Anchored], list[AnchoredUpdate]]:
    """Return the parameters that are anchored one by one, and the LoRA updates that are anchored as a whole.

    Args:
        parameters: by normalised name.
        references: placed like the parameters; what has none, as the factors of `updates`, is left out.
        strengths: of the parameters that are anchored.
        optimizer: what steps them; those that it does not hold are left out.
        updates: what LoRA adds to the weights, where that is what is anchored.

    Example:
        >>> import torch
        >>> line = nn.Linear(1, 1)
        >>> anchored, _ = pair({"bias": line.bias}, {"bias": line.bias}, {"bias": 0.5}, torch.optim.SGD([line.bias]))
        >>> [(one.name, one.strength) for one in anchored]
        [('bias', 0.5)]
    """
    holder = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    strength_of = {id(parameters[name]): strength for name, strength in strengths.items()}
    held = [
        AnchoredUpdate(update, strength_of[key], holder[key])
        for update in updates
        if (key := id(update.moving)) in strength_of and key in holder
    ]
    anchored = [
        Anchored(p, references[name], strength, holder[id(p)], name)
        for name, strength in strengths.items()
        if name in references and id(p := parameters[name]) in holder
    ]
    return anchored, held


def group_distances(
    groups: Iterable[LayerGroup],
    parameters: Mapping[str, nn.Parameter],
    references: Mapping[str, Tensor],
    updates: Sequence[LoraUpdate] = (),
) -> dict[str, float]:
    """Return each group's Euclidean distance from the reference, bottom to top; of LoRA the norm of what it adds.

    Groups of which nothing is anchored are left out.

    Args:
        groups: the layer groups.
        parameters: by normalised name.
        references: of those that are anchored one by one.
        updates: what LoRA adds to the weights, where that is what is anchored.

    Example:
        >>> import torch
        >>> from tl_callbacks import group_layers
        >>> line = nn.Linear(2, 1, bias=False)
        >>> group_distances(group_layers(line), {"weight": line.weight}, {"weight": line.weight.detach().clone()})
        {'stem': 0.0}
    """
    in_updates = {id(parameter) for update in updates for parameter in update.parameters}
    result = {}
    for group in groups:
        held = {name: parameters[name] for name in group.parameters if name in parameters}
        ids = {id(parameter) for parameter in held.values()}
        norms = [update_norm(update) for update in updates if id(update.moving) in ids]
        apart = [(p, references[n]) for n, p in held.items() if n in references and id(p) not in in_updates]
        if apart or norms:
            result[group.name] = math.hypot(distance(apart), *norms)
    return result
