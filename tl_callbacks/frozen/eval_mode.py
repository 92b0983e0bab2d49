"""Keeps what is frozen in eval mode: no dropout, no moving BatchNorm statistics.

The Trainer calls `model.train()` at every micro-step, so the mode is set again in a pre-hook of the root's forward.
"""

import weakref

from torch import nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.frozen.state import frozen_by_us
from tl_callbacks.parameters import parameters_by_name

_handles: "weakref.WeakKeyDictionary[nn.Module, RemovableHandle]" = weakref.WeakKeyDictionary()


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the largest modules that hold nothing that trains and something that this package froze.

    Example:
        >>> from tl_callbacks.frozen.state import set_frozen
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2))
        >>> set_frozen(model, frozenset({"0.0.weight", "0.0.bias"}))
        >>> frozen_modules(model) == [model[0]]
        True
    """
    ours = frozen_by_us(model)
    parameters = parameters_by_name(model)
    ids = {id(parameters[name]) for name in ours}
    found: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop()
        own = list(module.parameters())
        if not any(id(parameter) in ids for parameter in own):
            continue
        if any(parameter.requires_grad for parameter in own):
            pending.extend(module.children())
        else:
            found.append(module)
    return found


def keep_in_eval(model: nn.Module) -> None:
    """Make each training forward of `model` put its frozen modules in eval mode first. Replaces an earlier call's hook.

    Only what this package froze is touched: a PEFT base that was frozen from the start keeps the mode it is in.

    Args:
        model: the model without wrappers.
    """
    release(model)
    modules = frozen_modules(model)
    if not modules:
        return

    def set_eval(root: nn.Module, inputs: tuple[object, ...]) -> None:
        if root.training:
            for module in modules:
                module.eval()

    _handles[model] = model.register_forward_pre_hook(set_eval)


def release(model: nn.Module) -> None:
    """Remove the hook of `keep_in_eval` and give the whole model its root's mode again."""
    if handle := _handles.pop(model, None):
        handle.remove()
        for module in frozen_modules(model):
            module.train(model.training)
