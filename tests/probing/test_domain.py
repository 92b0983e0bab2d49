"""Distances between data sets: values on digits, nulls that hold, and the edges."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from tests.probing.references import sample
from tl_callbacks.probing.domain import domain_distance, mmd2, proxy_a_distance
from tl_callbacks.probing.gaussian_distances import coral, frechet
from tl_callbacks.probing.two_samples import Distance

MEASURES = {"mmd2": mmd2, "pad": proxy_a_distance, "frechet": frechet, "coral": coral}
LAST = {"mmd2": {"permutations": 39}, "pad": {"permutations": 39}, "frechet": {"splits": 39}, "coral": {"splits": 39}}


@cache
def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Three pairs of sets of digits: other classes, random halves, and halves of which one has noise added."""
    data = load_digits()
    x, classes = torch.from_numpy(data.data) / 16, torch.from_numpy(data.target)
    rng = np.random.default_rng(0)
    order = torch.from_numpy(rng.permutation(len(x)))
    one, two = x[order[:900]], x[order[900:]]
    noise = torch.from_numpy(rng.standard_normal(two.shape)) / 4
    return {"classes": (x[classes < 5], x[classes >= 5]), "halves": (one, two), "noise": (one, two + noise)}


VALUES = {
    "classes": {"mmd2": 0.057049, "frechet": 2.088148, "coral": 1.303e-4, "pad": 1.568},
    "halves": {"mmd2": -0.000219, "frechet": 0.064219, "coral": 2.48e-6, "pad": -0.050},
    "noise": {"mmd2": 0.035116, "frechet": 1.859304, "coral": 2.23e-5, "pad": 0.058},
}
TOLERANCES = {"mmd2": 1e-6, "frechet": 1e-6, "coral": 5e-8, "pad": 0.06}  # the folds of pad are random


@pytest.mark.parametrize("name", VALUES)
def test_the_values_on_digits(name: str) -> None:
    found = domain_distance(*pairs()[name])["features"]
    assert set(found) == set(VALUES[name])
    for measure, value in VALUES[name].items():
        assert found[measure].estimate == pytest.approx(value, abs=TOLERANCES[measure]), measure
    p = {measure: distance.p_value for measure, distance in found.items()}
    if name == "halves":
        assert min(p.values()) > 0.2, "one distribution"
        assert abs(found["frechet"].excess) < 0.02 < found["frechet"].null_mean
    else:
        assert max(p[measure] for measure in ("mmd2", "frechet", "coral")) < 0.05
        assert found["mmd2"].p_value == pytest.approx(1 / 201)
        assert (p["pad"] < 0.01) == (name == "classes"), "a linear classifier is blind to a change of variance alone"


@pytest.mark.parametrize("name", VALUES)
def test_the_proxy_a_distance_is_near_that_of_scikit_learns_classifier(name: str) -> None:
    x, y = pairs()[name]
    rows, labels = torch.cat([x, y]).numpy(), np.repeat([0, 1], [len(x), len(y)])
    theirs = []
    for seed in range(3):
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        predicted = cross_val_predict(model, rows, labels, cv=StratifiedKFold(5, shuffle=True, random_state=seed))
        theirs.append(2 * (1 - 2 * (1 - balanced_accuracy_score(labels, predicted))))
    mine = [proxy_a_distance(x, y, permutations=0, seed=seed).estimate for seed in range(3)]
    assert np.mean(mine) == pytest.approx(np.mean(theirs), abs=0.04)


@pytest.mark.parametrize(("sizes", "width"), [((60, 25), 8), ((40, 30), 150), ((3, 2), 4), ((50, 50), 40)])
def test_the_proxy_a_distance_is_that_of_a_loop_over_its_folds(sizes: tuple[int, int], width: int) -> None:
    """With scikit-learn's covariance, and errors that are counted one by one."""
    for seed in range(6):
        x, y = sample(sizes[0], width, seed=seed), sample(sizes[1], width, seed=seed + 50) * 1.2 + 0.3 * (seed % 3)
        z, of_y = torch.cat([x, y]).numpy(), np.repeat([False, True], sizes)
        wrong = np.zeros(2)
        for test in torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).tensor_split(5):
            train = np.setdiff1d(np.arange(len(z)), test.numpy())
            rows, mean = z[train], z[train].mean(0)
            if len(set(of_y[train])) == 1:
                wrong[0] += (~of_y[test.numpy()]).sum()  # nothing learned: all are taken for the second set's
                continue
            one, two = rows[~of_y[train]].mean(0), rows[of_y[train]].mean(0)
            covariance = LedoitWolf(assume_centered=True).fit(rows - mean).covariance_
            direction = np.linalg.solve(covariance + 1e-12 * np.eye(width), one - two)
            for row in test.tolist():
                guess = (z[row] - (one + two) / 2) @ direction <= 0
                wrong[int(of_y[row])] += guess != of_y[row]
        expected = 2 * (1 - (wrong / sizes).sum())
        assert proxy_a_distance(x, y, permutations=0, seed=seed).estimate == pytest.approx(expected, abs=1e-12), seed


def test_the_scale_of_mmd_where_most_pairs_are_equal() -> None:
    x, y = torch.zeros(20, 1), torch.zeros(18, 1)
    x[:2], y[:3] = torch.tensor([[1.0], [4.0]]), torch.tensor([[1.0], [2.0], [7.0]])
    z = torch.cat([x, y]).double()
    squares = torch.pdist(z).square()
    assert squares.median() == 0 < squares[squares > 0].median() != squares[squares > 0].mean()
    k = torch.exp(-torch.cdist(z, z).square() / squares[squares > 0].median())
    within = (k[:20, :20].sum() - 20) / 380 + (k[20:, 20:].sum() - 18) / 306
    found = mmd2(x, y, permutations=0).estimate
    assert found == pytest.approx(float(within - 2 * k[:20, 20:].mean()), abs=1e-12)


def test_what_is_asked_for_reaches_each_measure() -> None:
    x, y = sample(40, 3), sample(30, 3, seed=1) + 0.5
    found = domain_distance(x, y, permutations=11, splits=7, max_rows=20, seed=3)["features"]
    assert found["mmd2"] == mmd2(x, y, permutations=11, max_rows=20, seed=3)
    assert found["pad"] == proxy_a_distance(x, y, permutations=11, seed=3)
    assert found["frechet"] == frechet(x, y, splits=7, seed=3)
    assert found["coral"] == coral(x, y, splits=7, seed=3)
    assert found["mmd2"] != mmd2(x, y, permutations=11, seed=3), "the control"


@pytest.mark.parametrize("measure", MEASURES)
def test_a_large_mean_takes_nothing_away(measure: str) -> None:
    x, y = sample(30, 4), sample(25, 4, seed=1) + 0.5
    far = MEASURES[measure](x + 1e7, y + 1e7)
    assert far.estimate == pytest.approx(MEASURES[measure](x, y).estimate, abs=1e-6)


def test_frechet_of_a_set_with_itself_is_not_negative() -> None:
    assert min(frechet(sample(30, 9, seed=s), sample(30, 9, seed=s), splits=0).estimate for s in range(20)) == 0


def test_the_formulas_in_another_form() -> None:
    x, y = sample(40, 3), sample(30, 3, seed=1) * 1.5 + 0.3
    s, t = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root
    assert frechet(x, y, splits=0).estimate == pytest.approx(float(expected), abs=1e-10)
    assert coral(x, y, splits=0).estimate == pytest.approx(float((s - t).square().sum() / 36), abs=1e-12)
    z = torch.cat([x, y])
    scale = torch.pdist(z).square().median()
    k = [[torch.exp(-torch.cdist(a, b).square() / scale) for b in (x, y)] for a in (x, y)]
    expected = (k[0][0].sum() - 40) / (40 * 39) + (k[1][1].sum() - 30) / (30 * 29) - 2 * k[0][1].mean()
    assert mmd2(x, y, permutations=0).estimate == pytest.approx(float(expected), abs=1e-12)


def test_the_null_of_mmd_is_that_of_permuted_rows() -> None:
    x, y = sample(12, 3), sample(9, 3, seed=1)
    draws = mmd2(x, y, permutations=400).null
    rows = torch.cat([x, y])
    generator = torch.Generator().manual_seed(9)
    orders = [torch.randperm(21, generator=generator) for _ in range(400)]
    direct = torch.tensor([mmd2(rows[o[:12]], rows[o[12:]], permutations=0).estimate for o in orders])
    assert float(direct.mean()) == pytest.approx(float(torch.tensor(draws).mean()), abs=0.005)
    assert float(direct.std()) == pytest.approx(float(torch.tensor(draws).std()), rel=0.2)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("width", [20, 150])
def test_p_values_are_uniform_for_one_distribution_and_small_for_two(measure: str, width: int) -> None:
    distance, options = MEASURES[measure], LAST[measure]
    found = []
    for seed in range(40):
        rows = sample(50, width, seed=seed)
        found.append(distance(rows[:30], rows[30:], seed=seed, **options).p_value)
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) <= 0.1) < 0.3
    shifted = rows[30:] * 1.8 + (0.7 if measure != "coral" else 0)
    assert distance(rows[:30], shifted, **options).p_value <= 0.05, "the control"


def test_the_bias_of_frechet_is_in_its_null() -> None:
    for rows, bias in ((100, 21.9), (300, 7.2), (1000, 2.17)):
        found = frechet(sample(rows, 64), sample(rows, 64, seed=1), splits=4)
        assert found.estimate == pytest.approx(bias, rel=0.08)
        assert abs(found.excess) < 0.08 * bias


@pytest.mark.parametrize("measure", MEASURES)
def test_a_rotation_changes_nothing_and_neither_do_unused_dimensions(measure: str) -> None:
    x, y = sample(20, 6, offset=1e4), sample(15, 6, seed=1, offset=1e4) + 0.5
    rotation = torch.linalg.qr(sample(6, 6, seed=2)).Q
    expected = MEASURES[measure](x, y)
    turned = MEASURES[measure](x @ rotation, y @ rotation)
    assert turned.estimate == pytest.approx(expected.estimate, abs=1e-8)
    basis = torch.linalg.qr(sample(66, 66)).Q
    wider = [torch.nn.functional.pad(z, (0, 60)) @ basis for z in (x, y)]
    scale = (6 / 66) ** 2 if measure == "coral" else 1
    found = MEASURES[measure](*wider)
    # The covariance is shrunk towards the mean variance, which unused dimensions lower.
    tolerance = 0.3 if measure == "pad" else 1e-8
    assert found.estimate == pytest.approx(expected.estimate * scale, abs=tolerance)


@pytest.mark.parametrize("measure", MEASURES)
def test_edges(measure: str) -> None:
    distance = MEASURES[measure]
    state = torch.get_rng_state()
    x, y = sample(12, 40), sample(9, 40, seed=1) + 1
    assert math.isfinite(distance(x, y).estimate), "d > n"
    low = distance(x.bfloat16(), y.bfloat16())
    assert low.estimate == pytest.approx(distance(x.bfloat16().double(), y.bfloat16().double()).estimate, abs=1e-10)
    equal = distance(torch.full((9, 3), 0.1), torch.full((8, 3), 0.1))
    assert equal.estimate == pytest.approx(0, abs=1e-12)
    assert equal.p_value == 1
    apart = distance(torch.zeros(9, 3), torch.ones(8, 3))
    assert math.isfinite(apart.estimate)
    assert (apart.p_value < 0.05) == (measure != "coral"), "covariances do not see means"
    assert math.isfinite(distance(x[:2], y[:2]).estimate)
    for a, b in ((x[:1], y), (x, y[:0]), (x, y.clone().fill_(math.nan)), (x.clone().fill_(math.inf), y)):
        few = distance(a, b)
        assert math.isnan(few.estimate)
        assert math.isnan(few.p_value)
    assert str(few).startswith(f"{measure} nan")
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert distance(x, y, seed=1).null == distance(x, y, seed=1).null != distance(x, y, seed=2).null
    with pytest.raises(ValueError, match=r"shapes \(12, 40\) and \(9, 39\); expected \(n, d\) and"):
        distance(x, y[:, 1:])


def test_more_rows_than_the_most_are_drawn() -> None:
    x, y = sample(80, 3), sample(70, 3, seed=1) + 1
    found = mmd2(x, y, max_rows=50)
    assert found.estimate == mmd2(x, y, max_rows=50).estimate != mmd2(x, y, max_rows=50, seed=1).estimate
    assert found.estimate == pytest.approx(mmd2(x, y).estimate, abs=0.1)
    assert mmd2(x, y, max_rows=80).estimate == pytest.approx(mmd2(x, y).estimate, abs=1e-12)
    assert mmd2(x, y, max_rows=79).estimate != pytest.approx(mmd2(x, y).estimate, abs=1e-9)


def test_layers_are_told_apart_in_the_table() -> None:
    x = {"low": sample(30, 3), "high": sample(30, 5)}
    y = {"low": sample(25, 3, seed=1), "high": sample(25, 5, seed=1) + 3}
    found = domain_distance(x, y, permutations=19, splits=19)
    assert found["low"]["mmd2"].p_value > 0.05 >= found["high"]["mmd2"].p_value
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "measure", "estimate", "null", "null", "95", "%", "p"]
    assert [line.split()[:2] for line in lines[1:]] == [[layer, measure] for layer in x for measure in MEASURES]
    assert lines[5].split()[2] == f"{found['high']['mmd2'].estimate:.3g}"
    with pytest.raises(ValueError, match=r"layers \['high', 'low'\] and \['low'\] differ"):
        domain_distance(x, {"low": y["low"]})


def test_what_a_distance_says_of_its_null() -> None:
    found = Distance("mmd2", 0.2, (0.1, 0.2, 0.3, 0.0))
    assert (found.null_mean, found.excess) == (pytest.approx(0.15), pytest.approx(0.05))
    assert found.p_value == 3 / 5
    assert found.null_high == pytest.approx(0.285)
    bare = Distance("mmd2", 0.2, ())
    values: list[Callable[[], float]] = [lambda: bare.null_mean, lambda: bare.null_high, lambda: bare.p_value]
    assert all(math.isnan(value()) for value in values)
