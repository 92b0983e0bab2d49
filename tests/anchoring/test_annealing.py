"""RecAdam's sigmoid."""

import math
from typing import Any

import pytest

from tl_callbacks.anchoring import sigmoid_annealing


@pytest.mark.parametrize("k", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("step", [1, 50, 100, 101, 400])
def test_it_is_the_sigmoid(k: float, step: int) -> None:
    expected = 1 / (1 + math.exp(-k * (step - 100)))
    assert sigmoid_annealing(k, 100).target_weight(step, 400) == pytest.approx(expected, rel=1e-12)
    assert sigmoid_annealing(k, 0.25).target_weight(step, 400) == pytest.approx(expected, rel=1e-12)


def test_it_rises_and_does_not_overflow() -> None:
    annealing = sigmoid_annealing(1.0, 10_000)
    weights = [annealing.target_weight(step, 20_000) for step in range(1, 20_000, 7)]
    assert weights == sorted(weights)
    assert weights[0] == 0.0
    assert weights[-1] == 1.0
    assert annealing.target_weight(10_000, 20_000) == 0.5


@pytest.mark.parametrize(("k", "midpoint"), [(0, 10), (-1, 10), (math.inf, 10), (0.1, -1), (0.1, 1.5), (0.1, 0.0)])
def test_bad_arguments_are_refused(k: Any, midpoint: Any) -> None:
    with pytest.raises(ValueError, match="`k` is" if k in (0, -1, math.inf) else "`midpoint` is"):
        sigmoid_annealing(k, midpoint)
