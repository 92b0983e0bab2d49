"""A model's parameters by normalised name."""

from torch import nn

from tl_callbacks.names import normalise


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by normalised name, tied ones once, in registration order.

    Raises:
        ValueError: two parameters have the same normalised name.

    Example:
        >>> list(parameters_by_name(nn.Sequential(nn.Linear(2, 2))))
        ['0.weight', '0.bias']
    """
    result: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if normalise(name) in result:
            raise ValueError(
                f"two parameters are called `{normalise(name)}` once wrapper parts are removed (one is `{name}`); "
                "expected unique names. Rename one of the modules."
            )
        result[normalise(name)] = parameter
    return result


def is_peft(model: nn.Module) -> bool:
    """Return whether adapters of the `peft` package are on the model."""
    return bool(getattr(model, "peft_config", None))
