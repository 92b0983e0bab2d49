"""The mix and its gradient against autograd of the formula, and over many draws."""

import pytest
import torch

from tl_callbacks.anchoring import mix_, mixed_gradient, mixout_mask


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator).double(), torch.randn(6, 5, generator=generator).double()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_weights_and_gradients_are_those_of_the_formula(probability: float) -> None:
    parameter, reference = pair()
    mask = mixout_mask(parameter, probability, seed=0, step=1, name="a")
    leaf = parameter.clone().requires_grad_()
    m, q = mask.double(), probability
    formula = ((1 - m) * leaf + m * reference - q * reference) / (1 - q)
    torch.sin(formula).sum().backward()
    mixed = mix_(parameter.clone(), reference, mask, probability)
    assert torch.allclose(mixed, formula.detach(), rtol=1e-13, atol=1e-13)
    assert torch.equal(mixed[mask], reference[mask])
    assert leaf.grad is not None
    assert torch.allclose(mixed_gradient(torch.cos(mixed), mask, probability), leaf.grad, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(mixed, parameter)


def test_the_mean_over_draws_is_the_parameter() -> None:
    parameter, reference = pair()
    draws, q = 20_000, 0.3
    mean, naive = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step in range(draws):
        mask = mixout_mask(parameter, q, seed=3, step=step, name="a")
        mean += mix_(parameter.clone(), reference, mask, q) / draws
        naive += torch.where(mask, reference, parameter) / draws
    # Each draw is off by (p - reference) * sqrt(q / (1 - q)); five standard errors.
    tolerance = 5 * float((parameter - reference).abs().max()) * (q / (1 - q) / draws) ** 0.5
    assert float((mean - parameter).abs().max()) < tolerance
    assert float((naive - parameter).abs().max()) > 10 * tolerance


def test_a_mask_depends_on_seed_step_and_name_and_moves_no_random_state() -> None:
    parameter = torch.empty(10_000)
    state = torch.get_rng_state()
    first = mixout_mask(parameter, 0.3, seed=1, step=2, name="a")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mixout_mask(parameter, 0.3, seed=1, step=2, name="a"), first)
    for others in ({"seed": 2, "step": 2, "name": "a"}, {"seed": 1, "step": 3, "name": "a"}):
        assert not torch.equal(mixout_mask(parameter, 0.3, **others), first)  # type: ignore[arg-type]
    other = mixout_mask(parameter, 0.3, seed=1, step=2, name="b")
    assert float((other & first).float().mean()) == pytest.approx(0.09, abs=0.01)
    assert float(first.float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_at_the_reference_nothing_changes_in_any_precision(dtype: torch.dtype) -> None:
    parameter = torch.randn(50).to(dtype)
    mask = mixout_mask(parameter, 0.5, seed=0, step=0, name="a")
    assert torch.equal(mix_(parameter.clone(), parameter, mask, 0.5), parameter)
    assert mixed_gradient(torch.ones_like(parameter), mask, 0.5).dtype == dtype
    assert mixed_gradient(torch.full_like(parameter, torch.inf), mask, 0.5).isfinite().sum() == 0
