"""The operations, against formulas in float64."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tl_callbacks.anchoring import distance, half_life, penalty_gradient, pull_
from tl_callbacks.anchoring.operations.pulls import PIECE, pieces


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


SHAPES = {
    "small": (5, 3), "scalar": (), "empty": (0, 4), "vector": (PIECE + 7,), "matrix": (700, 1001),
    "long rows": (3, PIECE + 5), "experts": (2, 3, PIECE // 2 + 1),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_small_and_cover_every_element_once(shape: str) -> None:
    size = SHAPES[shape]
    for tensor in (torch.zeros(size), torch.zeros(size[::-1]).permute(tuple(reversed(range(len(size)))))):
        assert tensor.shape == size
        for piece, other in pieces(tensor, torch.ones_like(tensor)):
            assert piece.numel() <= PIECE
            piece += other
        assert bool((tensor == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_reference_of_another_dtype_does_what_its_cast_does(shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for turned in (False, True):
        p, reference = torch.randn(SHAPES[shape]), torch.randn(SHAPES[shape]).to(dtype)
        if turned and p.ndim:
            p, reference = p.transpose(0, -1), reference.transpose(0, -1)
        whole = reference.float()
        assert torch.equal(penalty_gradient(p, reference, 0.3), (p - whole).mul_(0.6))
        assert distance([(p, reference)]) == pytest.approx(float((p - whole).double().norm()), rel=1e-12)
        expected = p.clone().lerp_(whole, 0.3)
        pulled = pull_(p.clone(), reference, 0.3)
        assert torch.equal(pulled, expected)
        assert not p.numel() or not torch.equal(pulled, p)


def test_no_temporary_is_as_large_as_the_parameter() -> None:
    p, sizes = torch.randn(3000, 700), []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
                sizes.append(out.numel())
            return out

    for reference in (torch.randn(3000, 700).bfloat16(), torch.randn(3000, 700)):
        for operation in (lambda r: pull_(p, r, 0.1), lambda r: distance([(p, r)])):
            sizes.clear()
            with Watched():
                operation(reference)
            assert max(sizes, default=0) <= PIECE
    with Watched():
        sizes.clear()
        penalty_gradient(p, torch.randn(3000, 700).bfloat16(), 0.1)
    assert p.numel() in sizes, "the control: the gradient itself is as large"
