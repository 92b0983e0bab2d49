"""A model's parameters by normalised name, and their true sizes."""

import math

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


def true_size(parameter: nn.Parameter) -> int:
    """Return how many scalars a parameter stands for, which is more than it stores where it is packed or a shard.

    bitsandbytes packs two 4-bit numbers to a byte and views the bytes as a column of any dtype; the weight's shape is
    in its `quant_state`. Counted as `PeftModel.get_nb_trainable_parameters` and `PreTrainedModel.num_parameters` do,
    except that the padding of an odd number of scalars is left out, and that a 4-bit weight which is not packed yet has
    its own size. What DeepSpeed ZeRO-3 has emptied has the size it had. 8-bit weights and tensor subclasses with the
    shape of the weight, such as torchao's, are as large as they say.

    Args:
        parameter: a parameter, quantised or not.

    Example:
        >>> import torch
        >>> true_size(nn.Parameter(torch.zeros(2, 3)))
        6
    """
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    if shape is not None:
        return math.prod(shape)
    if hasattr(parameter, "quant_storage") and getattr(parameter, "bnb_quantized", False):
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel() or int(getattr(parameter, "ds_numel", 0))


def dimensions(parameter: nn.Parameter) -> int:
    """Return how many dimensions a parameter has, or had before DeepSpeed ZeRO-3 emptied it.

    Example:
        >>> import torch
        >>> dimensions(nn.Parameter(torch.zeros(2, 3)))
        2
    """
    return len(getattr(parameter, "ds_shape", parameter.shape))
