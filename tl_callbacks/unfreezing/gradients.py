"""Measures how large the gradients of frozen groups would be, in a step that trains the others as ever."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from tl_callbacks.dtensors import renew_precision, reshard, whole
from tl_callbacks.frozen.state import frozen_by_us, set_frozen
from tl_callbacks.parameters import parameters_by_name

_TINY = 1e-12  # for groups whose weights are all zero: they come first


class GradientMeter:
    """Lets gradients reach frozen parameters for one optimizer step, and takes each away as soon as it is whole.

    The parameters keep their modules' eval mode, are unknown to DDP's reducer and to the optimizer's step, and have no
    gradient left when gradients are clipped, so what trains is trained bit for bit as without.

    Args:
        model: the model without wrappers.
        names: normalised names of the parameters; of them those count that this package has frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> set_frozen(model, frozenset({"0.weight", "0.bias"}))
        >>> meter = GradientMeter(model, ["0.weight"])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model[0].weight.grad is None, meter.relative_norms({"low": ["0.weight"]})["low"] > 0
        (True, True)
        >>> meter.remove()
        >>> model[0].weight.requires_grad
        False
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._model = model
        self._frozen = frozen_by_us(model)
        reshard(model)
        set_frozen(model, self._frozen - frozenset(names))
        renew_precision(model)
        known = parameters_by_name(model)
        self._parameters = {name: known[name] for name in names if name in self._frozen}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]

    @torch.no_grad()
    def relative_norms(self, groups: Mapping[str, Iterable[str]], *, loss_scale: float = 1.0) -> dict[str, float]:
        """Return ||gradient|| / ||weights|| of each group, the same on all ranks. Call it on all of them.

        Args:
            groups: group name to parameter names; those that were not measured count as nothing.
            loss_scale: the gradient scaler's factor on the loss.

        Returns:
            Group name to ratio, 0 or more; no number where a gradient is none.
        """
        result = {}
        for group, names in groups.items():
            held = [name for name in names if name in self._parameters]
            gradient = math.sqrt(sum(_square(self._reduced(name)) for name in held)) / loss_scale
            weights = math.sqrt(sum(_square(self._parameters[name]) for name in held))
            result[group] = gradient / max(weights, _TINY)
        return result

    def remove(self) -> None:
        """Freeze the parameters again and forget their gradients. Safe to call twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters.values():
            parameter.grad = None  # what another callback put there for a parameter that no backward reached
        reshard(self._model)
        set_frozen(self._model, self._frozen)
        self._handles, self._gradients = [], {}

    def _taker(self, name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                before = self._gradients.get(name)
                self._gradients[name] = gradient if before is None else before.add_(gradient)

        return take

    def _reduced(self, name: str) -> Tensor:
        """Return the gradient of the global batch: FSDP2 has averaged its shards, DDP knows nothing of these."""
        parameter = self._parameters[name]
        gradient = self._gradients.get(name)
        if isinstance(parameter, DTensor):
            return torch.zeros_like(parameter) if gradient is None else gradient
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        return gradient


def _square(tensor: Tensor) -> float:
    return float(whole(tensor.detach().double().square().sum()))
