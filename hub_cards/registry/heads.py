"""Heads of several classifiers as one, by a policy that the caller states. Rules and tensors; no adapters in here."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hub_cards.pulling.loading import shortened
from hub_cards.registry.sharing import AVERAGE, UNION, equal


@dataclass(frozen=True)
class Head:
    """What one adapter brings whole, and what its outputs are called.

    Attributes:
        name: of the adapter.
        modules: by their path in the model; empty if it has no head of its own.
        labels: the names of the outputs in their order.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None: not stated.
        weight: in the merge.

    Example:
        >>> Head("news", {"classifier": nn.Linear(4, 2)}, ("bad", "good"), None, 0.5).labels
        ('bad', 'good')
    """

    name: str
    modules: Mapping[str, nn.Module]
    labels: tuple[str, ...]
    problem_type: str | None
    weight: float


def averaged(heads: Sequence[Head]) -> dict[str, nn.Module]:
    """Return the weighted mean of heads, the outputs matched by name, in the order of the first head.

    The weights are divided by their sum. Layers below the last one are averaged as they are: that is sensible where
    they began with the same values, and all of them are compared with nothing.

    Args:
        heads: of the same form, with the same set of label names.

    Raises:
        ValueError: the label names differ, repeat, or were never given; the forms or the problem types differ; a
            weight is negative, or all are 0.

    Example:
        >>> one, other = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> _ = one.load_state_dict({"weight": torch.tensor([[1.], [2.]]), "bias": torch.zeros(2)})
        >>> _ = other.load_state_dict({"weight": torch.tensor([[4.], [3.]]), "bias": torch.zeros(2)})
        >>> heads = [Head("a", {"h": one}, ("no", "yes"), None, 1), Head("b", {"h": other}, ("yes", "no"), None, 1)]
        >>> averaged(heads)["h"].weight.flatten().tolist()
        [2.0, 3.0]
    """
    first = heads[0]
    _check_comparable(heads, AVERAGE)
    for head in heads[1:]:
        if set(head.labels) != set(first.labels):
            only = [f"only `{h.name}` has {shortened(set(h.labels) - set(o.labels))}" for h, o in _both(first, head)
                    if set(h.labels) - set(o.labels)]  # fmt: skip
            raise ValueError(
                f'head="average" needs the same label names, but {", ".join(only)}; use head="union", or the name of '
                "the adapter whose head is to be kept."
            )
    shares = _shares(heads)
    states = [_states(head) for head in heads]
    if len({_form(state) for state in states}) > 1:
        raise ValueError(
            f'head="average" needs heads of one form; those of {", ".join(f"`{head.name}`" for head in heads)} differ '
            "in their layers or shapes. Keep one: head=<name of an adapter>."
        )
    place, _ = _last_linear(first)
    merged = _copies(first)
    with torch.no_grad():
        for key, tensor in _states(Head("", merged, (), None, 0)).items():
            parts = []
            for head, state in zip(heads, states, strict=True):
                rows = [head.labels.index(label) for label in first.labels] if _above(key) == place else ...
                parts.append(state[key][rows])
            if tensor.is_floating_point():
                mean = sum((share * part.double() for share, part in zip(shares, parts, strict=True)), torch.zeros(()))
                tensor.copy_(torch.as_tensor(mean))
    return merged


def united(heads: Sequence[Head]) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Return one head with the outputs of all, and their names: the first head's, then what the others add.

    An output that several heads have is their weighted mean, the weights divided by their sum; one that a single head
    has is taken as it is. The outputs of different heads were never trained against each other, so nothing says that
    their sizes can be compared.

    Args:
        heads: whose layers below the last one are equal: a row fits only the features that it was trained on.

    Raises:
        ValueError: the layers below the last one differ; names repeat or were never given; the problem types differ;
            a weight is negative, or all weights of a shared name are 0.

    Example:
        >>> heads = [Head("a", {"h": nn.Linear(4, 2)}, ("no", "yes"), None, 1),
        ...          Head("b", {"h": nn.Linear(4, 2)}, ("yes", "maybe"), None, 1)]
        >>> modules, labels = united(heads)
        >>> modules["h"].weight.shape, labels
        (torch.Size([3, 4]), ('no', 'yes', 'maybe'))
    """
    first = heads[0]
    _check_comparable(heads, UNION)
    lasts = [_last_linear(head) for head in heads]
    place, linear = lasts[0]
    below = [{key: tensor for key, tensor in _states(head).items() if _above(key) != place} for head in heads]
    for head, (other, last), state in zip(heads[1:], lasts[1:], below[1:], strict=True):
        different = {key for key in state.keys() | below[0].keys() if not equal(state.get(key), below[0].get(key))}
        if different or other != place:
            raise ValueError(
                f'head="union" needs equal layers below the last one, but those of `{first.name}` and `{head.name}` '
                f"differ ({shortened(different or {other, place})}): the rows of one do not fit the features of the "
                "other. Keep one: head=<name of an adapter>."
            )
        if last.in_features != linear.in_features or (last.bias is None) != (linear.bias is None):
            raise ValueError(
                f'head="union" needs last layers of one form, but those of `{first.name}` and `{head.name}` are '
                f"{linear} and {last}. Keep one: head=<name of an adapter>."
            )
    labels = tuple(dict.fromkeys(label for head in heads for label in head.labels))
    bias, weight = linear.bias is not None, linear.weight
    wide = nn.Linear(linear.in_features, len(labels), bias=bias, device=weight.device, dtype=weight.dtype)
    wide.requires_grad_(False)
    for row, label in enumerate(labels):
        having = [(head, last) for head, (_, last) in zip(heads, lasts, strict=True) if label in head.labels]
        shares = _shares([head for head, _ in having]) if len(having) > 1 else [1.0]
        for ours, theirs in ((wide.weight, "weight"), (wide.bias, "bias")):
            if ours is not None:
                rows = [getattr(last, theirs)[head.labels.index(label)].double() for head, last in having]
                ours[row] = sum((share * part for share, part in zip(shares, rows, strict=True)), torch.zeros(()))
    return _with_last(first, place, wide), labels


def _both(one: Head, other: Head) -> tuple[tuple[Head, Head], tuple[Head, Head]]:
    return (one, other), (other, one)


def _check_comparable(heads: Sequence[Head], policy: str) -> None:
    """Raise unless the outputs of heads can be matched by their names."""
    for head in heads:
        if not head.modules:
            raise ValueError(
                f'head="{policy}" needs a head in every adapter, but `{head.name}` brings none; use head=None if none '
                "does, or the name of the adapter whose head is to be kept."
            )
        if len(head.labels) > 1 and all(re.fullmatch(r"LABEL_\d+", label) for label in head.labels):
            raise ValueError(
                f'head="{policy}" matches outputs by their label names, but those of `{head.name}` were never given '
                f"(`{head.labels[0]}`, ...), so nothing says what they mean; keep one: head=<name of an adapter>."
            )
        if len(set(head.labels)) != len(head.labels):
            twice = {label for label in head.labels if head.labels.count(label) > 1}
            raise ValueError(
                f'head="{policy}" matches outputs by their label names, but `{head.name}` has {shortened(twice)} more '
                "than once; keep one: head=<name of an adapter>."
            )
    stated = {head.problem_type: head.name for head in heads if head.problem_type}
    if len(stated) > 1:
        told = ", ".join(f"`{name}` is for {kind}" for kind, name in sorted(stated.items()))
        raise ValueError(
            f'head="{policy}" needs heads for one kind of problem, but {told}; keep one: head=<name of an adapter>.'
        )


def _shares(heads: Sequence[Head]) -> list[float]:
    weights = {head.name: head.weight for head in heads}
    total = sum(weights.values())
    if min(weights.values()) < 0 or total <= 0:
        raise ValueError(
            f"the weights {weights} give no mean of heads; expected none below 0, and one above. Keep one head: "
            "head=<name of an adapter>."
        )
    return [head.weight / total for head in heads]


def _states(head: Head) -> dict[str, Tensor]:
    return {
        f"{path}.{key}": tensor for path, module in head.modules.items() for key, tensor in module.state_dict().items()
    }


def _form(state: Mapping[str, Tensor]) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((key, tensor.shape) for key, tensor in sorted(state.items()))


def _above(key: str) -> str:
    return key.rpartition(".")[0]


def _last_linear(head: Head) -> tuple[str, nn.Linear]:
    """Return the layer that has an output for each label, the last one if several do, and its path."""
    found = [
        (f"{path}.{name}".rstrip("."), layer)
        for path, module in head.modules.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == len(head.labels)
    ]
    if not found:
        raise ValueError(
            f"the head of `{head.name}` has no linear layer with {len(head.labels)} outputs, one for each label; "
            "expected one as its last layer. Keep one head: head=<name of an adapter>."
        )
    return found[-1]


def _copies(head: Head) -> dict[str, nn.Module]:
    return {path: copy.deepcopy(module) for path, module in head.modules.items()}


def _with_last(head: Head, place: str, layer: nn.Linear) -> dict[str, nn.Module]:
    """Return copies of a head's modules with another last layer."""
    copies = _copies(head)
    if place in copies:
        return {**copies, place: layer}
    path = next(path for path in copies if place.startswith(f"{path}."))
    copies[path].set_submodule(place.removeprefix(f"{path}."), layer)
    return copies
