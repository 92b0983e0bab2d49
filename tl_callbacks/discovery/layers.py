"""`group_layers`: the layers of any model as groups of parameter names, bottom (input) to top (head)."""

import itertools
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tl_callbacks.discovery.order import in_order_of_use
from tl_callbacks.discovery.rules import is_below
from tl_callbacks.discovery.towers import Group, Reader
from tl_callbacks.frozen.by_hand import never_trained
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroup, LayerGroups
from tl_callbacks.names import assign, closest, normalise
from tl_callbacks.parameters import is_peft, parameters_by_name, true_size
from tl_callbacks.timm_layers import timm_parts


def group_layers(
    model: nn.Module,
    *,
    patterns: Mapping[str, str] | None = None,
    towers: Sequence[str] = (),
    example: Mapping[str, Any] | None = None,
) -> LayerGroups:
    """Return the layers of a model as ordered groups of parameter names, bottom (input) to top (head).

    Works on the module tree alone: what repeats (transformer blocks, the layers of CNN stages, layers of an RNN) is one
    group an element; what stands below joins the group of the embeddings or the stem; what stands between the last
    block and the head (a final norm, a pooler) belongs to the top block; what the model adds to its
    `base_model_prefix` is the head. timm models are read by their own `group_matcher`. A plain module without repeated
    blocks has one group a child, in registration order; the last one, or the one called like a head, is the head.

    Towers that run one after the other (encoder, decoder) stand one on the other. Towers that read different inputs
    (CLIP's and LLaVA's vision and text) stand side by side, aligned by depth from the output: rates and schedules
    count such levels, so the towers are treated alike. Their names address them: `keep_frozen=["vision_tower"]`,
    `factors={"vision_tower": 0.1}`.

    Tied weights are in the group where they are used first from the bottom. In a model with PEFT adapters the groups
    hold the parameters that the adapters train, by the depth of the module that they adapt; the frozen base belongs to
    no group and is never opened.

    `attach` checks the order against the first training forward and warns if it was another.

    Args:
        model: any `nn.Module`, before or after it was wrapped.
        patterns: groups by hand, bottom to top: name to an anchored pattern of parameter names (see
            `tl_callbacks.names.matches`); each parameter must match exactly one. A last group called `head` is the
            head.
        towers: names of parallel towers that are to stand one on the other, in this order, bottom to top.
        example: a batch of model inputs, on the model's device. One forward without gradient then shows in which order
            the groups are used, and they are put in that order.

    Returns:
        The groups. Print them to see the table.

    Raises:
        ValueError: the model has no trainable parameters, a pattern matches nothing or twice, a tower is unknown, or
            both `patterns` and `towers` are given.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> groups = group_layers(BertForSequenceClassification(config))
        >>> groups.names
        ('embeddings', 'encoder.layer.0', 'encoder.layer.1', 'head')
    """
    parameters = openable(model) if is_peft(model) else parameters_by_name(model)
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameters; expected at least one. If it was frozen by hand, "
            "remove that: GradualUnfreezing decides what trains."
        )
    if isinstance(towers, str):
        raise TypeError(f"expected a sequence of tower names, got the text `{towers}`. Write (`{towers}`,).")
    if patterns is not None:
        if towers:
            raise ValueError(
                f"`towers` is {tuple(towers)}, but `patterns` gives the groups and their order; expected one of "
                "the two. Leave `towers` out."
            )
        assigned = assign(list(parameters), patterns)
        head = "head" if list(assigned)[-1] == "head" else None
        groups = LayerGroups(tuple(_group(name, found, parameters) for name, found in assigned.items()), head)
    else:
        groups = _discovered(model, parameters, towers)
    return groups if example is None else in_order_of_use(model, groups, example)


def _discovered(model: nn.Module, parameters: Mapping[str, nn.Parameter], towers: Sequence[str]) -> LayerGroups:
    inner = _inner(model)
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."
    reader = Reader(timm_parts, [f"{prefix}{tower}" for tower in towers] + list(towers))
    layout = reader.read(inner)
    parallel = [tower.removeprefix(prefix) for tower in reader.parallel]
    if unknown := [tower for tower in towers if tower not in parallel]:
        raise ValueError(
            f"tower `{unknown[0]}` is none of the parallel towers of {type(model).__name__}: "
            f"{closest(unknown[0], parallel) if parallel else 'it has none'}. Print group_layers(model) to see them."
        )
    slots = [slot for level in layout.levels for slot in level]
    level_of = [number for number, level in enumerate(layout.levels) for _ in level]
    if layout.head:
        slots, level_of = [*slots, Group("head", "", layout.head)], [*level_of, len(layout.levels)]
    held, ties = _fill(inner, slots, parameters)
    _close_up(slots, held, never_trained(inner))
    several = len({slot.tower for slot in slots if slot.tower}) > 1
    titles = [
        _clean(slot.name or _stem(inner, slot, slot.tower if number or parallel else ""), prefix)
        for number, slot in enumerate(slots)
    ]
    groups: list[LayerGroup] = []
    placed = set(itertools.chain(*held))
    if missing := tuple(name for name in parameters if name not in placed):
        assert is_peft(model), f"parameters outside every group: {missing}"
        groups.append(_group("prompt", missing, parameters))  # prompt encoders lie beside the model and feed its input
    below = None
    for number, names in enumerate(held):
        if names:
            group = _group(titles[number], tuple(names), parameters)
            tower = _clean(slots[number].tower, prefix) if several else ""
            groups.append(replace(group, tower=tower, beside=level_of[number] == below))
            below = level_of[number]
    head = "head" if layout.head and held[-1] else None
    notes = _notes(model, head, slots, parameters)
    notes += [
        f"`{titles[first]}` holds weights tied to {_some([titles[n] for n in users])}" for first, users in ties.items()
    ]
    return LayerGroups(tuple(groups), head, tuple(notes))


def _fill(
    inner: nn.Module, slots: list[Group], parameters: Mapping[str, nn.Parameter]
) -> tuple[list[list[str]], dict[int, list[int]]]:
    """Return each slot's parameter names, tied weights in the lowest one, and which slots use another one's weights."""
    slot_of = {path: number for number, slot in enumerate(slots) for path in slot.paths}
    uses: dict[int, set[int]] = {}
    for path, parameter in inner.named_parameters(remove_duplicate=False):
        while path and path not in slot_of:
            path = path.rpartition(".")[0]
        if path in slot_of:
            uses.setdefault(id(parameter), set()).add(slot_of[path])
    held: list[list[str]] = [[] for _ in slots]
    ties: dict[int, set[int]] = {}
    for name, parameter in parameters.items():
        if places := sorted(uses.get(id(parameter), ())):
            held[places[0]].append(name)
            if len(places) > 1:
                ties.setdefault(places[0], set()).update(places[1:])
    return held, {first: sorted(users) for first, users in ties.items()}


def _close_up(slots: list[Group], held: list[list[str]], never: Collection[str]) -> None:
    """Move groups that a model never trains, such as sinusoidal positions, into those above; they open nothing."""
    if all(name in never for names in held for name in names):
        return
    for number, names in enumerate(held[:-1]):
        if names and all(name in never for name in names):
            above = [other for other in range(number + 1, len(slots)) if held[other]]
            same = [other for other in above if slots[other].tower == slots[number].tower]
            if above:
                held[(same or above)[0]][:0] = names
                held[number] = []


def _stem(inner: nn.Module, slot: Group, tower: str) -> str:
    """Return the name of a stem: whether it embeds, and of which tower it is."""
    parts = [path.rpartition(".") for path in slot.paths]
    word = "embeddings" if any(is_below(inner.get_submodule(owner), name) for owner, _, name in parts) else "stem"
    return f"{tower}.{word}" if tower else word


def _clean(name: str, prefix: str) -> str:
    """Return a module path without the base model's prefix and what wrappers add."""
    name = name.removeprefix(prefix)
    return normalise(f"{name}.").removesuffix(".") or name


def _group(name: str, names: tuple[str, ...], parameters: Mapping[str, nn.Parameter]) -> LayerGroup:
    dtypes = sorted({str(parameters[n].dtype).removeprefix("torch.") for n in names})
    return LayerGroup(name, names, tuple(true_size(parameters[n]) for n in names), ", ".join(dtypes))


def _inner(model: nn.Module) -> nn.Module:
    """Return the model under DDP, `torch.compile` and PEFT: the one whose module paths are the normalised names."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = cast(nn.Module, model.module)
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


def _notes(model: nn.Module, head: str | None, slots: list[Group], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    notes = []
    inner = _inner(model)
    if head is None and isinstance(inner, PreTrainedModel):
        weight = getattr(cast(Any, inner).get_output_embeddings(), "weight", None)
        tied = [name for name, parameter in parameters.items() if parameter is weight]
        if tied:
            notes.append(f"the head is tied to `{tied[0]}` and has no parameters of its own")
    if is_peft(model):
        base = sum(true_size(p) for n, p in parameters_by_name(model).items() if n not in parameters)
        notes.append(f"the base under the adapters, {base:,} parameters, stays frozen and is in no group")
    blocks = [slot for slot in slots if slot.name not in ("", "head")]
    layers = getattr(getattr(inner, "config", None), "num_hidden_layers", None)
    if len(blocks) == 1 and isinstance(layers, int) and layers > 1:
        notes.append(f"all {layers} layers share the weights of one block: no order by depth exists in it")
        warnings.warn(
            f"{type(inner).__name__}: {notes[-1]}, so layer-wise rates and gradual unfreezing see no layers in it. Use "
            "the strategies `full`, `probe` or `lp_ft`, or divide it by LayerGroups.split.",
            UserWarning,
            stacklevel=4,
        )
    return notes


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
