"""The reference beside the tuned model: one module for both, which for one forward holds the reference's weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tl_callbacks.names import normalise
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.reading.quiet import evaluating, random_states_kept


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that training may move, such as BatchNorm's statistics, by name.

    Example:
        >>> list(floating_buffers(nn.BatchNorm1d(2)))
        ['running_mean', 'running_var']
    """
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def saved(model: nn.Module, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those buffers that a checkpoint holds; the others are made by the architecture, not by training.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> norm.register_buffer("scale", torch.ones(1), persistent=False)
        >>> list(saved(norm, floating_buffers(norm)))
        ['running_mean', 'running_var']
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in buffers.items() if name in kept}


def buffers_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the floating buffers that belong to some of a model's parameters, by name.

    A buffer belongs to the parameters of its module, or, where that has none, of the nearest module above that has.

    Args:
        model: the model.
        names: normalised names of the parameters.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
        >>> list(buffers_of(model, ["0.weight", "0.bias"]))
        ['0.running_mean', '0.running_var']
    """
    parameters = parameters_by_name(model)
    chosen = {id(parameters[name]) for name in names}
    return {name: one for name, one in floating_buffers(model).items() if chosen & _nearest(model, name)}


def as_given(buffers: Mapping[str, Tensor], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return copies of buffers as a reference that was given has them; as they are where it has none of the name.

    Args:
        buffers: of the model, by name.
        given: such as a `state_dict()`; None: no reference was given.

    Raises:
        ValueError: one has another shape.

    Example:
        >>> as_given({"mean": torch.zeros(1)}, {"mean": torch.ones(1)})
        {'mean': tensor([1.])}
    """
    theirs = {normalise(name): tensor for name, tensor in (given or {}).items()}
    result = {}
    for name, own in buffers.items():
        found = theirs.get(normalise(name), own)
        if found.shape != own.shape:
            raise ValueError(
                f"the reference of `{name}` has shape {tuple(found.shape)}; expected {tuple(own.shape)}. Give weights "
                "of the same architecture."
            )
        result[name] = found.detach().to(own, copy=True)
    return result


@contextmanager
def as_reference(
    model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Let a model compute what it computed with other weights: in eval mode, without gradient.

    The parameters stay the same objects and hold the other tensors meanwhile, so that whatever refers to them follows
    (tied weights, an LSTM's flat list) and a graph that was recorded before keeps its own. After it weights, modes and
    random states are what they were, by an exception too. Memory: nothing beside the weights given.

    Args:
        model: the model without wrappers; its parameters must not be sharded.
        weights: normalised parameter name to tensor; the other parameters stay.
        buffers: the same for buffers, by their names.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with as_reference(model, {"weight": torch.tensor([[3.0]])}):
        ...     model(torch.ones(1, 1))
        tensor([[3.]])
    """
    parameters, own = parameters_by_name(model), floating_buffers(model)
    pairs: list[tuple[Tensor, Tensor]] = [(parameters[name], tensor) for name, tensor in weights.items()]
    pairs += [(own[name], tensor) for name, tensor in (buffers or {}).items() if name in own]
    device = next(iter(parameters.values())).device
    held = [tensor.data for tensor, _ in pairs]
    with evaluating(model), random_states_kept(device, 0), torch.no_grad():
        try:
            torch.clear_autocast_cache()  # autocast keeps casts by parameter, whatever it holds
            for tensor, other in pairs:
                tensor.data = other.to(tensor)
            yield
        finally:
            for (tensor, _), data in zip(pairs, held, strict=True):
                tensor.data = data
            torch.clear_autocast_cache()


def _nearest(model: nn.Module, buffer: str) -> set[int]:
    """Return the ids of the parameters of the nearest module around a buffer that has any."""
    path = buffer
    while path:
        path = path.rpartition(".")[0]
        if found := {id(parameter) for parameter in model.get_submodule(path).parameters()}:
            return found
    return set()
