"""H-score, LogME, LEEP and NCE: published values, the dense evidence, and properties."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.datasets import load_digits
from torch import Tensor

from tl_callbacks.probing import Moments, h_score, h_score_of, ledoit_wolf, leep, log_me, log_me_of, nce


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data), torch.tensor(data.target)


def dense_evidence(x: Tensor, columns: Tensor) -> float:
    """The mean over columns of max over alpha, beta of ln N(y | 0, I / beta + x x^T / alpha), per row."""
    values, vectors = np.linalg.eigh((x.double() @ x.double().T).numpy())
    values, n = values.clip(0), len(x)
    best = []
    for y in columns.double().T.numpy():
        along = (vectors.T @ y) ** 2

        def cost(logs: np.ndarray, along: np.ndarray = along) -> float:
            variance = math.exp(-min(logs[1], 300)) + values * math.exp(-min(logs[0], 300))
            return float((np.log(variance) + along / variance).sum() + n * math.log(2 * math.pi)) / 2

        options = {"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000}
        starts = [(a, b) for a in (-3, 3) for b in (0, 3)]
        best.append(-min(minimize(cost, start, method="Nelder-Mead", options=options).fun for start in starts) / n)
    return float(np.mean(best))


def features(n: int, d: int, signal: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    return torch.randn(n, d, generator=generator) + signal * torch.randn(3, d, generator=generator)[labels], labels


def test_the_values_of_the_digits() -> None:
    x, labels = digits()
    moments = Moments.of(x, labels)
    for found in (log_me(x, labels), log_me_of(moments)):
        assert found == pytest.approx(0.27027746, abs=1e-6)  # .27862 with the constant pixels left out of k
    assert h_score(x, labels) == pytest.approx(5.9179093, abs=1e-6)
    assert h_score(x, labels, shrinkage=True) == pytest.approx(5.8514330, abs=1e-6)
    assert ledoit_wolf(moments) == pytest.approx(0.0089285, abs=1e-6)
    assert h_score_of(moments) == h_score(x, labels)
    assert h_score_of(moments, shrinkage=True) == h_score(x, labels, shrinkage=True)


@pytest.mark.parametrize("signal", [0.0, 0.5])
@pytest.mark.parametrize(("n", "d"), [(100, 200), (100, 768), (300, 40), (60, 60), (5, 3)])
def test_log_me_is_the_dense_evidence(n: int, d: int, signal: float) -> None:
    x, labels = features(n, d, signal)
    code = torch.eye(3)[labels]
    assert log_me(x, labels) == pytest.approx(dense_evidence(x, code), abs=1e-5)
    target = x[:, 0] + torch.randn(n, generator=torch.Generator().manual_seed(1))
    assert log_me(x, target) == pytest.approx(dense_evidence(x, target.unsqueeze(1)), abs=1e-5)


def without_the_null_space(x: Tensor, y: Tensor) -> float:
    """What is widely used: d/2 ln alpha, but ln(alpha + beta s) for the min(n, d) singular values only."""
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    values, along, n, d = s**2, (u.T @ y).square(), len(x), x.shape[1]
    left, t = (y @ y - along.sum()).clamp(min=0), 1.0
    for _ in range(20):
        weights = (values * along / (t + values) ** 2).sum()
        residual = left + (along * (t / (t + values)) ** 2).sum()
        gamma = (values / (t + values)).sum()
        alpha, beta = gamma / weights, (n - gamma) / residual
        t = float(alpha / beta)
    terms = d * alpha.log() + n * beta.log() - (alpha + beta * values).log().sum() - beta * residual - alpha * weights
    return float(terms - n * math.log(2 * math.pi)) / 2 / n


def test_what_is_widely_used_is_wrong_below_d_rows() -> None:
    many, few = features(300, 40), features(100, 768)
    for (x, labels), wrong in ((many, False), (few, True)):
        theirs = np.mean([without_the_null_space(x, column) for column in torch.eye(3).double()[labels].T])
        assert (abs(theirs - log_me(x, labels)) > 10) == wrong
        assert wrong or theirs == pytest.approx(log_me(x, labels), abs=1e-3)


def test_log_me_rises_with_signal_and_does_not_turn_with_the_features() -> None:
    values = [log_me(*features(300, 30, signal)) for signal in (0.0, 0.3, 1.0)]
    assert values == sorted(values)
    assert values[2] - values[0] > 0.1
    x, labels = features(300, 30, 0.3)
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    assert log_me(x.double() @ rotation * 7, labels) == pytest.approx(values[1], abs=1e-9)
    copies = torch.cat([x, torch.full((300, 2), 0.0)], dim=1)
    assert log_me(copies, labels) == pytest.approx(values[1], abs=1e-9), "constant zeros add nothing"


def test_h_score_is_bounded_and_unmoved_by_invertible_maps() -> None:
    x, labels = features(300, 20, 0.5)
    expected = h_score(x, labels)
    assert 0 < expected < 2
    mapped = x.double() @ torch.randn(20, 20, dtype=torch.float64) * 1e4 + 1e5
    assert h_score(mapped, labels) == pytest.approx(expected, rel=1e-6)
    assert h_score(x, labels[torch.randperm(300)]) < expected / 2
    assert h_score(torch.cat([x, x[:, :5]], dim=1), labels) == pytest.approx(expected, rel=1e-6), "stable if singular"
    assert h_score(*features(50, 200)) == pytest.approx(2), "at its bound without any signal"
    assert h_score(*features(50, 200), shrinkage=True) < 0.5, "but not with shrinkage"


def test_ledoit_wolf_is_scikit_learns() -> None:
    for n, d in ((300, 20), (50, 200), (10, 10), (3, 5)):
        x = features(n, d)[0].double() * torch.linspace(0.1, 3, d) + 50
        assert ledoit_wolf(Moments.of(x)) == pytest.approx(ledoit_wolf_shrinkage(x.numpy()), rel=1e-9)


def test_a_class_without_rows_changes_nothing() -> None:
    x, labels = features(90, 5, 0.5)
    plain, padded = Moments.of(x, labels), Moments(5, {"task": 7}).update(x, labels)
    assert h_score_of(padded) == pytest.approx(h_score_of(plain), rel=1e-12)
    assert log_me_of(padded) == pytest.approx(log_me_of(plain), rel=1e-12)


@pytest.mark.parametrize("rows", range(4))
@pytest.mark.parametrize("kind", ["random", "constant", "bfloat16"])
def test_few_and_constant_rows_give_a_number_or_nan(rows: int, kind: str) -> None:
    x = torch.ones(rows, 6) if kind == "constant" else torch.randn(rows, 6)
    x, labels = (x.bfloat16() if kind == "bfloat16" else x), torch.arange(rows) % 2
    for found in (h_score(x, labels), h_score(x, labels, shrinkage=True), log_me(x, labels)):
        assert isinstance(found, float)
        assert not math.isinf(found)
    assert math.isnan(log_me(x, labels)) == (rows == 0)
    assert math.isnan(h_score(x, labels)) == (rows < 2)
    if kind == "constant" and rows > 1:
        assert h_score(x, labels) == h_score(x, labels, shrinkage=True) == 0


def test_one_class_and_perfect_fits_are_finite() -> None:
    x, _ = features(50, 4)
    assert h_score(x, torch.zeros(50, dtype=torch.long)) == pytest.approx(0)
    assert math.isfinite(log_me(x, torch.zeros(50, dtype=torch.long)))
    assert 5 < log_me(x, x[:, 0]) < 100
    assert math.isnan(log_me(x, torch.zeros(50)))


def test_leep_and_nce_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(200, 7, generator=generator).mul(2).softmax(dim=1).double()
    labels = torch.arange(200) % 3
    likelihoods = []
    for row, label in zip(theta, labels, strict=True):
        total = 0.0
        for z in range(7):
            total += float(row[z]) * float(theta[labels == label, z].sum() / theta[:, z].sum())
        likelihoods.append(math.log(total))
    assert leep(theta, labels) == pytest.approx(np.mean(likelihoods), rel=1e-9)
    hard = theta.argmax(dim=1)
    entropy = 0.0
    for z in range(7):
        for y in range(3):
            both, one = float(((hard == z) & (labels == y)).sum()), float((hard == z).sum())
            entropy -= both / 200 * math.log(both / one) if both else 0
    assert nce(hard, labels) == pytest.approx(-entropy, rel=1e-9)
    assert leep(torch.eye(7)[hard], labels) == pytest.approx(nce(hard, labels)), "LEEP of a sure head is NCE"
    assert leep(theta, labels) < leep(torch.eye(3)[labels], labels) == 0


def test_a_source_class_without_mass_is_no_nan() -> None:
    theta = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    assert math.isfinite(leep(theta, torch.tensor([0, 1])))
    assert math.isnan(leep(theta[:0], torch.tensor([], dtype=torch.long)))
    assert math.isnan(nce(torch.tensor([]).long(), torch.tensor([]).long()))
    with pytest.raises(ValueError, match="expected those of a head's softmax, not logits"):
        leep(torch.tensor([[3.0, -1.0]]), torch.tensor([0]))
