"""Where a model is read: for each layer group the module whose output, or input, is what the group has made of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.groups import LayerGroup, LayerGroups
from tl_callbacks.names import normalise

Stream = Literal["main", "decoder", "vision", "audio"]

_VISION = ("vision", "visual", "image", "pixel")
_AUDIO = ("audio", "speech")


@dataclass(frozen=True)
class ReadPoint:
    """One place in a model: the output of a module, or what it is given.

    Args:
        module: the module that is called in a forward.
        takes_input: whether its input is read rather than its output.
        first: whether the first call of a forward counts rather than the last one, where a module is called often.
        stream: what flows there: the decoder's sequence, an image tower's, an audio tower's, or the main one.

    Example:
        >>> ReadPoint(nn.Identity(), takes_input=False, first=False, stream="main").stream
        'main'
    """

    module: nn.Module
    takes_input: bool
    first: bool
    stream: Stream


def read_points(model: nn.Module, groups: LayerGroups) -> dict[str, ReadPoint]:
    """Return where each group is read, by group name, bottom to top; without those that no module stands for.

    A block is read at its output. Embeddings that are several modules (GPT-2's words and positions) are read where
    they have been put together: at the input of the block above. The head is read at its input, that of the first of
    `head_modules`, which is what the layers below hand to it: its own output are the logits, which the metrics judge. A
    group made by hand is read at the output of the last module that is its own.

    Args:
        model: the model, wrapped (DDP, FSDP2, `torch.compile`, PEFT) or not.
        groups: its groups.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from tl_callbacks import group_layers
        >>> model = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))
        >>> points = read_points(model, group_layers(model))
        >>> {name: (type(point.module).__name__, point.takes_input) for name, point in points.items()}
        {'embeddings': ('GPT2Block', True), 'h.0': ('GPT2Block', False), 'h.1': ('GPT2Block', False)}
    """
    paths, own = _modules(model, groups)
    found: dict[str, ReadPoint] = {}
    for place, group in enumerate(groups):
        path = None if group.name == groups.head else _by_name(group, paths)
        if path is None and group.name == groups.head and own.get(group.name):
            path = _siblings(own[group.name])[0]
            found[group.name] = _point(path, paths, takes_input=True, first=False)
            continue
        if path is None and (above := _above(place, groups, paths)) is not None and _is_stem(place, groups):
            found[group.name] = _point(above, paths, takes_input=True, first=True)
            continue
        path = path or (own[group.name][-1] if own.get(group.name) else None)
        if path is not None:
            found[group.name] = _point(path, paths, takes_input=False, first=False)
    return found


def head_modules(model: nn.Module, groups: LayerGroups) -> dict[str, nn.Module]:
    """Return the modules that the head consists of by path, in the order of registration.

    Most heads are one module; DistilBERT's are two, the first of which is given what the layers below hand on. Of a
    block that was merged with the head it is the head alone, which stands elsewhere in the model.

    Args:
        model: the model, wrapped or not.
        groups: its groups.

    Example:
        >>> from tl_callbacks import group_layers
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> head_modules(model, group_layers(model))
        {'1': Linear(in_features=3, out_features=4, bias=True)}
    """
    paths, own = _modules(model, groups)
    return {path: paths[path] for path in _siblings(own.get(groups.head or "", []))}


def watch(point: ReadPoint, take: Callable[[Any], None]) -> RemovableHandle:
    """Call `take` with what a read point sees, each time that its module is called.

    Example:
        >>> module, seen = nn.Identity(), []
        >>> handle = watch(ReadPoint(module, takes_input=False, first=False, stream="main"), seen.append)
        >>> module(3) and seen
        [3]
    """
    if not point.takes_input:
        return point.module.register_forward_hook(lambda module, args, output: take(output))

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args if args else kwargs)

    return point.module.register_forward_pre_hook(given, with_kwargs=True)


def _modules(model: nn.Module, groups: LayerGroups) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Return all modules that are called by path, and the paths of those that are a group's own by group."""
    paths = {_clean(path): module for path, module in model.named_modules() if _callable(module)}
    return paths, _own_modules(paths, {name: group.name for group in groups for name in group.parameters})


def _point(path: str, paths: Mapping[str, nn.Module], *, takes_input: bool, first: bool) -> ReadPoint:
    return ReadPoint(paths[path], takes_input, first, _stream(path))


def _stream(path: str) -> Stream:
    parts = path.split(".")
    if any(word in part for part in parts for word in _VISION):
        return "vision"
    if any(word in part for part in parts for word in _AUDIO):
        return "audio"
    return "decoder" if any(part == "decoder" for part in parts) else "main"


def _clean(path: str) -> str:
    return normalise(f"{path}.").removesuffix(".")


def _callable(module: nn.Module) -> bool:
    """Return whether a module computes something: a list of modules is never called."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def _by_name(group: LayerGroup, paths: Mapping[str, nn.Module]) -> str | None:
    """Return the path that a discovered group is called by, with the base model's prefix or without."""
    ends = [path for path in paths if path == group.name or path.endswith(f".{group.name}")]
    holds = [path for path in ends if any(name.startswith(f"{path}.") for name in group.parameters)]
    return min(holds, key=len, default=None)


def _own_modules(paths: Mapping[str, nn.Module], owner: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the largest modules of which all parameters belong to one group, by group, in registration order."""
    owners: dict[str, set[str]] = {}
    for name, group in owner.items():
        path = name
        while path:
            path = path.rpartition(".")[0]
            owners.setdefault(path, set()).add(group)
    own: dict[str, list[str]] = {}
    for path in paths:  # a module comes before what is below it
        if path and len(held := owners.get(path, set())) == 1:
            known = own.setdefault(next(iter(held)), [])
            if not any(path.startswith(f"{above}.") for above in known):
                known.append(path)
    return own


def _siblings(own: list[str]) -> list[str]:
    """Return the last of a group's own modules and those beside it, which are the head where blocks were merged in."""
    return [path for path in own if path.rpartition(".")[0] == own[-1].rpartition(".")[0]]


def _is_stem(place: int, groups: LayerGroups) -> bool:
    """Return whether nothing of the same tower stands below."""
    return not any(group.tower == groups[place].tower for group in groups[:place])


def _above(place: int, groups: LayerGroups, paths: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the block above a group in its tower, if it is called by its path."""
    for group in groups[place + 1 :]:
        if group.tower == groups[place].tower and group.name != groups.head:
            return _by_name(group, paths)
    return None
