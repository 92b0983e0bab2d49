"""The ridge probe against scikit-learn's, from whole arrays, from sums and by folds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tl_callbacks.probing import (
    Moments,
    fit_ridge,
    held_out_ridge,
    ridge_probe,
    ridge_probes,
    shuffled_labels,
    stratified_folds,
)
from tl_callbacks.probing.linear_probe import r_squared, solve_ridge
from tl_callbacks.probing.scores import classes_of, moments_of_folds, score

PATH = list(np.logspace(-3, 5, 29))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data), torch.tensor(data.target)


def blobs(n: int, d: int, classes: int = 3, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = apart * torch.randn(classes, d, generator=generator)
    return torch.randn(n, d, generator=generator) + centres[labels], labels


def oracle(model: Any, standardize: bool) -> Any:
    return make_pipeline(StandardScaler(), model) if standardize else model


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("penalty", [0.1, 10.0, 1000.0])
def test_digits_are_classified_as_by_scikit_learn(penalty: float, standardize: bool) -> None:
    x, labels = digits()
    probe = fit_ridge(Moments.of(x[:1200], labels[:1200]), [penalty], standardize=standardize)
    theirs = oracle(RidgeClassifier(penalty), standardize).fit(x[:1200].numpy(), labels[:1200].numpy())
    assert (probe.predict(x[1200:]).numpy() == theirs.predict(x[1200:].numpy())).all()
    np.testing.assert_allclose(2 * probe.scores(x).numpy() - 1, theirs.decision_function(x.numpy()), atol=1e-10)
    other = fit_ridge(Moments.of(x[:1200], labels[:1200]), [penalty * 3], standardize=standardize)
    assert np.abs(2 * other.scores(x).numpy() - 1 - theirs.decision_function(x.numpy())).max() > 1e-3


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 80), (80, 80)])
def test_regression_and_two_classes_too(n: int, d: int) -> None:
    x, labels = blobs(n, d, classes=2)
    target = x[:, 0] * 3 + 500
    both = {"class": labels, "value": target}
    probe = fit_ridge(Moments(d, classes_of(both)).update(x, both), [7.0])
    theirs = oracle(Ridge(7.0), True).fit(x.double().numpy(), target.double().numpy())
    np.testing.assert_allclose(probe.predict(x, "value").numpy(), theirs.predict(x.double().numpy()), rtol=1e-9)
    classifier = oracle(RidgeClassifier(7.0), True).fit(x.double().numpy(), labels.numpy())
    assert (probe.predict(x, "class").numpy() == classifier.predict(x.double().numpy())).all()


@pytest.mark.parametrize("case", ["digits", "few rows", "wide"])
def test_gcv_is_within_a_point_of_scikit_learns(case: str) -> None:
    x, labels = {
        "digits": digits,
        "few rows": lambda: blobs(600, 250, apart=0.15),
        "wide": lambda: blobs(600, 500, apart=0.12),
    }[case]()
    train = len(x) // 2
    probe = fit_ridge(Moments.of(x[:train], labels[:train]), PATH)
    theirs = oracle(RidgeClassifierCV(PATH), True).fit(x[:train].numpy(), labels[:train].numpy())
    ours = float((probe.predict(x[train:]) == labels[train:]).double().mean())
    assert abs(ours - theirs.score(x[train:].numpy(), labels[train:].numpy())) <= 0.01
    assert np.isclose(probe.penalties["task"], PATH).any()
    worst = min(
        float(
            (fit_ridge(Moments.of(x[:train], labels[:train]), [p]).predict(x[train:]) == labels[train:]).double().mean()
        )
        for p in (PATH[0], PATH[-1])
    )
    assert worst < ours - 0.001, "the control: the choice matters"


@pytest.mark.parametrize(("n", "d"), [(60, 10), (40, 100)])
def test_gcv_is_the_formula(n: int, d: int) -> None:
    x, labels = blobs(n, d)
    x = x.double()
    z = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    code = torch.eye(3, dtype=torch.float64)[labels]
    for penalty in (0.5, 50.0):
        hat = z @ torch.linalg.solve(z.T @ z + penalty * torch.eye(d), z.T) + 1 / n
        expected = (code - hat @ code).square().sum() / n / (1 - hat.trace() / n) ** 2
        assert fit_ridge(Moments.of(x, labels), [penalty]).gcv["task"] == pytest.approx(float(expected), rel=1e-9)


def test_label_sets_do_not_touch_each_other() -> None:
    x, labels = digits()
    sets = {"task": labels, "shuffled": labels.flip(0), "sum": x.sum(dim=1)}
    together = fit_ridge(Moments(64, classes_of(sets)).update(x, sets))
    for name, values in sets.items():
        alone = fit_ridge(Moments(64, classes_of({name: values})).update(x, {name: values}))
        torch.testing.assert_close(together.weights[name], alone.weights[name], rtol=1e-9, atol=1e-12)
    assert together.penalties["shuffled"] > 10 * together.penalties["task"]


def test_one_penalty_is_solved_as_by_the_path() -> None:
    x, labels = digits()
    sums = Moments.of(x, labels).centred()
    by_path, solved = fit_ridge(sums, [3.0]), solve_ridge(sums, {"task": 3.0}, sums.spreads())
    torch.testing.assert_close(solved.weights["task"], by_path.weights["task"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(solved.biases["task"], by_path.biases["task"], rtol=1e-8, atol=1e-12)


def test_scores_of_held_out_rows_are_those_of_fits_without_their_fold() -> None:
    x, labels = digits()
    fold = stratified_folds(labels, 5)
    parts = moments_of_folds(x, {"task": labels}, fold, 5, {"task": 10})
    found = held_out_ridge(parts, x, fold, [20.0], standardize=False)["task"]
    for number in range(5):
        theirs = RidgeClassifier(20.0).fit(x[fold != number].numpy(), labels[fold != number].numpy())
        expected = theirs.decision_function(x[fold == number].numpy())
        np.testing.assert_allclose(2 * found[fold == number].numpy() - 1, expected, atol=1e-9)
    seen = fit_ridge(Moments.of(x, labels), [20.0], standardize=False).scores(x)
    assert (seen - found).abs().max() > 1e-3, "the control: fits with the fold differ"


def test_held_out_scores_need_only_the_rows_of_a_rank() -> None:
    x, labels = digits()
    fold = stratified_folds(labels, 5)
    parts = moments_of_folds(x, {"task": labels}, fold, 5, {"task": 10})
    whole, half = held_out_ridge(parts, x, fold)["task"], held_out_ridge(parts, x[:900], fold[:900])["task"]
    torch.testing.assert_close(half, whole[:900], rtol=1e-12, atol=1e-12)


def test_accuracy_of_the_digits_with_its_control() -> None:
    x, labels = digits()
    fold = stratified_folds(labels, 5)
    controls = {f"shuffled {seed}": shuffled_labels(labels, fold, seed=seed) for seed in range(5)}
    found = ridge_probes(x, {"task": labels, **controls})
    assert 0.92 < found["task"].value < 0.95
    assert found["task"].error == pytest.approx(math.sqrt(0.934 * 0.066 / 1797), rel=0.02)
    for name in controls:
        assert abs(found[name].value - 0.1) < 4 * found[name].error
    train, test = x[:1200], x[1200:]
    split = ridge_probe(train, labels[:1200], test=(test, labels[1200:]), penalties=[30.0])
    theirs = oracle(RidgeClassifier(30.0), True).fit(train.numpy(), labels[:1200].numpy())
    assert split.value == pytest.approx(theirs.score(test.numpy(), labels[1200:].numpy()))


def test_shuffling_across_folds_would_score_below_chance() -> None:
    """Why labels are shuffled within folds: without signal, the majority of the rest is the minority of the fold."""
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * 0
    labels = torch.arange(200) % 2
    fold = stratified_folds(labels, 10)
    within, across = [], []
    for seed in range(20):
        parts = {
            "within": shuffled_labels(labels, fold, seed=seed),
            "across": shuffled_labels(labels, fold * 0, seed=seed),
        }
        moments = moments_of_folds(x, parts, fold, 10, {"within": 2, "across": 2})
        found = held_out_ridge(moments, x, fold)
        within.append(score(found["within"], parts["within"], 2).value)
        across.append(score(found["across"], parts["across"], 2).value)
    assert np.mean(within) == 0.5
    assert np.mean(across) < 0.45


def test_r_squared_is_scikit_learns_from_features_and_from_sums() -> None:
    x, labels = blobs(300, 8)
    target = (x @ torch.arange(8.0) + labels * 5 + torch.randn(300)).double() + 1000
    probe = fit_ridge(Moments.of(x[:200], target[:200]), [5.0])
    theirs = oracle(Ridge(5.0), True).fit(x[:200].double().numpy(), target[:200].numpy())
    expected = r2_score(target[200:].numpy(), theirs.predict(x[200:].double().numpy()))
    found = ridge_probe(x[:200], target[:200], test=(x[200:], target[200:]), penalties=[5.0])
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert r_squared(probe, Moments.of(x[200:], target[200:])) == pytest.approx(expected, rel=1e-9)
    assert abs(r_squared(probe, Moments.of(x[:200], target[:200])) - expected) > 1e-3


@pytest.mark.parametrize("kind", ["accuracy", "r2"])
def test_standard_errors_are_those_of_the_bootstrap(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "accuracy":
        scores, truth, classes = torch.randn(400, 3, generator=generator), torch.arange(400) % 3, 3
    else:
        truth = torch.randn(400, generator=generator)
        scores, classes = (truth + torch.randn(400, generator=generator)).unsqueeze(1), None
    found = score(scores, truth, classes)
    rows = torch.randint(0, 400, (2000, 400), generator=generator)
    values = [score(scores[r], truth[r], classes).value for r in rows]
    assert found.error == pytest.approx(np.std(values), rel=0.08)


def test_probes_do_not_change_with_scale_shift_or_order() -> None:
    x, labels = digits()
    expected = ridge_probe(x, labels)
    generator = torch.Generator().manual_seed(0)
    scaled = x * (torch.rand(64, generator=generator) + 0.5) + torch.randn(64, generator=generator) * 100
    assert ridge_probe(scaled, labels) == expected
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    fits = [fit_ridge(Moments.of(f, labels), [9.0], standardize=False).scores(f) for f in (x, x @ rotation)]
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-9, atol=1e-9)
    order = torch.randperm(1797, generator=generator)
    weights = [fit_ridge(Moments.of(x[o], labels[o])).weights["task"] for o in (order, slice(None))]
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rows", range(5))
@pytest.mark.parametrize("kind", ["classes", "values"])
def test_few_rows_give_a_score_or_nan_and_no_error(rows: int, kind: str) -> None:
    x, labels = digits()
    found = ridge_probe(x[:rows], labels[:rows] if kind == "classes" else x[:rows, 20].clone())
    assert found.rows == rows
    assert rows == 0 or kind == "values" or 0 <= found.value <= 1
    assert rows != 0 or math.isnan(found.value)


def test_features_that_tell_nothing() -> None:
    labels = torch.arange(90) % 3
    constant = ridge_probe(torch.full((90, 4), 7.3), labels)
    assert constant.value == pytest.approx(1 / 3)
    assert math.isnan(ridge_probe(torch.randn(9, 2), torch.ones(9)).value), "no variance to explain"
    x, _ = blobs(90, 4)
    x[:, 2] = 1 / 3  # float32, constant up to nothing, but not in float64 sums
    probe = fit_ridge(Moments.of(x, labels))
    assert probe.weights["task"][:, 2].abs().max() < 1e-6 < probe.weights["task"][:, 0].abs().max()


def test_a_feature_that_is_alive_in_one_fold_only() -> None:
    x, labels = blobs(100, 6)
    fold = stratified_folds(labels, 5)
    x[:, 5] = torch.where(fold == 3, torch.randn(100), 0)
    scores = held_out_ridge(moments_of_folds(x, {"task": labels}, fold, 5, {"task": 3}), x, fold)["task"]
    assert scores.abs().max() < 3


def test_a_class_without_rows_is_never_predicted() -> None:
    x, labels = digits()
    kept = (labels != 4).nonzero().flatten()[:800]
    moments = Moments(64, {"task": 10}).update(x[kept], labels[kept])
    predicted = fit_ridge(moments).predict(x)
    assert not (predicted == 4).any()
    theirs = oracle(RidgeClassifier(11.0), True).fit(x[kept].numpy(), labels[kept].numpy()).predict(x.numpy())
    assert (fit_ridge(moments, [11.0]).predict(x).numpy() == theirs).all()
    assert ridge_probe(x[kept], labels[kept], test=(x, labels)).rows == 1797


def test_low_precision_and_rows_that_are_not_finite() -> None:
    x, labels = digits()
    assert ridge_probe(x.bfloat16(), labels).value == ridge_probe(x, labels).value, "0 to 16 are exact in bfloat16"
    x[3, 3] = torch.inf
    assert ridge_probe(x, labels).rows == 1796


def test_more_features_than_rows_interpolate_only_where_gcv_says_so() -> None:
    x, labels = blobs(60, 500)
    found = ridge_probe(x, labels)
    assert found.value > 0.9
    control = ridge_probe(x, shuffled_labels(labels, stratified_folds(labels, 5)))
    assert control.value < 0.55


def test_errors() -> None:
    x, labels = digits()
    with pytest.raises(ValueError, match="folds is 1; expected 2 or more"):
        ridge_probe(x, labels, folds=1)
    with pytest.raises(ValueError, match="expected at least one, each above 0"):
        ridge_probe(x, labels, penalties=[])
    with pytest.raises(ValueError, match="each above 0"):
        ridge_probe(x, labels, penalties=[0.0, 1.0])
