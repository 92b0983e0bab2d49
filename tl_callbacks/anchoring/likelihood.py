"""The log-likelihood of labels under a model's outputs, and labels drawn from them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""The label that marks a place without one."""


def log_likelihood(logits: Tensor, labels: Tensor, *, next_token: bool = False) -> Tensor:
    """Return the logarithm of the probability of labels, summed over everything in them: a scalar.

    What the model's output means follows from the labels: whole numbers are classes (those of -100 do not count);
    numbers with a fraction and of the logits' shape are targets with Gaussian noise of variance 1, up to a constant.

    Args:
        logits: (rows, classes) or (rows, places, classes); targets: any shape.
        labels: (rows,) or (rows, places), whole numbers; or the shape of the logits, without a last dimension of 1.
        next_token: whether the logits of a place predict the label of the next.

    Raises:
        ValueError: the shapes do not go together.

    Example:
        >>> log_likelihood(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
        tensor(0.2500)
    """
    if labels.is_floating_point():
        return -0.5 * (_targets_shape(logits, labels) - labels).square().sum()
    logits, labels = _aligned(logits, labels, next_token)
    flat = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return -flat


@torch.no_grad()
def draw_labels(logits: Tensor, labels: Tensor, generator: torch.Generator, *, next_token: bool = False) -> Tensor:
    """Return labels drawn from what a model predicts, of the shape and dtype of `labels`, at the places that count.

    Args:
        logits: as for `log_likelihood`.
        labels: as for `log_likelihood`; of whole numbers only the places of -100 matter.
        generator: a CPU generator, where the numbers are drawn so that they do not depend on the device.
        next_token: whether the logits of a place predict the label of the next.

    Raises:
        ValueError: the shapes do not go together.

    Example:
        >>> draw_labels(torch.tensor([[0.0, 99.0], [0.0, 0.0]]), torch.tensor([0, -100]), torch.Generator())
        tensor([   1, -100])
    """
    if labels.is_floating_point():
        mean = _targets_shape(logits, labels)
        return mean + torch.randn(mean.shape, generator=generator).to(mean)
    result = labels.clone()
    logits, targets = _aligned(logits, result, next_token)
    probabilities = logits.double().softmax(-1).cpu()
    drawn = probabilities.flatten(0, -2).multinomial(1, generator=generator).reshape(targets.shape).to(targets)
    targets.copy_(torch.where(targets == IGNORED, targets, drawn))  # a view of `result`
    return result


def predicts_next_token(model: nn.Module) -> bool:
    """Return whether a model's logits at a place predict the label of the next: a transformers language model's do.

    Example:
        >>> predicts_next_token(nn.Linear(2, 2))
        False
    """
    inside: Any = model
    while hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()
    if getattr(getattr(inside, "config", None), "is_encoder_decoder", False):
        return False
    kind = getattr(inside, "loss_type", None)
    return kind in ("ForCausalLM", "ForConditionalGeneration") or "LMHead" in type(inside).__name__


def _aligned(logits: Tensor, labels: Tensor, next_token: bool) -> tuple[Tensor, Tensor]:
    if next_token:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not go together; "
            "expected one label for each row of logits. Give a `loss` of your own."
        )
    return logits, labels


def _targets_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape == (*targets.shape, 1):
        outputs = outputs.squeeze(-1)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} do not go together; "
            "expected the same. Give a `loss` of your own."
        )
    return outputs
