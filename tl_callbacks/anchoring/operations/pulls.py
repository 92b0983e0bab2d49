"""The operations, on tensors: the decoupled pull, the gradient of the L2-SP penalty, and distances.

The pull makes no temporary of a parameter's size, which on a CPU is most of what an anchor costs; the penalty's is the
gradient itself. A reference of another dtype or on another device is converted a piece at a time.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from tl_callbacks.dtensors import local, whole

PIECE = 2**18  # elements that are converted at a time: a megabyte of float32


def pieces(parameter: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two tensors of one shape in views of at most `PIECE` elements, in their order and of any strides.

    Args:
        parameter: any shape.
        reference: the same shape.

    Example:
        >>> [len(piece) for piece, _ in pieces(torch.zeros(3 * PIECE), torch.zeros(3 * PIECE))] == [PIECE] * 3
        True
    """
    if parameter.numel() <= PIECE:
        yield parameter, reference
    elif rows := PIECE * len(parameter) // parameter.numel():
        yield from zip(torch.split(parameter, rows), torch.split(reference, rows), strict=True)
    else:
        for one, other in zip(parameter, reference, strict=True):
            yield from pieces(one, other)


@torch.no_grad()
def pull_(parameter: Tensor, reference: Tensor, weight: float) -> Tensor:
    """Move `parameter` in place toward `reference` by the share `weight` of the way: p <- p - weight * (p - reference).

    Args:
        parameter: any shape.
        reference: the same shape; any dtype and device.
        weight: share of the distance removed, in [0, 1).

    Returns:
        `parameter`.

    Example:
        >>> pull_(torch.tensor([1.0]), torch.tensor([0.0]), 0.25)
        tensor([0.7500])
    """
    if _alike(parameter, reference):
        return parameter.lerp_(reference, weight)
    for part, toward in pieces(parameter, reference):
        part.lerp_(toward.to(part), weight)
    return parameter


@torch.no_grad()
def penalty_gradient(parameter: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Return the gradient of strength * ||parameter - reference||^2, which is 2 * strength * (parameter - reference).

    The difference is formed first, so that it is exact where the two are near, in bfloat16 too.

    Args:
        parameter: any shape; a shard of FSDP2's too.
        reference: the same shape, of a shard also this rank's part alone; any dtype and device.
        strength: factor of the penalty, 0 or more; times the loss scale under a gradient scaler.

    Returns:
        A new tensor of the parameter's shape, dtype, device and shards.

    Example:
        >>> penalty_gradient(torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
        tensor([2.])

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        ICML 2018, equation 4, with alpha = 2 * strength. https://arxiv.org/abs/1802.01483
    """
    mine, theirs = local(parameter), local(reference)
    if _alike(mine, theirs):
        gradient = torch.sub(mine, theirs)
    else:
        gradient = mine.detach().clone()
        for part, toward in pieces(gradient, theirs):
            part.sub_(toward.to(part))
    gradient.mul_(2 * strength)
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


@torch.no_grad()
def distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the Euclidean distance ||theta - theta_pre|| over pairs of tensors, 0 or more.

    Args:
        pairs: (parameter, reference), each pair of one shape; of shards the reference may be this rank's part alone.
            Any dtypes and devices: the difference is formed in the parameter's. With shards call it on all ranks.

    Example:
        >>> distance([(torch.tensor([3.0, 0.0]), torch.zeros(2)), (torch.tensor([4.0]), torch.zeros(1))])
        5.0
    """
    return math.sqrt(sum(_squares(parameter, reference) for parameter, reference in pairs))


def _squares(parameter: Tensor, reference: Tensor) -> float:
    """Return the sum of the squared differences, over all ranks if the parameter is sharded."""
    mine = local(parameter)
    total = torch.zeros((), dtype=torch.float64, device=mine.device)
    for part, toward in pieces(mine, local(reference)):
        total += (part - toward.to(part)).double().square().sum()
    if isinstance(parameter, DTensor):
        placements = [one if isinstance(one, Replicate) else Partial() for one in parameter.placements]
        total = whole(DTensor.from_local(total, parameter.device_mesh, placements, run_check=False))
    return float(total)


def _alike(parameter: Tensor, reference: Tensor) -> bool:
    return parameter.dtype == reference.dtype and parameter.device == reference.device


def half_life(strength: float) -> float:
    """Return the optimizer steps at the peak rate after which a decoupled pull alone has halved a distance.

    Args:
        strength: share of the distance removed per step, in [0, 1).

    Returns:
        Optimizer steps; infinity for strength 0.

    Example:
        >>> round(half_life(0.01))
        69
    """
    return math.inf if strength == 0 else math.log(2) / -math.log1p(-strength)
