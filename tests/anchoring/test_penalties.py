"""The operations, against formulas in float64."""

import math

import pytest
import torch

from tl_callbacks.anchoring import distance, half_life, penalty_gradient, pull_


def test_pull_removes_the_share_of_the_distance() -> None:
    p, reference = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = p - 0.3 * (p - reference)
    before = p.clone()
    assert torch.allclose(pull_(p, reference, 0.3), expected, rtol=0, atol=1e-15)
    assert not torch.equal(p, before)
    again = p.clone()
    assert torch.equal(pull_(p, reference, 0.0), again)


def test_penalty_gradient_is_autograds() -> None:
    p = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64)
    (0.25 * (p - reference).square().sum()).backward()
    assert p.grad is not None
    assert torch.allclose(penalty_gradient(p.detach(), reference, 0.25), p.grad, rtol=0, atol=1e-15)
    assert float(p.grad.norm()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalty_gradient_is_zero_at_the_reference_in_any_precision(dtype: torch.dtype) -> None:
    p = torch.full((3,), 0.05, dtype=dtype)
    assert not penalty_gradient(p, p.clone(), 0.1).any()
    assert penalty_gradient(p, torch.zeros_like(p), 0.1).any()


@pytest.mark.parametrize("strength", [0.5, 0.1, 0.01, 1e-4])
def test_half_life_halves(strength: float) -> None:
    assert (1 - strength) ** half_life(strength) == pytest.approx(0.5)
    assert half_life(0.0) == math.inf


def test_distance_is_the_norm_of_everything_together() -> None:
    a, b = torch.randn(4, 4), torch.randn(6)
    expected = torch.cat([a.flatten(), b]).norm().item()
    assert distance([(a, torch.zeros(4, 4)), (b, torch.zeros(6))]) == pytest.approx(expected, rel=1e-6)
    assert distance([]) == 0.0
