"""The reference: the pretrained weights that an anchor pulls toward."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_callbacks.names import closest, normalise
from tl_callbacks.parameters import parameters_by_name


@torch.no_grad()
def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of parameters as they are now, by normalised name, on their device and in their dtype.

    Memory: as much as the parameters themselves.

    Args:
        model: the model, before training.
        names: normalised names.

    Example:
        >>> list(snapshot(nn.Linear(2, 2), ["bias"]))
        ['bias']
    """
    parameters = parameters_by_name(model)
    return {name: parameters[name].detach().clone() for name in names}


def given(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a reference the user gave, such as a `state_dict()`, on the parameters' devices and in their dtypes.

    Args:
        model: the model that is trained.
        names: normalised names of the parameters that are anchored.
        tensors: parameter name to tensor; further entries are ignored.

    Raises:
        ValueError: a parameter is missing, or has another shape.
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


@torch.no_grad()
def broadcast_(reference: Mapping[str, Tensor]) -> None:
    """Give every rank the reference of rank 0, in place, as DDP gives every rank the weights of rank 0.

    Ranks that initialise new weights under different seeds would otherwise be pulled apart. What is sharded came from
    rank 0 when it was sharded.

    Args:
        reference: parameter name to tensor, the same names in the same order on all ranks.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in reference.values():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor, src=0)
