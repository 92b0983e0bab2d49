"""Weights between the pretrained and the tuned ones, and the rule by which a place between them is chosen."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tl_callbacks.anchoring.operations.pulls import pieces
from tl_callbacks.dtensors import local


class Place(NamedTuple):
    """What was measured at one place between the pretrained and the tuned weights.

    Attributes:
        alpha: 0: the pretrained weights; 1: the tuned ones.
        metric: of the target task.
        retention: of what the pretrained model could do; None: not measured.
    """

    alpha: float
    metric: float
    retention: float | None = None


@torch.no_grad()
def interpolate_(parameter: Tensor, reference: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Set `parameter` in place to (1 - alpha) * reference + alpha * tuned; at 0 and 1 bit for bit to one of the two.

    Args:
        parameter: any shape; a shard of FSDP2's too.
        reference: the pretrained weights, the same shape (of a shard this rank's part alone), any dtype and device.
        tuned: the fine-tuned ones, the same shape, dtype and shards as the parameter.
        alpha: from 0 to 1.

    Returns:
        `parameter`.

    Example:
        >>> interpolate_(torch.zeros(1), torch.tensor([1.0]), torch.tensor([3.0]), 0.25)
        tensor([1.5000])

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3 (WiSE-FT).
        https://arxiv.org/abs/2109.01903
    """
    mine, theirs = local(parameter), local(tuned)
    if alpha == 1:
        mine.copy_(theirs)
        return parameter
    for (part, toward), (_, to) in zip(pieces(mine, local(reference)), pieces(mine, theirs), strict=True):
        part.copy_(toward)
        if alpha != 0:
            part.lerp_(to, alpha)
    return parameter


def as_row(place: Place) -> dict[str, float | None]:
    """Return a place as JSON holds it: what is no finite number is None.

    Example:
        >>> as_row(Place(0.5, math.nan))
        {'alpha': 0.5, 'metric': None, 'retention': None}
    """
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in place._asdict().items()
    }


def choose(places: Sequence[Place], *, greater_is_better: bool, min_retention: float | None = None) -> Place:
    """Return the place with the best metric among those that retain enough; of equals the one nearest to pretrained.

    Where none retains enough it is the one that retains most. A place whose metric is no finite number is not chosen;
    where none has one it is the place nearest to the tuned weights.

    Args:
        places: at least one.
        greater_is_better: whether the metric grows as the model gets better.
        min_retention: the least retention; None: any.

    Raises:
        ValueError: there is no place, or `min_retention` is given and retention was not measured.

    Example:
        >>> places = [Place(0.0, 0.10, 1.0), Place(0.5, 0.80, 0.99), Place(1.0, 0.82, 0.7)]
        >>> choose(places, greater_is_better=True, min_retention=0.98).alpha
        0.5
        >>> choose(places, greater_is_better=True).alpha
        1.0
    """
    if not places:
        raise ValueError("there is no place to choose; expected at least one alpha.")

    def worth(place: Place) -> float:
        return place.metric * (1 if greater_is_better else -1)

    if min_retention is not None and any(place.retention is None for place in places):
        raise ValueError("`min_retention` is given, and retention was not measured; give `retention`, or leave it out.")
    measured = [place for place in places if math.isfinite(place.metric)]
    if not measured:
        return max(places, key=lambda place: place.alpha)
    if min_retention is None:
        return max(measured, key=lambda place: (worth(place), -place.alpha))
    kept = [(place, place.retention) for place in measured if place.retention is not None]
    enough = [place for place, retention in kept if retention >= min_retention]
    if enough:
        return max(enough, key=lambda place: (worth(place), -place.alpha))
    return max(kept, key=lambda pair: (-math.inf if math.isnan(pair[1]) else pair[1], worth(pair[0])))[0]
