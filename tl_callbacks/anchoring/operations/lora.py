"""The update that a LoRA adapter adds to a weight: its size, its penalty and its pull, without ever forming it.

The update is s * B A with r columns in B. Its squared norm and the gradients of it need r x r products only.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_callbacks.dtensors import whole
from tl_callbacks.names import normalise
from tl_callbacks.parameters import is_peft

# Variants of LoRA whose update is still the product of the two factors; DoRA and others scale or mix what they add.
_PRODUCTS = ("MiCA",)


class LoraUpdate(NamedTuple):
    """The update s * B A of one layer by one adapter, and which of its factors is zero where there is no update.

    Args:
        name: of the layer, normalised; for an adapter that is not called "default", with its name.
        down: A, (r, inputs) and perhaps further dimensions of a kernel; of experts (experts * r, inputs).
        up: B, (outputs, r) and perhaps further dimensions of 1; of experts (outputs, r * experts).
        scaling: s.
        zero: the factor that is zero at the start: "up", of embeddings "down".
        bias: the bias of B, which the update adds times s.
        groups: groups of a convolution, each with its part of A and B.
        experts: whether the ranks of B are interleaved, as PEFT has them for stacks of experts.
    """

    name: str
    down: nn.Parameter
    up: nn.Parameter
    scaling: float
    zero: Literal["up", "down"]
    bias: nn.Parameter | None = None
    groups: int = 1
    experts: bool = False

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that make the update."""
        return (self.down, self.up) if self.bias is None else (self.down, self.up, self.bias)

    @property
    def moving(self) -> nn.Parameter:
        """The factor that is zero at the start, whose change is the update's."""
        return self.up if self.zero == "up" else self.down

    @property
    def staying(self) -> nn.Parameter:
        """The other factor."""
        return self.down if self.zero == "up" else self.up


def lora_updates(model: nn.Module, zero: Mapping[str, Literal["up", "down"]] | None = None) -> list[LoraUpdate]:
    """Return the updates of a model's active LoRA adapters that are zero now: there the model is the one below them.

    Call it before training. An adapter whose product is not zero (PiSSA, OLoRA, LoftQ, LoRA-GA, orthogonal, a trained
    one that was loaded, `init_lora_weights=False`), one whose update is more than the product (DoRA, AdaLoRA, aLoRA and
    others), and other PEFT methods are left out: what they should stay near is their own initial state.

    Args:
        model: a model, with adapters or without.
        zero: the factor that was zero when training began, by the updates' names, to find those again whose factors
            have moved or been sharded since; None: look.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], r=2, lora_alpha=8))
        >>> [(update.name, tuple(update.up.shape), update.scaling) for update in lora_updates(model)]
        [('0', (3, 2), 4.0)]
    """
    found: list[LoraUpdate] = []
    if not is_peft(model):
        return found
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            candidates = (_update(name, module, adapter, zero) for adapter in module.active_adapters)
            found += [update for update in candidates if update is not None]
    return found


@torch.no_grad()
def update_norm(update: LoraUpdate) -> float:
    """Return the Frobenius norm of an update, 0 or more. Call it on all ranks.

    Example:
        >>> one = nn.Parameter(torch.ones(1, 1))
        >>> update_norm(LoraUpdate("layer", down=3 * one, up=4 * one, scaling=0.5, zero="up"))
        6.0
    """
    up, down = _blocks(update, torch.float64)
    square = float((whole(up.mT @ up) * whole(down @ down.mT)).sum())
    if update.bias is not None:
        square += float(whole(update.bias.double().square().sum()))
    return abs(update.scaling) * math.sqrt(max(square, 0.0))


@torch.no_grad()
def update_gradients(update: LoraUpdate, strength: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the gradients of strength * ||s * B A||^2 by the factors that train, and by B's bias.

    They are 2 * strength * s^2 * B (A A^T) and 2 * strength * s^2 * (B^T B) A.

    Args:
        update: the update.
        strength: factor of the penalty, 0 or more; times the loss scale under a gradient scaler.

    Returns:
        Pairs of a parameter and a new tensor of its shape and dtype.

    Example:
        >>> factor = nn.Parameter(torch.ones(1, 1))
        >>> update = LoraUpdate("layer", down=factor, up=nn.Parameter(3 * factor), scaling=1.0, zero="up")
        >>> [gradient.item() for _, gradient in update_gradients(update, 0.5)]
        [9.0, 3.0]
    """
    factor = 2 * strength * update.scaling**2
    up, down = _blocks(update, torch.promote_types(update.up.dtype, torch.float32))
    found = []
    if update.down.requires_grad:
        found.append((update.down, _shaped(update.down, (up.mT @ up) @ down, factor)))
    if update.up.requires_grad:
        blocks = up @ (down @ down.mT)
        found.append((update.up, _shaped(update.up, blocks.permute(1, 2, 0) if update.experts else blocks, factor)))
    if update.bias is not None and update.bias.requires_grad:
        found.append((update.bias, update.bias * factor))
    return found


@torch.no_grad()
def shrink_(update: LoraUpdate, weight: float) -> None:
    """Remove the share `weight` of an update in place: B <- (1 - weight) * B; A of embeddings.

    Args:
        update: the update.
        weight: the share, in [0, 1).

    Example:
        >>> factor = nn.Parameter(torch.ones(1, 1))
        >>> update = LoraUpdate("layer", down=nn.Parameter(torch.ones(1, 1)), up=factor, scaling=1.0, zero="up")
        >>> shrink_(update, 0.25)
        >>> update_norm(update)
        0.75
    """
    update.moving.mul_(1 - weight)
    if update.bias is not None:
        update.bias.mul_(1 - weight)


def agreed(zero: dict[str, Literal["up", "down"]]) -> dict[str, Literal["up", "down"]]:
    """Return what the first rank found to be zero, by update; where it alone has read the weights, others cannot tell.

    Example:
        >>> agreed({"layer": "up"})
        {'layer': 'up'}
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return zero
    found = [zero]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _update(
    name: str, module: LoraLayer, adapter: str, known: Mapping[str, Literal["up", "down"]] | None
) -> LoraUpdate | None:
    """Return the update of a layer by an adapter; None if it is not zero, or not the product of two factors."""
    if adapter in module.lora_variant and not type(module.lora_variant[adapter]).__name__.startswith(_PRODUCTS):
        return None
    bias: nn.Parameter | None = None
    groups = 1
    if adapter in module.lora_embedding_A:
        down, up = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    elif adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Module):  # AdaLoRA's are bare parameters
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        bias = getattr(module.lora_B[adapter], "bias", None)
        groups = getattr(module.lora_B[adapter], "groups", 1)
    else:
        return None
    experts = int(module.num_experts) if isinstance(module, ParamWrapper) else 1
    full = update_name(name, adapter)
    zero = _zero(down, up, bias) if known is None else known.get(full)
    if zero is None:
        return None
    return LoraUpdate(full, down, up, float(module.scaling[adapter]), zero, bias, groups * experts, experts > 1)


def update_name(layer: str, adapter: str) -> str:
    """Return the name of the update of a layer by an adapter.

    Example:
        >>> update_name("base_model.model.encoder", "default"), update_name("encoder", "second")
        ('encoder', 'encoder.second')
    """
    return normalise(layer) if adapter == "default" else f"{normalise(layer)}.{adapter}"


def _zero(down: Tensor, up: Tensor, bias: Tensor | None) -> Literal["up", "down"] | None:
    """Return the factor that is zero; None if neither is. Of what a rank has not read, the one that usually is."""
    if up.is_meta or (not bool(up.any()) and (bias is None or not bool(bias.any()))):
        return "up"
    return None if bool(down.any()) else "down"


def _blocks(update: LoraUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return B as (groups, outputs, r) and A as (groups, r, inputs), in a dtype; without groups both as matrices."""
    up, down, groups = update.up.detach().to(dtype), update.down.detach().to(dtype), update.groups
    if update.experts:
        return up.reshape(len(up), -1, groups).permute(2, 0, 1), down.reshape(groups, -1, down.shape[-1])
    if up.ndim > 2:
        up, down = up.flatten(1), down.flatten(1)
    if groups == 1:
        return up, down
    return up.reshape(groups, len(up) // groups, -1), down.reshape(groups, len(down) // groups, -1)


def _shaped(parameter: nn.Parameter, gradient: Tensor, factor: float) -> Tensor:
    """Return a gradient, times a factor, in the shape, the dtype and the shards of its parameter."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return (gradient * factor).to(parameter.dtype).reshape(parameter.shape)
