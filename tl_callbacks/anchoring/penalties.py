"""The operations, on tensors: the decoupled pull, the gradient of the L2-SP penalty, and distances.

The pull makes no temporary of a parameter's size, which on a CPU is most of what an anchor costs; the penalty's is the
gradient itself.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tl_callbacks.dtensors import whole


@torch.no_grad()
def pull_(parameter: Tensor, reference: Tensor, weight: float) -> Tensor:
    """Move `parameter` in place toward `reference` by the share `weight` of the way: p <- p - weight * (p - reference).

    Args:
        parameter: any shape.
        reference: the same shape and dtype.
        weight: share of the distance removed, in [0, 1).

    Returns:
        `parameter`.

    Example:
        >>> pull_(torch.tensor([1.0]), torch.tensor([0.0]), 0.25)
        tensor([0.7500])
    """
    return parameter.lerp_(reference, weight)


@torch.no_grad()
def penalty_gradient(parameter: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Return the gradient of strength * ||parameter - reference||^2, which is 2 * strength * (parameter - reference).

    The difference is formed first, so that it is exact where the two are near, in bfloat16 too.

    Args:
        parameter: any shape.
        reference: the same shape and dtype.
        strength: factor of the penalty, 0 or more; times the loss scale under a gradient scaler.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> penalty_gradient(torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
        tensor([2.])

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        ICML 2018, equation 4, with alpha = 2 * strength. https://arxiv.org/abs/1802.01483
    """
    return torch.sub(parameter, reference).mul_(2 * strength)


@torch.no_grad()
def distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the Euclidean distance ||theta - theta_pre|| over pairs of tensors, 0 or more.

    Args:
        pairs: (parameter, reference), each pair of one shape.

    Example:
        >>> distance([(torch.tensor([3.0, 0.0]), torch.zeros(2)), (torch.tensor([4.0]), torch.zeros(1))])
        5.0
    """
    squares = (whole((parameter - reference).double().square().sum()) for parameter, reference in pairs)
    return math.sqrt(sum(float(square) for square in squares))


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
