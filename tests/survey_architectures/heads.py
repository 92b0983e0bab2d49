"""Where the parameters that a task class adds to its base model stand."""

from torch import nn

from tests.survey_architectures.judge import Record, block_names, grouped
from tl_callbacks.parameters import parameters_by_name


def judged(model: nn.Module) -> Record:
    """Return whether a task model is covered, and which of its own parameters stand below its last block."""
    groups, _, _ = grouped(model)
    parameters = parameters_by_name(model)
    level = {name: number for number, names in enumerate(groups.levels) for group in names for name in group.parameters}
    blocks = block_names(groups)
    last = max((n for n, names in enumerate(groups.levels) if any(g.name in blocks for g in names)), default=0)
    own = own_parameters(model)
    return {
        "class": type(model).__name__,
        "covers": sorted(groups.parameters) == sorted(parameters),
        "blocks": len(blocks),
        "own": len(own),
        "tied": any("the head is tied" in note for note in groups.notes),
        "below": [name for name in own if level.get(name, last) < last],
    }


def own_parameters(model: nn.Module) -> list[str]:
    """Return the parameters that a task model adds, tied ones left out.

    That is what lies outside the module that `base_model_prefix` names and outside other pretrained models. Where the
    class has none, what follows the last part that is a pretrained model, or that holds a list of blocks.
    """
    if type(model).__name__.endswith("Backbone"):
        return []
    children = list(model.named_children())
    prefix = getattr(model, "base_model_prefix", "")
    if prefix in dict(children):
        own = [name for name, child in children if name != prefix and not hasattr(child, "base_model_prefix")]
    else:
        bodies = [number for number, (_, child) in enumerate(children) if _is_body(child)]
        own = [name for name, _ in children[max(bodies, default=len(children)) + 1 :]]
    uses: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(name.partition(".")[0])
    return [name for name, parameter in parameters_by_name(model).items() if uses[id(parameter)] <= set(own)]


def _is_body(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix") or any(
        isinstance(part, nn.ModuleList) and len(part) > 1 for part in module.modules()
    )
