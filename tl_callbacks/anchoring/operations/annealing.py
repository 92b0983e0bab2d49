"""The rule of RecAdam: how the weight moves from recalling the pretrained weights to the target task."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SigmoidAnnealing:
    """The weight of the target task by step, from near 0 to near 1: 1 / (1 + exp(-k * (step - midpoint))).

    Made by `sigmoid_annealing`.

    Args:
        k: steepness, per optimizer step.
        midpoint: the step at which the weight is 0.5: a whole number of optimizer steps, or a fraction of training.
    """

    k: float
    midpoint: float

    def target_weight(self, step: int, max_steps: int) -> float:
        """Return the weight of the target task in (0, 1); what it lacks of 1 is the weight of the pull.

        Args:
            step: the optimizer step, counted from 1 as RecAdam does.
            max_steps: optimizer steps of the training; counts for a midpoint in fractions only.

        Example:
            >>> annealing = sigmoid_annealing(k=0.1, midpoint=100)
            >>> [round(annealing.target_weight(step, 1000), 4) for step in (1, 100, 200)]
            [0.0001, 0.5, 1.0]
        """
        midpoint = self.midpoint if isinstance(self.midpoint, int) else self.midpoint * max_steps
        scaled = self.k * (step - midpoint)
        small = math.exp(-abs(scaled))
        return 1 / (1 + small) if scaled >= 0 else small / (1 + small)


def sigmoid_annealing(k: float, midpoint: float) -> SigmoidAnnealing:
    """Return RecAdam's schedule: the pull alone at first, the target task alone in the end, a sigmoid in between.

    Args:
        k: steepness, per optimizer step, above 0; the authors searched 0.05 to 1. With k = 0.1 the weight goes from
            0.01 to 0.99 within 92 steps.
        midpoint: the optimizer step at which both weigh 0.5 (a whole number, 0 or more; the authors searched 100 to
            1000), or the fraction of training, a float in (0, 1).

    Raises:
        ValueError: `k` or `midpoint` is out of its range.

    Example:
        >>> sigmoid_annealing(k=0.1, midpoint=0.25)
        SigmoidAnnealing(k=0.1, midpoint=0.25)

    References:
        Chen et al., "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting", EMNLP 2020,
        section 3.2. https://arxiv.org/abs/2004.12651
    """
    if not 0 < k < math.inf:
        raise ValueError(f"`k` is {k}; expected a number above 0, the steepness per optimizer step.")
    fraction = isinstance(midpoint, float)
    if isinstance(midpoint, bool) or not (0 < midpoint < 1 if fraction else midpoint >= 0):
        raise ValueError(
            f"`midpoint` is {midpoint!r}; expected optimizer steps, a whole number of 0 or more, or a fraction of "
            "training, a float in (0, 1)."
        )
    return SigmoidAnnealing(k, midpoint)
