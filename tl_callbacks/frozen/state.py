"""Which parameters are frozen: the only place that writes `requires_grad`, and the memory of what it wrote."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tl_callbacks.parameters import parameters_by_name

# The parameters of a model that this package has set to requires_grad=False. A model that a stopped run left frozen
# can so be told from one that was frozen by hand.
_frozen_by_us: "weakref.WeakKeyDictionary[nn.Module, frozenset[str]]" = weakref.WeakKeyDictionary()


def frozen_by_us(model: nn.Module) -> frozenset[str]:
    """Return the normalised names of the parameters that this package has frozen in `model` and not opened again."""
    return _frozen_by_us.get(model, frozenset())


def set_frozen(model: nn.Module, names: frozenset[str]) -> None:
    """Set `requires_grad` so that, of what may train, exactly the parameters `names` are frozen. Idempotent.

    The only place of the package that writes `requires_grad`. Never makes a parameter trainable that was not before
    this package froze it.

    Args:
        model: the model without wrappers.
        names: normalised names of the parameters to freeze.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> set_frozen(model, frozenset({"bias"}))
        >>> model.weight.requires_grad, model.bias.requires_grad
        (True, False)
        >>> set_frozen(model, frozenset())
        >>> model.bias.requires_grad
        True
    """
    before = frozen_by_us(model)
    parameters = parameters_by_name(model)
    after = frozenset(name for name in names if name in before or parameters[name].requires_grad)
    for name in before - after:
        parameters[name].requires_grad_(True)
    for name in after - before:
        parameters[name].requires_grad_(False)
    if after:
        _frozen_by_us[model] = after
    else:
        _frozen_by_us.pop(model, None)


@contextmanager
def requires_grad_kept(model: nn.Module) -> Iterator[None]:
    """Leave each parameter trainable or frozen as it was, whatever another package writes inside.

    Args:
        model: the model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with requires_grad_kept(model):
        ...     _ = model.requires_grad_(False)
        >>> model.bias.requires_grad
        True
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def openable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that may train, by normalised name: trainable now, or frozen by this package.

    What a model freezes itself and the base under a PEFT adapter are not among them.
    """
    ours = frozen_by_us(model)
    return {n: p for n, p in parameters_by_name(model).items() if p.requires_grad or n in ours}
