"""Reads a model's layers, bottom to top, from its module tree: `group_layers`.

Apart from `groups` because it needs torch; what it returns does not.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroup, LayerGroups
from tl_callbacks.names import assign, normalise
from tl_callbacks.parameters import is_peft, parameters_by_name


def group_layers(model: nn.Module, *, patterns: Mapping[str, str] | None = None) -> LayerGroups:
    """Return the layers of a model as ordered groups of parameter names, bottom (input) to top (head).

    Works on the module tree alone: what repeats (transformer blocks, the layers of CNN stages) is one group an element;
    what stands below joins the group of the embeddings or the stem; what stands between the last block and the head
    (a final norm, a pooler) belongs to the top block; what the model adds to its `base_model_prefix` is the head.
    Encoder-decoder models are ordered as they run: embeddings, encoder, decoder, head. A plain module without repeated
    blocks has one group a child, in registration order, the last one being the head.

    In a model with PEFT adapters the groups hold the parameters that the adapters train, by the depth of the module
    that they adapt; the frozen base belongs to no group and is never opened.

    Args:
        model: any `nn.Module`, before or after it was wrapped.
        patterns: groups by hand, bottom to top: name to an anchored pattern of parameter names (see
            `tl_callbacks.names.matches`); each parameter must match exactly one. A last group called `head` is the
            head.

    Returns:
        The groups. Print them to see the table.

    Raises:
        ValueError: the model has no trainable parameters, or a pattern matches nothing or twice.

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
    if patterns is not None:
        assigned = assign(list(parameters), patterns)
        head = "head" if list(assigned)[-1] == "head" else None
        return LayerGroups(tuple(_group(name, found, parameters) for name, found in assigned.items()), head)

    named: dict[str, list[str]] = {}
    taken: set[str] = set()
    inner = _inner(model)
    paths = {id(parameter): path for path, parameter in inner.named_parameters()}  # wrapper parts and all
    for group_name, part in _parts(inner):
        found = [n for n, p in parameters.items() if n not in taken and _under(paths.get(id(p), " "), part)]
        named.setdefault(normalise(f"{group_name}.").removesuffix(".") or group_name, []).extend(found)
        taken.update(found)
    if missing := [name for name in parameters if name not in taken]:
        assert is_peft(model), f"parameters outside every group: {missing}"
        named = {"prompt": missing, **named}  # prompt and prefix encoders lie beside the model and feed its input
    present = {name: tuple(names) for name, names in named.items() if names}
    head = "head" if "head" in present else None
    groups = tuple(_group(name, names, parameters) for name, names in present.items())
    return LayerGroups(groups, head, _notes(model, head, parameters))


def _group(name: str, names: tuple[str, ...], parameters: Mapping[str, nn.Parameter]) -> LayerGroup:
    dtypes = sorted({str(parameters[n].dtype).removeprefix("torch.") for n in names})
    return LayerGroup(name, names, tuple(parameters[n].numel() for n in names), ", ".join(dtypes))


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


def _parts(model: nn.Module) -> list[tuple[str, str]]:
    """Return (group name, module or parameter path) pairs, bottom to top, that cover the whole model."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if isinstance(base, nn.Module) and base is not model:
        body = [(group.removeprefix(f"{prefix}."), path) for group, path in _body(base, prefix)]
        own = [name for name, _ in model.named_parameters(recurse=False)]
        return body + [("head", name) for name, _ in _children(model) if name != prefix] + [("head", n) for n in own]
    children = _children(model)
    body = list(_body(model, ""))
    is_bare_base = isinstance(model, PreTrainedModel) and "For" not in type(model).__name__
    if len(children) < 2 or is_bare_base or _contains_stack(children[-1][1]):
        return body
    # No prefix says what the head is: it is the last child, unless the blocks are in it; in a task model of
    # transformers all that follows the blocks, such as a new projection before the classifier.
    after = next((n for n, (_, child) in enumerate(reversed(children)) if _contains_stack(child)), 1)
    heads = [name for name, _ in children[-(after if isinstance(model, PreTrainedModel) else 1) :]]
    rest = [(group, path) for group, path in body if not any(_under(path, head) for head in heads)]
    return rest + [("head", head) for head in heads]


def _under(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def _body(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Yield (group name, path) of a module's parts: what is below the blocks, the blocks, and what follows them."""
    if not _contains_stack(module):
        children = [_join(path, name) for name, _ in _children(module)]
        yield from (("stem", _join(path, name)) for name, _ in module.named_parameters(recurse=False))
        yield from ((child, child) for child in children)
        return
    walked = list(_walk(module, path, path))
    first = next(number for number, (block, _, _) in enumerate(walked) if block)
    stem = "embeddings" if any(_embeds(module, part, path) for _, part, _ in walked[:first]) else "stem"
    below = None
    bottom: dict[str, str] = {}  # of each tower: where an embedding goes that is registered after its blocks
    for block, part, tower in walked:
        in_stem = below is None and first > 0
        bottom.setdefault(tower, _join(path, stem) if in_stem else block or _join(tower, "embeddings"))
        if block:
            below = block
        if below is None:
            yield _join(path, stem), part
        elif not block and _embeds(module, part, path):
            yield bottom[tower], part  # registered after the blocks, but works below them
        elif block or _under(below, tower):
            yield below, part  # a final norm or a pooler works on the last block's output: same depth, same group
        else:
            yield _join(tower, "embeddings"), part


def _walk(module: nn.Module, path: str, tower: str) -> Iterator[tuple[str, str, str]]:
    """Yield (block it belongs to or "", path, tower) in the order of registration; bare parameters first."""
    if _is_stack(module):
        for number, element in _children(module):
            yield from _blocks(element, _join(path, number), tower)
        return
    yield from (("", _join(path, name), tower) for name, _ in module.named_parameters(recurse=False))
    for name, child in _children(module):
        here = _join(path, name)
        if _is_stack(child):
            for number, element in _children(child):
                yield from _blocks(element, _join(here, number), tower)
        elif _contains_stack(child):
            yield from _walk(child, here, here)
        else:
            yield "", here, tower


def _blocks(element: nn.Module, path: str, tower: str) -> Iterator[tuple[str, str, str]]:
    """Yield the blocks of one element of a stack: itself, or those of a stage with its downsampling beside them."""
    inner = _stage(element)
    if inner is None:
        yield path, path, tower
        return
    blocks = [_join(_join(path, inner), number) for number, _ in _children(element.get_submodule(inner))]
    before = True
    yield from ((blocks[0], _join(path, name), tower) for name, _ in element.named_parameters(recurse=False))
    for name, _ in _children(element):
        if name == inner:
            yield from ((block, block, tower) for block in blocks)
            before = False
        else:
            yield blocks[0 if before else -1], _join(path, name), tower


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct children that have parameters."""
    return [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]


def _is_stack(module: nn.Module) -> bool:
    """Return whether a container repeats composite modules of one class: the blocks of a tower."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    elements = [child for _, child in _children(module)]
    composite = [child for child in elements if _children(child)]
    return len(composite) > 1 and len({type(child) for child in composite}) < len(composite)


def _contains_stack(module: nn.Module) -> bool:
    """Return whether the module is, or contains, a stack of blocks."""
    return any(_is_stack(child) for child in module.modules())


def _stage(element: nn.Module) -> str | None:
    """Return the path of the stack inside a stage of a CNN or a hierarchical transformer, None for a plain block."""
    total = sum(parameter.numel() for parameter in element.parameters())
    for name, child in element.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and child and _children(child):
            blocks = [block for _, block in _children(child)]
            share = sum(parameter.numel() for parameter in child.parameters()) / total
            if share > 0.5 and len({type(block) for block in blocks}) == 1 and all(map(_children, blocks)):
                return name
    return None


def _embeds(module: nn.Module, part: str, path: str) -> bool:
    """Return whether a part below the blocks is an embedding: by its name, by a lookup table, or a bare token."""
    relative = part.removeprefix(path).removeprefix(".")
    if "embed" in relative or relative in dict(module.named_parameters()):
        return True
    return any(isinstance(child, nn.Embedding) for child in module.get_submodule(relative).modules())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _notes(model: nn.Module, head: str | None, parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    notes = []
    inner = _inner(model)
    if head is None and isinstance(inner, PreTrainedModel):
        weight = getattr(cast(Any, inner).get_output_embeddings(), "weight", None)
        tied = [name for name, parameter in parameters.items() if parameter is weight]
        if tied:
            notes.append(f"the head is tied to `{tied[0]}` and has no parameters of its own")
    if is_peft(model):
        base = sum(p.numel() for n, p in parameters_by_name(model).items() if n not in parameters)
        notes.append(f"the base under the adapters, {base:,} parameters, stays frozen and is in no group")
    return tuple(notes)
