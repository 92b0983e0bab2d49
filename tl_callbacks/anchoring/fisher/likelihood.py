"""The log-likelihood of labels under a model's outputs, and labels drawn from them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100
"""The label that marks a place without one."""


def log_likelihood(logits: Tensor, labels: Tensor, *, next_token: bool = False, each_label: bool = False) -> Tensor:
    """Return the logarithm of the probability of labels, summed over everything in them: a scalar.

    What the model's output means follows from the labels: whole numbers are classes (those of -100 do not count);
    numbers with a fraction and of the logits' shape are targets with Gaussian noise of variance 1, up to a constant,
    or, with `each_label`, say of each label by itself whether it holds (0 or 1, or a probability).

    Args:
        logits: (rows, classes) or (rows, places, classes); targets: any shape.
        labels: (rows,) or (rows, places), whole numbers; or the shape of the logits, without a last dimension of 1.
        next_token: whether the logits of a place predict the label of the next.
        each_label: whether each logit is that of a label which may hold beside others.

    Raises:
        ValueError: the shapes do not go together.

    Example:
        >>> log_likelihood(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
        tensor(0.2500)
    """
    if each_label:
        logits = _targets_shape(logits, labels)
        return -functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    if labels.is_floating_point():
        return -0.5 * (_targets_shape(logits, labels) - labels).square().sum()
    logits, labels = _aligned(logits, labels, next_token)
    flat = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return -flat


def mean_loss(
    logits: Tensor, labels: Tensor, *, next_token: bool = False, each_label: bool = False
) -> tuple[Tensor, str]:
    """Return the loss that a training takes where the labels mean what they do here, and what it is called.

    It is the mean over all that counts, and no number where nothing does. Arguments and errors are those of
    `log_likelihood`.

    Example:
        >>> mean_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
        (tensor(2.), 'mean squared error')
    """
    negative = -log_likelihood(logits, labels, next_token=next_token, each_label=each_label)
    if each_label:
        return negative / labels.numel(), "binary cross-entropy"
    if labels.is_floating_point():
        return 2 * negative / labels.numel(), "mean squared error"
    return negative / (labels[..., 1:] if next_token else labels).ne(IGNORED).sum(), "cross-entropy"


@torch.no_grad()
def draw_labels(
    logits: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    *,
    next_token: bool = False,
    each_label: bool = False,
) -> Tensor:
    """Return labels drawn from what a model predicts, of the shape and dtype of `labels`, at the places that count.

    Args:
        logits: as for `log_likelihood`.
        labels: as for `log_likelihood`; of whole numbers only the places of -100 matter.
        generator: a CPU generator, where the numbers are drawn so that they do not depend on the device.
        next_token: as for `log_likelihood`.
        each_label: as for `log_likelihood`.

    Raises:
        ValueError: the shapes do not go together.

    Example:
        >>> draw_labels(torch.tensor([[0.0, 99.0], [0.0, 0.0]]), torch.tensor([0, -100]), torch.Generator())
        tensor([   1, -100])
    """
    if each_label:
        probabilities = _targets_shape(logits, labels).double().sigmoid().cpu()
        return torch.bernoulli(probabilities, generator=generator).to(labels)
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
    inside = _inside(model)
    if getattr(getattr(inside, "config", None), "is_encoder_decoder", False):
        return False
    kind = getattr(inside, "loss_type", None)
    return kind in ("ForCausalLM", "ForConditionalGeneration") or "LMHead" in type(inside).__name__


def predicts_each_label(model: nn.Module) -> bool:
    """Return whether each of a model's logits is that of a label which may hold beside others.

    A transformers model says so by `config.problem_type`, which is set at its first loss if it was not before.

    Example:
        >>> predicts_each_label(nn.Linear(2, 2))
        False
    """
    config = getattr(_inside(model), "config", None)
    return getattr(config, "problem_type", None) == "multi_label_classification"


def _inside(model: nn.Module) -> Any:
    """Return the model below PEFT's wrapper."""
    inside: Any = model
    while hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()
    return inside


def _aligned(logits: Tensor, labels: Tensor, next_token: bool) -> tuple[Tensor, Tensor]:
    if next_token:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not go together; "
            "expected one label for each row of logits. Give a `loss` of your own."
        )
    if logits.shape[-1] == 1:
        raise ValueError(
            "the labels are whole numbers and the model gives one logit; expected a logit for each class. Give the "
            "labels as floats if they are targets of a regression, or a `loss` of your own."
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
