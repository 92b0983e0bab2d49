"""What FSDP2 makes of parameters: the same tensors in shards, one a rank (DTensor)."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import Trainer

from tl_callbacks.sharding import sharding


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: its shard, which shares memory, or the tensor itself.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, from the shards of all ranks if it is sharded. Call it on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor in the dtype, on the device and in the shards of `like`. Call it on all ranks.

    Args:
        tensor: the whole tensor; where `like` is sharded, the first rank's counts, and the others' may be meta tensors.
        like: a tensor of the same shape.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like)
    device = like.device_mesh.device_type
    if tensor.is_meta:  # accelerate's cpu_ram_efficient_loading: the first rank alone has read the checkpoint
        tensor = torch.empty(tensor.shape, dtype=like.dtype, device=device)
    sharded = distribute_tensor(tensor.to(device, like.dtype), like.device_mesh, like.placements)
    return sharded.to(like.device)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of `like`, as a view: in its own dtype, on its own device.

    Args:
        tensor: the whole tensor.
        like: a tensor of the same shape, sharded or not; if it is not, the part is the whole.

    Raises:
        NotImplementedError: `like` is sharded in another way than into consecutive parts.

    Example:
        >>> shard_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not isinstance(like, DTensor):
        return tensor
    for axis, placement in enumerate(like.placements):
        if type(placement) is Shard:
            # As torch.chunk divides: all parts are of one size, but the last ones may be smaller or empty.
            length = tensor.shape[placement.dim]
            size = -(-length // like.device_mesh.size(axis))
            start = min(length, size * like.device_mesh.get_local_rank(axis))
            tensor = tensor.narrow(placement.dim, start, min(size, length - start))
        elif type(placement) is not Replicate:
            raise NotImplementedError(f"no part of a whole tensor is known for {placement!r}; expected shards (FSDP2).")
    return tensor


def reshard(model: nn.Module) -> None:
    """Give an FSDP2 model its sharded parameters back, which its root keeps whole after an evaluation.

    What is set on the whole ones, such as `requires_grad`, is lost with them. Does nothing to another model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def renew_precision(model: nn.Module) -> None:
    """Make FSDP2 decide anew in which dtype each of its units reduces gradients. Does nothing to another model.

    It decides that from what trains when a unit is first gathered; one of which nothing trained then cannot reduce
    under mixed precision once it is opened. Gathering a unit lets it decide again. Call it on all ranks, after
    `requires_grad` was changed and between steps.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def casts_what_trains(trainer: Trainer) -> bool:
    """Return whether accelerate will cast to float32 what trains when it shards the model: FSDP2 in mixed precision."""
    if sharding(trainer) != "fsdp2" or trainer.accelerator.mixed_precision == "no":
        return False
    assert trainer.model is not None
    return all(type(parameter).__name__ != "Params4bit" for parameter in trainer.model.parameters())


@torch.no_grad()
def to_float32(parameters: dict[str, nn.Parameter]) -> None:
    """Cast parameters in place, as accelerate casts, when it shards a model for mixed precision, those that train then.

    One that is frozen at that moment and opened later would train in the low precision it was loaded in.
    """
    for parameter in parameters.values():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
