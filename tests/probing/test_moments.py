"""Sums against the arrays they were made of: whatever the batches, the order of merging and the ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.forked import Ranks
from tests.probing import merge_worker
from tl_callbacks.probing import RandomProjection
from tl_callbacks.probing.moments import CHUNK, Moments, all_reduce_, pack, unpack_
from tl_callbacks.probing.sums import Centred, spectrum

SETS = {"task": 3, "value": None}


def some(rows: int = 700, offset: float = 40) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 12) + offset
    return x, {"task": torch.randint(0, 3, (rows,), generator=generator), "value": x[:, 0] * 2 + 100}


def counted(x: Tensor, labels: dict[str, Tensor], rows: Any = slice(None)) -> Moments:
    return Moments(x.shape[1], SETS).update(x[rows], {name: values[rows] for name, values in labels.items()})


def numbers(sums: Centred) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for field in dataclasses.fields(sums):
        value = getattr(sums, field.name)
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{field.name} {name}": torch.as_tensor(part) for name, part in parts.items() if part is not None}
    return flat


def assert_equal(one: Moments | Centred, other: Moments | Centred, tolerance: float = 1e-12) -> None:
    sides = [numbers(side.centred() if isinstance(side, Moments) else side) for side in (one, other)]
    assert sides[0].keys() == sides[1].keys()
    for name, expected in sides[1].items():
        scale = float(expected.double().abs().max())
        torch.testing.assert_close(sides[0][name], expected, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("offset", [0.0, 40.0, 1e4])
def test_the_sums_are_those_of_the_arrays(offset: float) -> None:
    x, labels = some(offset=offset)
    sums = counted(x, labels).centred()
    centred, code = x - x.mean(dim=0), torch.eye(3, dtype=torch.float64)[labels["task"]]
    tolerance: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-9}
    torch.testing.assert_close(sums.mean, x.mean(dim=0), **tolerance)
    torch.testing.assert_close(sums.scatter, centred.T @ centred, **tolerance)
    torch.testing.assert_close(sums.fourth, centred.square().sum(dim=1).square().sum(), **tolerance)
    torch.testing.assert_close(sums.unit_sum, (x / x.norm(dim=1, keepdim=True)).sum(dim=0), **tolerance)
    torch.testing.assert_close(sums.cross["task"], (code - code.mean(dim=0)).T @ centred, **tolerance)
    value = labels["value"] - labels["value"].mean()
    torch.testing.assert_close(sums.cross["value"], value.unsqueeze(0) @ centred, **tolerance)
    torch.testing.assert_close(sums.label_square["value"], value.square().sum().view(1), **tolerance)
    assert torch.equal(sums.class_counts("task"), torch.bincount(labels["task"]).double())
    means = torch.stack([centred[labels["task"] == c].mean(dim=0) for c in range(3)])
    torch.testing.assert_close(sums.class_means("task"), means, **tolerance)


def test_the_mean_cancels_without_a_pilot() -> None:
    """The control: what centring at the end would do to features far from zero."""
    x, _ = some(offset=1e7)
    truth = (x - x.mean(dim=0)).T @ (x - x.mean(dim=0))
    late = x.T @ x - len(x) * torch.outer(x.mean(dim=0), x.mean(dim=0))
    early = Moments.of(x).centred().scatter
    assert (early - truth).abs().max() < 1e-6 < 1 < (late - truth).abs().max()


@pytest.mark.parametrize("sizes", [[1], [3, 0, 250], [256], [1000], [7, 1, 511]])
def test_sums_are_the_same_bits_whatever_the_batches(sizes: list[int]) -> None:
    x, labels = some()
    expected, found = counted(x, labels), Moments(12, SETS)
    start = number = 0
    while start < len(x):
        stop = min(start + sizes[number % len(sizes)], len(x))
        found.update(x[start:stop], {name: values[start:stop] for name, values in labels.items()})
        start, number = stop, number + 1
    assert torch.equal(pack([found]), pack([expected]))


def test_parts_merge_about_whatever_pilots() -> None:
    x, labels = some()
    x[:300] -= 35  # pilots far apart
    bounds = [slice(0, 0), slice(0, 2), slice(2, 300), slice(300, 700)]
    for order in (bounds, bounds[::-1]):
        merged = Moments(12, SETS)
        for rows in order:
            merged.merge(counted(x, labels, rows))
        assert_equal(merged, counted(x, labels))
    assert merged.n == 700


def test_rows_may_follow_a_merge() -> None:
    x, labels = some()
    merged = Moments(12, SETS).merge(counted(x, labels, slice(0, 100)))
    merged.update(x[100:], {name: values[100:] for name, values in labels.items()})
    assert_equal(merged, counted(x, labels))


def test_a_fold_can_be_taken_out() -> None:
    x, labels = some()
    fold = torch.arange(700) % 5 == 2
    whole = counted(x, labels)
    assert_equal(whole.minus(counted(x, labels, fold)), counted(x, labels, ~fold), 1e-11)
    assert_equal(whole, counted(x, labels))
    assert whole.minus(whole).n == 0


def test_moving_the_pilot_and_back_changes_rounding_only() -> None:
    x, labels = some()
    moments = counted(x, labels)
    moments._flush()
    away = torch.linspace(-9, 9, 12, dtype=torch.float64)
    there = moments._about(moments._pilots[0] + away, moments._pilots[1] + 3)  # type: ignore[index]
    back = there.moved(away, torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(back.flat, moments._flush().flat, rtol=1e-11, atol=1e-8)
    assert (there.flat - back.flat).abs().max() > 100


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x, labels = some()
    x[5, 3], x[400, 0] = torch.nan, -torch.inf
    good = x.isfinite().all(dim=1)
    moments = counted(x, labels)
    assert (moments.n, moments.skipped) == (698, 2)
    assert_equal(moments, counted(x, labels, good))
    nothing = Moments(2).update(torch.full((3, 2), torch.nan))
    assert (nothing.n, nothing.skipped) == (0, 3)
    assert nothing.update(torch.ones(4, 2)).centred().mean.tolist() == [1, 1]


def test_low_precision_is_summed_in_float64() -> None:
    x, labels = some()
    low = x.to(torch.bfloat16)
    assert_equal(counted(low, labels), counted(low.double(), labels), 0)


def test_what_is_given_is_not_kept() -> None:
    x, labels = some(10)
    moments, before = counted(x, labels), counted(x, labels).centred()
    x.zero_()
    assert_equal(moments, before, 0)
    grown = torch.randn(4, 3, requires_grad=True)
    assert not pack([Moments.of(grown)]).requires_grad


@pytest.mark.parametrize("rows", range(4))
def test_few_rows(rows: int) -> None:
    x, labels = some(rows)
    sums = counted(x, labels).centred()
    assert sums.n == rows
    assert all(part.isfinite().all() for part in numbers(sums).values())


def test_memory_does_not_grow_with_rows() -> None:
    moments = Moments(12, SETS)
    sizes = set()
    for _ in range(3):
        x, labels = some(1000)
        moments.update(x, labels)
        sizes.add(sum(v.numel() for v in vars(moments).values() if isinstance(v, Tensor)) + len(pack([moments])))
    assert len(sizes) == 1
    assert max(sizes) < 12 * 12 + CHUNK * (12 + 2) + 12 * 10 + 40


def test_packing_and_unpacking() -> None:
    x, labels = some()
    layers = [counted(x, labels), Moments.of(x[:, :3])]
    flat = pack(layers)
    before = layers[0].centred()
    unpack_(layers, 2 * flat)
    assert layers[0].n == 1400
    unpack_(layers, flat)
    assert_equal(layers[0], before, 0)
    assert len(pack([])) == 0


def test_one_process_is_left_alone() -> None:
    x, labels = some()
    moments = counted(x, labels)
    before = pack([moments])
    all_reduce_([moments])
    assert torch.equal(pack([moments]), before)


@pytest.mark.distributed
@pytest.mark.parametrize("shares", ["equal", "all at the last"])
def test_ranks_have_the_sums_of_one_process(shares: str, tmp_path: Path) -> None:
    ranks = Ranks(merge_worker.count, tmp_path, shares, log=tmp_path / "log", ranks=2)
    assert ranks.wait() == [0, 0], (tmp_path / "log").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert torch.equal(found[0][0], found[1][0]), "bit for bit the same on each rank"
    x, labels = merge_worker.rows()
    for layer, width in enumerate((12, 5)):
        assert_equal(found[0][1][layer], counted(x[:, :width], labels), 1e-12)


def test_the_projection_is_fixed_and_keeps_lengths() -> None:
    state = torch.get_rng_state()
    projection = RandomProjection(2000, 400, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    x = torch.randn(50, 2000, generator=torch.Generator().manual_seed(1))
    found = projection(x)
    assert torch.equal(found, RandomProjection(2000, 400, seed=3)(x))
    assert not torch.allclose(found, RandomProjection(2000, 400, seed=4)(x))
    ratios = (torch.pdist(found) / torch.pdist(x.double())).numpy()
    assert np.abs(ratios - 1).max() < 5 * np.sqrt(1 / 800)
    torch.testing.assert_close(torch.cat([projection(x[:7]), projection(x[7:])]), found, rtol=1e-12, atol=1e-12)


def test_a_spectrum_that_is_not_finite_is_nan() -> None:
    values, vectors = spectrum(torch.full((2, 2), torch.nan, dtype=torch.float64))
    assert values.isnan().all()
    assert vectors.isnan().all()


def test_errors() -> None:
    moments = Moments(2, {"task": 3})
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"features have shape \(2, 3\); expected \(rows, 2\)"):
        moments.update(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels 'task' hold class 3; expected 0 to 2"):
        moments.update(x, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="labels 'task' hold class -100"):
        moments.update(x, torch.tensor([-100, 2]))
    with pytest.raises(ValueError, match=r"labels were given for \[\]; expected the label sets \['task'\]"):
        moments.update(x)
    with pytest.raises(ValueError, match="labels were given as one tensor"):
        Moments(2, SETS).update(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels 'task' have shape \(3,\)"):
        moments.update(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="labels 'value' are not all finite"):
        Moments(2, {"value": None}).update(x, torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="do not add up"):
        moments.merge(Moments(2))
    with pytest.raises(ValueError, match="width is 0"):
        Moments(0)
    with pytest.raises(ValueError, match="has 0 classes"):
        Moments(2, {"task": 0})
    with pytest.raises(ValueError, match="size is 5; expected 1 to 4"):
        RandomProjection(4, 5)
    with pytest.raises(ValueError, match=r"expected \(rows, 4\)"):
        RandomProjection(4, 2)(torch.ones(2, 3))
    assert moments.n == 0, "what was refused is not counted"
