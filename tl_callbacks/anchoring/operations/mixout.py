"""Mixout on tensors: some weights replaced by the pretrained ones for a step, the others scaled to the right mean."""

import hashlib

import torch
from torch import Tensor


def mixout_mask(parameter: Tensor, probability: float, *, seed: int, step: int, name: str) -> Tensor:
    """Return which elements of a parameter are the pretrained ones for a step: True with a probability, each by itself.

    It depends on the arguments alone (and, beyond the CPU, on the kind of device), so that all ranks and a resumed run
    draw the same, and no random state moves.

    Args:
        parameter: any shape.
        probability: in [0, 1).
        seed: of the training.
        step: the optimizer step.
        name: of the parameter.

    Returns:
        A bool tensor of the parameter's shape on its device.

    Example:
        >>> mask = mixout_mask(torch.empty(1000), 0.3, seed=0, step=4, name="weight")
        >>> bool(0.25 < mask.float().mean() < 0.35)
        True
    """
    digest = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    mask = torch.empty(parameter.shape, dtype=torch.bool, device=parameter.device)
    return mask.bernoulli_(probability, generator=generator)


@torch.no_grad()
def mix_(parameter: Tensor, reference: Tensor, mask: Tensor, probability: float) -> Tensor:
    """Mix a parameter with its reference in place: p <- ((1 - m) * p + m * reference - q * reference) / (1 - q).

    q is the probability and m the mask. Where m is 1 that is the reference, elsewhere the reference plus the distance
    from it divided by 1 - q; over draws of the mask the mean is the parameter.

    Args:
        parameter: any shape.
        reference: the same shape; any dtype and device.
        mask: the same shape, bool.
        probability: with which the mask is True, in [0, 1).

    Returns:
        `parameter`.

    Example:
        >>> mix_(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.5)
        tensor([1., 5.])

    References:
        Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        ICLR 2020, equation 5. https://arxiv.org/abs/1909.11299
    """
    reference = reference.to(parameter)
    return parameter.sub_(reference).masked_fill_(mask, 0).mul_(1 / (1 - probability)).add_(reference)


@torch.no_grad()
def mixed_gradient(gradient: Tensor, mask: Tensor, probability: float) -> Tensor:
    """Return the gradient by the parameter from that by the mixed one: gradient * (1 - mask) / (1 - probability).

    Args:
        gradient: by the mixed parameter.
        mask: the same shape, bool.
        probability: with which the mask is True, in [0, 1).

    Returns:
        A new tensor of the same shape and dtype; what is not finite stays so.

    Example:
        >>> mixed_gradient(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), 0.5)
        tensor([0., 4.])
    """
    return gradient.mul(~mask).mul_(1 / (1 - probability))
