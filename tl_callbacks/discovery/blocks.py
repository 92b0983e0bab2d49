"""Finds what repeats in a module tree: the blocks of a tower, in the order of registration."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from tl_callbacks.parameters import true_size

# Lists that repeat modules side by side rather than on top of each other: they are left whole.
_SIDE_BY_SIDE = re.compile(
    r"expert|(^|_)heads?$|classifier|predict|embed|position|codebook|quantiz|(^|_)fpn|pan_|lateral|downsample_convs|"
    r"neck|router|adapter|prompt|mask_downs|hypernetwork|unembed|altup|(^|_)proj|merger"
)
# Names that say "depth", so that even one block is a stack.
_DEPTH = re.compile(r"(^|_)(layers?|blocks?|h|stages?|groups)$")
# Parts of a stage that feed its first block though they are registered after its blocks.
_FEEDS = re.compile(r"group_projector")
_NUMBERED = re.compile(r"^(.*?)_?(\d+)$")


@dataclass
class Block:
    """A block of a tower: its name, and the paths of the modules and parameters that belong to it."""

    name: str
    paths: list[str] = field(default_factory=list)


def join(path: str, name: str) -> str:
    """Return a dotted path."""
    return f"{path}.{name}" if path else name


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct children that hold parameters, none for a layer that an adapter wraps."""
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        return []
    return [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]


def size(module: nn.Module) -> int:
    """Return how many scalars the parameters of a module hold."""
    return sum(true_size(parameter) for parameter in module.parameters())


def own_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a module holds itself."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def is_list(module: nn.Module) -> bool:
    """Return whether a module is a container whose children run, or stand, in the order of registration."""
    return isinstance(module, nn.ModuleList | nn.Sequential)


def is_stack(module: nn.Module, name: str) -> bool:
    """Return whether a container called `name` repeats composite modules: the blocks of a tower."""
    if not is_list(module) or _SIDE_BY_SIDE.search(name):
        return False
    composite = [child for _, child in children(module) if children(child)]
    if len(composite) == 1:
        return isinstance(module, nn.ModuleList) and _DEPTH.search(name) is not None
    return len(composite) > 1 and (len({type(c) for c in composite}) < len(composite) or bool(_DEPTH.search(name)))


def contains_stack(module: nn.Module, name: str) -> bool:
    """Return whether a module called `name` is, or holds, a stack of blocks."""
    if isinstance(module, nn.RNNBase):
        return module.num_layers > 1
    if is_list(module) and _SIDE_BY_SIDE.search(name):
        return False
    if is_stack(module, name) or any(blocks for _, blocks in parts(module)):
        return True
    return any(contains_stack(child, child_name) for child_name, child in children(module))


def stack_blocks(module: nn.Module, path: str) -> list[Block]:
    """Return the blocks of a stack, those of its stages one by one."""
    return [
        *_elements(path, own_parameters(module)),
        *(block for name, element in children(module) for block in element_blocks(element, join(path, name))),
    ]


def element_blocks(element: nn.Module, path: str) -> list[Block]:
    """Return one element of a stack as blocks: itself, or a stage's blocks with what stands beside them."""
    inner = _inner_stack(element)
    if inner is None:
        return [Block(path, [path])]
    container = element.get_submodule(inner)
    blocks = _elements(join(path, inner) if inner else path, [name for name, _ in children(container)])
    if not inner:
        return blocks
    names = [name for name, _ in children(element)]
    place = names.index(inner)
    first = [name for number, name in enumerate(names) if number < place or _FEEDS.search(name)]
    blocks[0].paths[:0] = [join(path, name) for name in (*own_parameters(element), *first)]
    blocks[-1].paths += [join(path, name) for name in names[place + 1 :] if name not in first]
    return blocks


def _elements(path: str, names: Iterable[str]) -> list[Block]:
    return [Block(join(path, name), [join(path, name)]) for name in names]


def _inner_stack(element: nn.Module) -> str | None:
    """Return the child of a stage that holds its blocks ("" if it is the stage itself), None for a plain block."""
    if is_list(element):
        return "" if _repeats(element) else None
    total = size(element)
    for name, child in children(element):
        if size(child) > 0.5 * total and is_list(child) and not _SIDE_BY_SIDE.search(name) and _repeats(child):
            return name
    return None


def _repeats(container: nn.Module) -> bool:
    """Return whether all elements of a container are composite modules of one class."""
    elements = [child for _, child in children(container)]
    return bool(elements) and len({type(child) for child in elements}) == 1 and all(map(children, elements))


def _is_pipeline(module: nn.Module) -> bool:
    """Return whether a sequence has one part with blocks among parts without: sentence-transformers' models."""
    deep = [contains_stack(child, name) for name, child in children(module)]
    return isinstance(module, nn.Sequential) and sum(deep) == 1 and len(deep) > 1


def parts(module: nn.Module, *, is_root: bool = False) -> Iterator[tuple[str, list[Block]]]:
    """Yield a module's children in the order of registration: name, and the blocks if it is a stack.

    Lists of one length that hold one part of each block (attentions, norms, feed-forwards) are zipped; numbered
    siblings (`layer1`, `layer2`) are a stack too. Such stacks stand where the first of them is registered.
    """
    in_line = is_root and _is_pipeline(module)
    if not in_line and is_stack(module, "layers"):
        yield "", stack_blocks(module, "")
        return
    arrays = [] if in_line else _arrays(module)
    numbered = [] if in_line else _numbered_siblings(module)
    for name, child in children(module):
        if name in arrays:
            if name == arrays[0]:
                yield name, _zip(module, arrays)
        elif name in numbered:
            if name == numbered[0]:
                yield name, [b for sibling in numbered for b in element_blocks(module.get_submodule(sibling), sibling)]
        elif is_stack(child, name):
            yield name, stack_blocks(child, name)
        elif isinstance(child, nn.RNNBase) and child.num_layers > 1:
            yield name, _recurrent_layers(child, name)
        else:
            yield name, []


def _arrays(module: nn.Module) -> list[str]:
    """Return the names of lists that hold one part each of the same blocks."""
    lists = {n: [c for _, c in children(child)] for n, child in children(module) if isinstance(child, nn.ModuleList)}
    lengths = [len(elements) for elements in lists.values()]
    length = max(lengths, key=lengths.count, default=0)
    names = [name for name, elements in lists.items() if len(elements) == length]
    if length < 2 or len(names) < 2 or not any(is_stack(module.get_submodule(name), name) for name in names):
        return []
    parts = [all(not children(element) for element in lists[name]) for name in names]
    stages = [all(is_list(element) for element in lists[name]) for name in names]
    return names if any(parts) or any(stages) else []


def _zip(module: nn.Module, names: list[str]) -> list[Block]:
    """Return the blocks of a structure of arrays; a stage's other parts join its first or its last block."""
    main = next(
        (n for n in names if all(is_list(child) for _, child in children(module.get_submodule(n)))),
        next(n for n in names if is_stack(module.get_submodule(n), n)),
    )
    result: list[Block] = []
    for number, element in children(module.get_submodule(main)):
        blocks = element_blocks(element, join(main, number))
        for name in names:
            if name != main:
                place = blocks[0] if names.index(name) < names.index(main) else blocks[-1]
                place.paths.append(join(name, number))
        result += blocks
    return result


def _numbered_siblings(module: nn.Module) -> list[str]:
    """Return the names of direct children like `layer1`, `layer2`, composite and of one class; empty if none."""
    found: dict[tuple[str, type], list[str]] = {}
    for name, child in children(module):
        match = _NUMBERED.match(name)
        if match and match[1] and children(child) and not _SIDE_BY_SIDE.search(match[1]):
            found.setdefault((match[1], type(child)), []).append(name)
    longest = max(found.values(), key=len, default=[])
    return longest if len(longest) > 1 else []


def _recurrent_layers(module: nn.RNNBase, path: str) -> list[Block]:
    """Return one block a layer of a recurrent network, whose layers are parameters rather than modules."""
    layers: dict[str, Block] = {}
    for name in own_parameters(module):
        number = name.removesuffix("_reverse").rsplit("_l", 1)[-1]
        layers.setdefault(number, Block(join(path, number))).paths.append(join(path, name))
    return list(layers.values())
