"""The discriminant probe and the online code: scikit-learn, calibration, and what labels without signal cost."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from tl_callbacks.probing import Moments, fit_lda, fit_ridge, lda_probe, online_code, stratified_folds
from tl_callbacks.probing.discriminant import (
    calibration_error,
    fit_calibrated_lda,
    fit_temperature,
    held_out_logits,
)
from tl_callbacks.probing.scores import moments_of_folds


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data), torch.tensor(data.target)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
def test_probabilities_are_scikit_learns_at_equal_shrinkage(shrinkage: float) -> None:
    x, labels = digits()
    fitted = fit_lda(Moments.of(x[:1200], labels[:1200]), shrinkage=shrinkage, spread=torch.ones(64).double())
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x[:1200].numpy(), labels[:1200].numpy())
    np.testing.assert_allclose(fitted.probabilities(x).numpy(), theirs.predict_proba(x.numpy()), atol=1e-10)
    other = fit_lda(Moments.of(x[:1200], labels[:1200]), shrinkage=shrinkage * 0.9, spread=torch.ones(64).double())
    assert (other.probabilities(x) - fitted.probabilities(x)).abs().max() > 1e-3


def test_the_penalty_is_that_of_ridge_and_the_directions_too() -> None:
    x, labels = digits()
    moments = Moments.of(x, labels)
    penalty = fit_ridge(moments).penalties["task"]
    fitted = fit_lda(moments)
    torch.testing.assert_close(fitted.weights, fit_lda(moments, penalty=penalty).weights)
    both = torch.cat([fitted.weights, fit_ridge(moments).weights["task"]])
    assert torch.linalg.matrix_rank(fitted.weights, rtol=1e-9) == 9
    assert torch.linalg.matrix_rank(both, rtol=1e-9) == 9, "no direction of one is foreign to the other"
    other = torch.cat([fitted.weights, fit_ridge(moments, [penalty * 3]).weights["task"]])
    assert torch.linalg.matrix_rank(other, rtol=1e-9) > 9


def test_held_out_probabilities_are_calibrated_by_the_temperature() -> None:
    x, labels = digits()
    found = lda_probe(x, labels)
    assert found.value > 0.94
    assert found.calibration_error < 0.03
    fold = stratified_folds(labels, 5)
    parts = moments_of_folds(x, {"task": labels}, fold, 5, {"task": 10})
    plain = held_out_logits(parts, x, fold).softmax(dim=1)
    assert float(-plain.gather(1, labels.unsqueeze(1)).log().mean()) > found.log_loss + 0.02
    assert calibration_error(plain, labels) > found.calibration_error
    split = lda_probe(x[:1200], labels[:1200], test=(x[1200:], labels[1200:]))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x[:1200].numpy(), labels[:1200].numpy())
    assert split.value == pytest.approx(theirs.score(x[1200:].numpy(), labels[1200:].numpy()), abs=0.01)
    probabilities = torch.tensor(theirs.predict_proba(x[1200:].numpy()))
    assert split.log_loss < float(-probabilities.gather(1, labels[1200:].unsqueeze(1)).log().mean())
    assert split.calibration_error < calibration_error(probabilities, labels[1200:])


def test_the_temperature_is_the_most_likely() -> None:
    logits, labels = torch.randn(300, 4).double() * 3, torch.arange(300) % 4
    logits[torch.arange(300), labels] += 2

    def cost(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels))

    expected = math.exp(minimize_scalar(cost, bounds=(-4, 8), method="bounded", options={"xatol": 1e-8}).x)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)
    assert fit_temperature(7 * logits, labels) == pytest.approx(7 * expected, rel=1e-5)
    assert fit_temperature(-logits, labels) == pytest.approx(1e4), "worse than no answer"


def test_calibration_error_is_the_mean_gap() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(20000, generator=generator)
    rows = torch.stack([1 - probabilities, probabilities], dim=1)
    labels = (torch.rand(20000, generator=generator) < probabilities).long()
    assert calibration_error(rows, labels) < 0.02
    sure = torch.stack([(probabilities < 0.5).float(), (probabilities >= 0.5).float()], dim=1)
    assert calibration_error(sure, labels) == pytest.approx(0.25, abs=0.02)
    assert math.isnan(calibration_error(rows[:0], labels[:0]))


def test_classes_without_rows_and_few_rows() -> None:
    x, labels = digits()
    kept = labels != 4
    probabilities = fit_lda(Moments(64, {"task": 10}).update(x[kept], labels[kept])).probabilities(x)
    assert probabilities.isfinite().all()
    assert probabilities[:, 4].max() < 0.5
    for rows in range(5):
        found = lda_probe(x[:rows].bfloat16(), labels[:rows])
        assert found.rows == rows
        assert math.isnan(found.log_loss) == (rows == 0)
    assert lda_probe(torch.ones(30, 4), torch.arange(30) % 3).log_loss == pytest.approx(math.log(3))
    wide = lda_probe(torch.randn(60, 300), torch.arange(60) % 3)
    assert wide.log_loss < 2, "more features than rows: unsure, not sure and wrong"


def test_a_calibrated_fit_is_sure_where_held_out_rows_are() -> None:
    x, labels = digits()
    generator = torch.Generator().manual_seed(0)
    noise = fit_calibrated_lda(torch.randn(300, 20, generator=generator), torch.arange(300) % 3)
    assert noise.temperature > 2
    assert fit_calibrated_lda(x, labels).temperature < noise.temperature


def test_the_code_of_labels_without_signal_costs_what_they_cost_without_features() -> None:
    x, labels = digits()
    told = online_code(x, labels)
    assert told.compression > 7
    assert told.uniform_bits == pytest.approx(1797 * math.log2(10))
    sizes = np.diff([*told.rows, 1797])
    total = told.rows[0] * math.log2(10) + float((sizes * np.array(told.block_bits)).sum())
    assert told.bits == pytest.approx(total)
    assert told.block_bits[-1] < told.block_bits[-4] < told.block_bits[0]
    nothing = online_code(x, labels[torch.randperm(1797, generator=torch.Generator().manual_seed(1))])
    assert nothing.compression == pytest.approx(1, abs=0.03)
    noisy = online_code(x + 12 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), labels)
    assert nothing.compression < noisy.compression < told.compression


@pytest.mark.parametrize("seed", [0, 2])
def test_the_code_is_that_of_a_loop_that_sees_no_label_before_it_is_sent(seed: int) -> None:
    x, labels = digits()
    x, labels = x[:260], labels[:260] % 3
    x[7, 3] = torch.nan
    found = online_code(x, labels, fractions=(0.001, 0.0982, 0.2513, 0.5), seed=seed)
    kept = torch.arange(260) != 7
    x, labels = x[kept], labels[kept]
    assert found.rows == (25, 65, 130), "0.26, 25.4, 65.1 and 129.5 rows, of which there must be one"
    order = torch.randperm(259, generator=torch.Generator().manual_seed(seed)).tolist()
    bits = 25 * math.log2(3)
    for start, stop, mean in zip(found.rows, (65, 130, 259), found.block_bits, strict=True):
        told = order[:start]
        probe = fit_calibrated_lda(x[told], labels[told], classes=3, seed=seed)
        sent = [float(probe.probabilities(x[row : row + 1])[0, labels[row]]) for row in order[start:stop]]
        costs = [-math.log2((start * p + 1) / (start + 3)) for p in sent]
        assert mean == pytest.approx(sum(costs) / len(costs))
        bits += sum(costs)
    assert found.bits == pytest.approx(bits)
    assert found.uniform_bits == pytest.approx(259 * math.log2(3))
    assert found.compression == pytest.approx(found.uniform_bits / bits)


def test_the_code_depends_on_the_seed_alone_and_is_bounded() -> None:
    x, labels = digits()
    state = torch.get_rng_state()
    assert online_code(x[:300], labels[:300]) == online_code(x[:300], labels[:300])
    assert torch.equal(state, torch.get_rng_state())
    assert online_code(x[:300], labels[:300], seed=1).bits != online_code(x[:300], labels[:300]).bits
    for rows in range(5):
        code = online_code(x[:rows], labels[:rows], classes=10, fractions=(0.3, 0.6))
        assert 0 <= code.bits <= rows * math.log2(10 + rows)
    wide = online_code(torch.randn(200, 300), torch.arange(200) % 2)
    assert wide.compression == pytest.approx(1, abs=0.1)


def test_errors() -> None:
    x, labels = digits()
    with pytest.raises(ValueError, match="shrinkage is 0; expected more than 0"):
        fit_lda(Moments.of(x, labels), shrinkage=0)
    with pytest.raises(ValueError, match=r"expected ascending numbers in \(0, 1\)"):
        online_code(x, labels, fractions=(0.5, 0.1))
    with pytest.raises(ValueError, match="folds is 1"):
        lda_probe(x, labels, folds=1)
