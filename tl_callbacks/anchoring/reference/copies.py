"""Copies of the weights that an anchor pulls toward: of the model's own, or of those a user gave."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tl_callbacks.names import closest, normalise
from tl_callbacks.parameters import parameters_by_name


@torch.no_grad()
def snapshot(
    model: nn.Module,
    names: Iterable[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Tensor]:
    """Return copies of parameters as they are now, by normalised name.

    Memory: as much as the parameters themselves in their dtype, half of that in bfloat16 of float32.

    Args:
        model: the model, before training.
        names: normalised names.
        dtype: of the copies; None: the parameters'.
        device: of the copies; None: the parameters'.

    Example:
        >>> list(snapshot(nn.Linear(2, 2), ["bias"]))
        ['bias']
    """
    parameters = parameters_by_name(model)
    return {name: _copied(parameters[name], dtype, device) for name in names}


def given(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a reference the user gave, such as a `state_dict()`, on the parameters' devices and in their dtypes.

    Args:
        model: the model that is trained.
        names: normalised names of the parameters that are anchored.
        tensors: parameter name to tensor; further entries are ignored.

    Raises:
        ValueError: a parameter is missing, or has another shape.

    Example:
        >>> given(nn.Linear(1, 1), ["bias"], {"bias": torch.ones(1)})
        {'bias': tensor([1.])}
    """
    parameters = parameters_by_name(model)
    tensors = {normalise(name): tensor for name, tensor in tensors.items()}
    result = {}
    for name in names:
        if name not in tensors:
            raise ValueError(
                f"the reference lacks `{name}` (closest: {closest(name, tensors)}). Give the pretrained model's "
                "state_dict(), or name the group in `exclude`."
            )
        if tensors[name].shape != parameters[name].shape:
            raise ValueError(
                f"the reference of `{name}` has shape {tuple(tensors[name].shape)}; expected "
                f"{tuple(parameters[name].shape)}. Give weights of the same architecture, or name the group in "
                "`exclude`."
            )
        result[name] = tensors[name].detach().to(parameters[name]).clone()
    return result


def moved(tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """Return a tensor in a dtype and on a device, itself where both are None or its own; a meta tensor stays one.

    Example:
        >>> moved(torch.ones(1), torch.bfloat16, None)
        tensor([1.], dtype=torch.bfloat16)
    """
    return tensor.to(tensor.device if tensor.is_meta else device, dtype or tensor.dtype)


def _copied(tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """Return a copy; of a meta tensor one without values on the meta device."""
    return tensor.detach().to(tensor.device if tensor.is_meta else device, dtype or tensor.dtype, copy=True)
