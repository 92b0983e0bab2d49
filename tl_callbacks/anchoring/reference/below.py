"""The model below LoRA adapters: the weights that they add to, and a reference that knows nothing of them."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from tl_callbacks.anchoring.operations.lora import LoraUpdate, update_name
from tl_callbacks.names import normalise


def weights_below(model: nn.Module, zero: Mapping[str, Literal["up", "down"]]) -> dict[str, Tensor]:
    """Return the tensors of the layers that LoRA updates are added to, by the updates' names and their own.

    Args:
        model: a model, with adapters or without.
        zero: the factor that was zero when training began, by the updates' names.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> {name: tuple(tensor.shape) for name, tensor in weights_below(model, {"0": "up"}).items()}
        {'0.weight': (3, 4), '0.bias': (3,)}
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        full = (
            {update_name(name, adapter) for adapter in module.active_adapters} if isinstance(module, LoraLayer) else {}
        )
        if own := zero.keys() & full:
            layer: Any = module
            if isinstance(module, ParamWrapper):
                tensors = {module.parameter_name: layer.get_param()}
            else:  # a quantised weight may have another name, or be several tensors
                base = layer.get_base_layer()
                tensors = {**dict(base.named_parameters(recurse=False)), **dict(base.named_buffers(recurse=False))}
            found |= {f"{update}.{key}": tensor.detach() for update in own for key, tensor in tensors.items()}
    return found


def with_updates(
    model: nn.Module, updates: list[LoraUpdate], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[LoraUpdate]]:
    """Return a reference that a user gave with what LoRA updates it lacks, and these updates.

    A `state_dict()` of the pretrained model knows nothing of the adapters on it; where they add nothing, it is the
    model below them. One that holds the factors of an update is what these are anchored to.

    Args:
        model: the model, with adapters or without.
        updates: its updates that are zero now.
        tensors: parameter name to tensor.

    Returns:
        The tensors by normalised name, with the factors as they are now where there were none; and the updates of which
        the reference is the model below.

    Raises:
        ValueError: the tensors hold another weight than the one below an update.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from tl_callbacks.anchoring import lora_updates
        >>> line = nn.Sequential(nn.Linear(4, 3))
        >>> given = {name: tensor.clone() for name, tensor in line.state_dict().items()}
        >>> model = get_peft_model(line, LoraConfig(target_modules=["0"]))
        >>> tensors, updates = with_updates(model, lora_updates(model), given)
        >>> list(tensors)[:2], [update.name for update in updates]
        (['0.lora_A.weight', '0.lora_B.weight'], ['0'])
    """
    given = {normalise(name): tensor for name, tensor in tensors.items()}
    plain = {_plain(name): tensor for name, tensor in given.items()}
    names = {id(parameter): normalise(name) for name, parameter in model.named_parameters()}
    lacking = [update for update in updates if not any(names[id(p)] in given for p in update.parameters)]
    for name, below in weights_below(model, {update.name: update.zero for update in lacking}).items():
        other = plain.get(name, below)
        if _readable(below) and (other.shape != below.shape or not torch.equal(other.to(below), below)):
            raise ValueError(
                f"the reference's `{name}` is not the weight below the LoRA adapter; expected that of the model that "
                "the adapters were put on, as it is what they add to it that is anchored. Leave `reference` out, or "
                "put the adapters on the pretrained model."
            )
    own = {names[id(p)]: p.detach() for update in lacking for p in update.parameters}
    renamed = {name: plain[_plain(name)] for name in names.values() if _plain(name) in plain}
    return {**own, **renamed, **given}, lacking


def _plain(name: str) -> str:
    """Return the name that the model below has for a parameter, if it is one of its own."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _readable(weight: Tensor) -> bool:
    """Return whether a weight has values, which are not quantised."""
    return weight.is_floating_point() and not weight.is_meta and not hasattr(weight, "__tensor_flatten__")
