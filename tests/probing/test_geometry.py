"""Ranks, anisotropy, collapse and neighbours: published values of the digits, definitions, and properties."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from tl_callbacks.probing import (
    Moments,
    geometry,
    intrinsic_dimension,
    knn_probe,
    nearest_centre_disagreement,
    neural_collapse,
)


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data), torch.tensor(data.target)


def simplex(classes: int, rows: int, noise: float) -> tuple[Tensor, Tensor]:
    """Rows about the corners of a simplex."""
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    labels = torch.arange(rows) % classes
    return corners[labels] + noise * torch.randn(rows, classes, dtype=torch.float64) + 5, labels


def test_the_values_of_the_digits() -> None:
    x, labels = digits()
    moments = Moments.of(x, labels)
    found = geometry(moments)
    assert found.rank_me == pytest.approx(29.629086, abs=1e-5)
    assert found.effective_rank == pytest.approx(20.553251, abs=1e-5)
    assert found.participation_ratio == pytest.approx(13.168511, abs=1e-5)
    assert found.mean_cosine == pytest.approx(0.688326, abs=1e-6)
    assert neural_collapse(moments).within == pytest.approx(0.926318, abs=1e-6)
    assert intrinsic_dimension(x) == pytest.approx(9.0493, abs=1e-4)


def test_ranks_are_their_definitions() -> None:
    x = torch.randn(60, 100) * torch.linspace(0.01, 2, 100) + 3
    found = geometry(Moments.of(x))
    about_mean = np.linalg.svd((x - x.mean(dim=0)).double().numpy(), compute_uv=False)[:-1] ** 2
    about_zero = np.linalg.svd(x.double().numpy(), compute_uv=False)
    for value, shares in (
        (found.effective_rank, about_mean / about_mean.sum()),
        (found.rank_me, about_zero / about_zero.sum()),
    ):
        assert value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert found.participation_ratio == pytest.approx(about_mean.sum() ** 2 / (about_mean**2).sum(), rel=1e-6)
    alike = cosine_similarity(x.numpy())
    assert found.mean_cosine == pytest.approx((alike.sum() - 60) / (60 * 59), abs=1e-6)


def test_ranks_do_not_change_with_turns_and_scale_and_grow_with_directions() -> None:
    x = torch.randn(500, 20, dtype=torch.float64) * torch.linspace(0.1, 1, 20)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    one, other = geometry(Moments.of(x)), geometry(Moments.of(3 * x @ rotation))
    assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(one), rel=1e-9)
    ranks = [geometry(Moments.of(x * (torch.arange(20) < kept))).effective_rank for kept in (1, 5, 20)]
    assert ranks[0] == pytest.approx(1)
    assert ranks == sorted(ranks)
    assert ranks[1] <= 5
    assert geometry(Moments.of(x + 10)).mean_cosine > 0.9 > 0.1 > abs(one.mean_cosine)


@pytest.mark.parametrize("rows", range(4))
@pytest.mark.parametrize("kind", ["random", "constant", "zero", "bfloat16"])
def test_few_and_constant_rows(rows: int, kind: str) -> None:
    x = {"constant": torch.ones(rows, 3), "zero": torch.zeros(rows, 3)}.get(kind, torch.randn(rows, 3))
    moments = Moments.of(x.bfloat16() if kind == "bfloat16" else x, torch.arange(rows) % 2)
    found = geometry(moments)
    assert math.isnan(found.mean_cosine) == (rows < 2 or kind == "zero")
    assert math.isnan(found.participation_ratio) == (rows < 2 or kind in ("constant", "zero"))
    assert math.isnan(neural_collapse(moments).norms) == (rows < 2 or kind in ("constant", "zero"))
    assert isinstance(intrinsic_dimension(x), float)


def test_collapse_falls_to_zero_as_classes_do() -> None:
    found = [neural_collapse(Moments.of(*simplex(4, 400, noise))) for noise in (1.0, 0.1, 0.0)]
    for field in ("within", "norms", "angles", "simplex"):
        values = [getattr(collapse, field) for collapse in found]
        assert values == sorted(values, reverse=True), field
        assert values[-1] == pytest.approx(0, abs=1e-9)
        assert values[0] > 0.01
    assert math.isnan(found[0].duality)


def test_collapse_is_its_definition() -> None:
    x, labels = digits()
    mean = x.mean(dim=0)
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(10)]) - mean
    residual = x - mean - means[labels]
    between = means.T @ means / 10
    expected = torch.trace(residual.T @ residual / 1797 @ torch.linalg.pinv(between, rcond=1e-10)) / 10
    head = torch.randn(10, 64, dtype=torch.float64)
    found = neural_collapse(Moments.of(x, labels), head=head)
    assert found.within == pytest.approx(float(expected), rel=1e-9)
    norms = means.norm(dim=1)
    assert found.norms == pytest.approx(float(norms.std(correction=0) / norms.mean()), rel=1e-9)
    cosines = torch.tensor([float(means[i] @ means[j] / norms[i] / norms[j]) for i in range(10) for j in range(i)])
    assert found.angles == pytest.approx(float(cosines.std(correction=0)), rel=1e-5)
    assert found.simplex == pytest.approx(float((cosines + 1 / 9).abs().mean()), rel=1e-5)
    assert found.duality == pytest.approx(float((head / head.norm() - means / means.norm()).norm()), rel=1e-9)
    assert neural_collapse(Moments.of(x, labels), head=means * 3).duality == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"head has shape \(64, 10\); expected \(10, 64\)"):
        neural_collapse(Moments.of(x, labels), head=head.T)


def test_a_class_without_rows_is_left_out() -> None:
    x, labels = digits()
    padded = neural_collapse(Moments(64, {"task": 12}).update(x, labels))
    assert dataclasses.astuple(padded)[:4] == pytest.approx(
        dataclasses.astuple(neural_collapse(Moments.of(x, labels)))[:4], rel=1e-9
    )
    assert math.isnan(neural_collapse(Moments.of(x, labels * 0)).within)
    assert nearest_centre_disagreement(x, labels, Moments(64, {"task": 12}).update(x, labels)) < 0.2


def test_nearest_centres_are_those_of_a_plain_search() -> None:
    x, labels = digits()
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(10)])
    nearest = (x.unsqueeze(1) - means).square().sum(dim=2).argmin(dim=1)
    assert nearest_centre_disagreement(x, nearest, Moments.of(x, labels)) == 0
    expected = float((nearest != labels).double().mean())
    assert nearest_centre_disagreement(x, labels, Moments.of(x, labels)) == pytest.approx(expected)
    assert expected > 0.05


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_neighbours_are_those_of_a_plain_loop(neighbours: int) -> None:
    x, labels = digits()
    x, labels = x[:700], labels[:700]  # more than one block
    alike = cosine_similarity(x.numpy())
    np.fill_diagonal(alike, -2)
    nearest = np.argsort(-alike, axis=1)[:, :neighbours]
    votes = np.array([np.bincount(labels.numpy()[row], minlength=10) for row in nearest])
    expected = float((votes.argmax(axis=1) == labels.numpy()).mean())
    assert knn_probe(x, labels, neighbours=neighbours).value == pytest.approx(expected, abs=0.003)
    assert knn_probe(x, labels[torch.randperm(700)], neighbours=neighbours).value < 0.2


def test_copies_are_no_neighbours() -> None:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(600) % 2
    found, once = (
        knn_probe(torch.cat([x, x]), torch.cat([labels, labels]), neighbours=1),
        knn_probe(x, labels, neighbours=1),
    )
    assert (found.value, found.error) == (pytest.approx(once.value), pytest.approx(once.error))
    assert found.value < 0.6
    assert knn_probe(torch.ones(8, 3), torch.arange(8) % 2, neighbours=3).value == 0.5, "none but copies"
    few = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert knn_probe(few, torch.tensor([0, 0, 0, 1]), neighbours=3).value == 0, "only the other one votes"
    near = torch.cat([x, x + 1e-3])
    assert knn_probe(near, torch.cat([labels, labels]), neighbours=1).value > 0.9, "the control"


def test_neighbours_of_few_rows() -> None:
    x = torch.randn(4, 3)
    assert math.isnan(knn_probe(x[:1], torch.tensor([0])).value)
    assert math.isnan(knn_probe(x[:0], torch.tensor([]).long()).value)
    assert knn_probe(x[:2], torch.tensor([0, 0])).value == 1
    x[1] = torch.nan
    assert knn_probe(x, torch.arange(4) % 2).rows == 3
    with pytest.raises(ValueError, match="neighbours is 0; expected 1 or more"):
        knn_probe(x, torch.arange(4), neighbours=0)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_intrinsic_dimension_of_a_plane_in_many(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.rand(2000, dimension, generator=generator, dtype=torch.float64)
    x = plane @ torch.randn(dimension, 50, generator=generator, dtype=torch.float64) + 1e4
    assert intrinsic_dimension(x) == pytest.approx(dimension, rel=0.1)
    doubled = torch.cat([x, x[:100]])
    assert intrinsic_dimension(doubled) == pytest.approx(dimension, rel=0.1), "duplicates are left out"
    assert math.isnan(intrinsic_dimension(torch.ones(10, 3)))
