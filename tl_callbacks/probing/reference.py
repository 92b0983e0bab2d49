"""What a run is compared with: the pretrained model's features and weights, and the same network drawn at random."""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from tl_callbacks.dtensors import whole
from tl_callbacks.fingerprints import base_model, tensor_hash
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.reading.quiet import random_states_kept

_LARGE = 256 << 20  # bytes of reference features, above which they are kept in bfloat16


def body(groups: LayerGroups) -> list[str]:
    """Return the parameters outside the head, whose weights are new and have nothing pretrained to go back to.

    Example:
        >>> from tl_callbacks import LayerGroup
        >>> body(LayerGroups((LayerGroup("layer", ("a",)), LayerGroup("head", ("b",))), "head"))
        ['a']
    """
    return [name for group in groups if group.name != groups.head for name in group.parameters]


@torch.no_grad()
def weights_now(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of parameters on the CPU, by normalised name; without those that this rank has not read."""
    parameters = parameters_by_name(model)
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names if not parameters[name].is_meta}


@torch.no_grad()
def distances(model: nn.Module, groups: LayerGroups, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return ||theta - theta_pre|| of each group of which weights are held. Call it on all ranks.

    Args:
        model: the model, sharded or not.
        groups: its groups.
        weights: the pretrained ones, whole, by normalised name.

    Example:
        >>> from tl_callbacks import group_layers
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups = group_layers(model)
        >>> weights = weights_now(model, body(groups))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.add_(torch.tensor([3.0, 4.0]))
        >>> round(distances(model, groups, weights)["0"], 5)
        5.0
    """
    parameters = parameters_by_name(model)
    found = {}
    for group in groups:
        if held := [name for name in group.parameters if name in weights]:
            squares = [_squared_distance(whole(parameters[name].detach()), weights[name]) for name in held]
            found[group.name] = float(torch.stack(squares).sum().sqrt())
    return found


def _squared_distance(now: Tensor, before: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(now - before.to(now), dtype=torch.float64)
    return norm.square().cpu()


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that change with any bit of the weights. Meta tensors have names only.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)})
        True
    """
    lines = "".join(f"{name} {_hash(weights[name])}\n" for name in sorted(weights))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _hash(tensor: Tensor) -> str:
    return "meta" if tensor.is_meta else tensor_hash(tensor)


def same_on_all_ranks(value: str) -> bool:
    """Return whether all ranks have the same text. Call it on all ranks."""
    return len(set(gather_object([value]))) == 1


def first_ranks(value: Any) -> Any:
    """Return the value that the first rank has. Call it on all ranks."""
    return broadcast_object_list([value])[0]


def compact(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return features as they are kept through a training: in float32, or in bfloat16 if they would take much memory.

    Example:
        >>> compact({"layer": torch.zeros(2, 3)})["layer"].dtype
        torch.float32
    """
    large = sum(part.numel() * 4 for part in features.values()) > _LARGE
    return {name: part.bfloat16() if large else part for name, part in features.items()}


def random_twin(model: nn.Module, seed: int) -> nn.Module:
    """Return the same network with weights drawn anew, without adapters, on the model's device and in its dtype.

    A transformers model is made from its configuration. In another one each module draws its own parameters anew;
    those of modules that cannot are put in random order. No random state changes.

    Args:
        model: the model.
        seed: of the weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> torch.equal(random_twin(model, 0)[0].weight, model[0].weight)
        False
    """
    base = base_model(model)
    first = next(base.parameters())
    with random_states_kept(torch.device("cpu"), seed):
        twin = _from_config(base) if isinstance(base, PreTrainedModel) else None
        if twin is None:
            twin = copy.deepcopy(base).cpu()
            _draw_anew_(twin)
    return twin.to(first.device)


def _from_config(base: PreTrainedModel) -> nn.Module | None:
    """Return a fresh model of the same configuration, None if it would have other parameters than this one."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    twin: nn.Module = type(base)(config)
    twin = twin.to(base.dtype)
    names = {name.replace(".base_layer.", ".") for name, _ in base.named_parameters()}
    return twin if {name for name, _ in twin.named_parameters()} <= names else None


@torch.no_grad()
def _draw_anew_(module: nn.Module) -> None:
    drawn: set[int] = set()
    for part in module.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
            drawn.update(id(parameter) for parameter in part.parameters(recurse=False))
    for parameter in module.parameters():
        if id(parameter) not in drawn:
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
