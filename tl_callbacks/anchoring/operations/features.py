"""The operations on activations: how far features are from the reference's, and how far outputs (distillation).

Each row of a batch counts the same, and within it each place that the mask keeps.
"""

import torch
from torch import Tensor
from torch.nn import functional


def feature_distance(features: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the rows of the mean squared difference of features, over the places that count.

    The difference is formed in float32 at least. What stands on other places has no part in it and no gradient.

    Args:
        features: (rows, d), (rows, length, d), or maps (rows, d, height, width).
        reference: the same shape, without gradient.
        mask: (rows, length), True where a place counts, for features of three dimensions; None: all count.

    Returns:
        A scalar, 0 or more; a row without any place that counts gives 0.

    Example:
        >>> hidden = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
        >>> feature_distance(hidden, torch.zeros(1, 2, 2), torch.tensor([[True, False]]))
        tensor(5.)

    References:
        Li, Xiong, Wang, Rao, Liu, Chen and Huan, "DELTA: DEep Learning Transfer using Feature Map with Attention for
        Convolutional Networks", ICLR 2019, section 3.3, without the attention, as a mean instead of half the sum.
        https://arxiv.org/abs/1901.09229
    """
    difference = _wide(features) - _wide(reference)
    if mask is None:
        return difference.square().mean()
    return _over_rows(difference.masked_fill(~mask[..., None], 0.0).square().mean(-1), mask)


def distillation_loss(
    outputs: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 2.0,
    independent: bool = False,
) -> Tensor:
    """Return the mean over the rows of temperature^2 * KL(reference || outputs), both softened by the temperature.

    Its gradient is that of the cross-entropy against the reference's softened probabilities; unlike that one it is 0
    where the outputs are the reference's. The square keeps the size of the gradient when the temperature changes.

    Args:
        outputs: logits, (rows, classes) or (rows, length, classes).
        reference: the reference's logits, the same shape, without gradient.
        mask: (rows, length), True where a place counts, for logits of three dimensions; None: all count.
        temperature: what both logits are divided by, more than 0.
        independent: whether each output is the logit of a yes or no (several labels a row), not of one class among all.

    Returns:
        A scalar, 0 or more.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits), round(float(distillation_loss(logits, torch.zeros(1, 2))), 4)
        (tensor(0.), 0.4805)

    References:
        Li and Hoiem, "Learning without Forgetting", ECCV 2016, equation 2. https://arxiv.org/abs/1606.09282
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (the square).
        https://arxiv.org/abs/1503.02531
    """
    ours, theirs = (_wide(logits) / temperature for logits in (outputs, reference))
    if mask is not None:  # logits on padding may be no numbers
        ours, theirs = (logits.masked_fill(~mask[..., None], 0.0) for logits in (ours, theirs))
    if independent:
        ours, theirs = (torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (ours, theirs))
    ours, theirs = (functional.log_softmax(logits, dim=-1) for logits in (ours, theirs))
    divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if independent:
        divergence = divergence.sum(-1)
    by_row = divergence.mean() if mask is None else _over_rows(divergence, mask)
    return by_row * temperature**2


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _over_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over rows of the mean over the places that count; values elsewhere are 0."""
    return (values.sum(1) / mask.sum(1).clamp(min=1)).mean()
