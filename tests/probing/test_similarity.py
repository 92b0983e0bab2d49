"""Values, invariances and the edges of CKA, Procrustes and SVCCA on features in memory."""

import math

import pytest
import scipy.spatial
import torch

from tests.probing.references import digits, gram_cka, sample
from tl_callbacks.probing.alignment import procrustes, svcca
from tl_callbacks.probing.similarity import cka_from_grams, cka_matrix, gram_vectors, linear_cka

X, Y, H = digits()
FORMS = ("gram", "features")


def test_the_values_on_digits() -> None:
    assert linear_cka(X, Y, debiased=False) == pytest.approx(0.50962312, abs=1e-8)
    assert linear_cka(X, Y) == pytest.approx(0.5067721102, abs=1e-10)
    assert linear_cka(X, H, debiased=False) == pytest.approx(0.88867171, abs=1e-8)
    assert linear_cka(X, H) == pytest.approx(0.8879157233, abs=1e-10)
    assert procrustes(X, H, convention="opd") == pytest.approx(0.1601029, abs=1e-7)
    assert procrustes(X, H, convention="angular") == pytest.approx(0.4028471, abs=1e-7)
    assert procrustes(X, H, convention="disparity") == pytest.approx(0.1536947, abs=1e-7)
    assert svcca(X, H) == pytest.approx(0.91428911, abs=1e-8)
    assert abs(svcca(X, H, of="variance") - svcca(X, H)) > 0.005, "the control: the truncation matters"


def test_svcca_of_all_directions_is_that_of_their_span() -> None:
    x, y = sample(40, 4), sample(40, 6, seed=1)
    basis_x, basis_y = (torch.linalg.qr(z - z.mean(0)).Q for z in (x, y))
    expected = float(torch.linalg.svdvals(basis_x.T @ basis_y).mean())
    assert svcca(x, y, keep=1.0) == pytest.approx(expected, abs=1e-12)
    assert svcca(torch.cat([x, x @ sample(4, 3)], 1), y, keep=1.0) == pytest.approx(expected, abs=1e-12), "no new ones"
    assert svcca(sample(2, 3), sample(2, 3, seed=1)) == pytest.approx(1), "of two rows there is one direction"


def test_procrustes_is_scipys_disparity() -> None:
    x, y = sample(20, 5), sample(20, 5, seed=1)
    *_, disparity = scipy.spatial.procrustes(x.numpy(), y.numpy())
    assert procrustes(x, y, convention="disparity") == pytest.approx(disparity, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(4, 3), (5, 300), (63, 7), (64, 70), (65, 3), (200, 260)])
def test_cka_is_the_gram_oracle(rows: int, width: int, debiased: bool, form: str) -> None:
    x, y = sample(rows, width, offset=3), sample(rows, 5, seed=1) + sample(rows, 1, offset=-7)
    found = cka_matrix([x], [y], debiased=debiased, form=form)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(gram_cka(x, y, debiased=debiased), abs=1e-10)


@pytest.mark.parametrize("debiased", [True, False])
def test_all_pairs_are_each_pair(debiased: bool) -> None:
    xs = [sample(40, width, seed=width) + sample(40, 1) for width in (3, 17, 80)]
    ys = [sample(40, width, seed=width) - 2 * sample(40, 1) for width in (5, 9)]
    for layers, others in ((xs, ys), (xs, None)):
        expected = [[linear_cka(x, y, debiased=debiased) for y in others or xs] for x in layers]
        for form in FORMS:
            found = cka_matrix(layers, others, debiased=debiased, form=form)  # type: ignore[arg-type]
            assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float(cka_matrix(xs, ys).std()) > 0.01, "the control: pairs differ"


@pytest.mark.parametrize("debiased", [True, False])
def test_invariances(debiased: bool) -> None:
    rotation = torch.linalg.qr(sample(64, 64, seed=2)).Q
    assert linear_cka(X, 3 * X @ rotation + 7, debiased=debiased) == pytest.approx(1, abs=1e-12)
    stretched = X @ torch.diag(torch.linspace(0.01, 3, 64, dtype=torch.float64))
    assert linear_cka(X, stretched, debiased=debiased) < 0.99, "the control: not to every linear map"
    assert linear_cka(X, Y, debiased=debiased) == pytest.approx(linear_cka(Y, X, debiased=debiased), abs=1e-14)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    assert linear_cka(X[order], Y[order], debiased=debiased) == pytest.approx(
        linear_cka(X, Y, debiased=debiased), abs=1e-12
    )
    assert abs(linear_cka(X[order], Y, debiased=debiased)) < 0.05, "the control: rows must match"
    for convention in ("opd", "angular", "disparity"):
        # An arc cosine near 1 has half of the digits.
        assert procrustes(X, 3 * X @ rotation + 7, convention=convention) == pytest.approx(0, abs=1e-7)
    assert procrustes(X, stretched) > 0.1


@pytest.mark.parametrize(
    ("rows", "biased"), [(16, 0.804), (32, 0.673), (64, 0.499), (128, 0.335), (256, 0.201), (1024, 0.058)]
)
def test_independent_features_are_not_alike(rows: int, biased: float) -> None:
    pairs = [(sample(rows, 64, seed=2 * seed), sample(rows, 64, seed=2 * seed + 1)) for seed in range(20)]
    values = torch.tensor([linear_cka(x, y) for x, y in pairs])
    assert abs(float(values.mean())) < (0.04 if rows == 16 else 0.02)
    assert float(values.min()) < 0, "negative values are kept"
    control = torch.tensor([linear_cka(x, y, debiased=False) for x, y in pairs])
    assert float(control.mean()) == pytest.approx(biased, abs=0.01)


def test_a_large_mean_takes_nothing_away() -> None:
    expected = linear_cka(X, Y)
    assert linear_cka(X + 1e4, Y - 1e4) == pytest.approx(expected, abs=1e-9)
    assert linear_cka((X + 1e4).float(), Y.float()) == pytest.approx(expected, abs=1e-9)
    grams = [gram_vectors([z.float() + 1e4], dtype=torch.float32) for z in (X, Y)]
    assert float(cka_from_grams(*grams)) == pytest.approx(expected, abs=5e-5)
    uncentred = ((X + 1e4).float() @ (X + 1e4).float().T, Y.float() @ Y.float().T)
    k, m = (z - z.mean(0) - z.mean(1, keepdim=True) + z.mean() for z in uncentred)
    assert abs(float((k * m).sum() / (k.norm() * m.norm())) - expected) > 0.1, "the control: centring Grams in float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_features_are_summed_in_float64(dtype: torch.dtype) -> None:
    x, y = sample(50, 90).to(dtype), sample(50, 8, seed=1).to(dtype)
    x = torch.cat([x, y], dim=1)
    assert linear_cka(x, y) == pytest.approx(gram_cka(x, y), abs=1e-10)
    assert procrustes(x, y) == pytest.approx(procrustes(x.double(), y.double()), abs=1e-12)
    assert svcca(x, y) == pytest.approx(svcca(x.double(), y.double()), abs=1e-12)


def test_float32_products_cost_digits_only() -> None:
    xs = [sample(256, 768, seed=seed).float() + sample(256, 1).float() for seed in range(3)]
    exact, quick = (cka_from_grams(grams, grams) for grams in (gram_vectors(xs), gram_vectors(xs, dtype=torch.float32)))
    assert torch.allclose(exact, quick, rtol=0, atol=1e-5)
    assert not torch.equal(exact, quick)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_debiased_form_does_not_exist_for_three_rows(rows: int) -> None:
    x = sample(rows, 4)
    assert math.isnan(linear_cka(x, x))
    assert cka_matrix([x, x]).isnan().all()
    if rows > 1:
        assert linear_cka(x, x, debiased=False) == pytest.approx(1)
        assert procrustes(x, x) == pytest.approx(0, abs=1e-7)
    else:
        assert all(math.isnan(value) for value in (linear_cka(x, x, debiased=False), procrustes(x, x), svcca(x, x)))
    assert math.isfinite(linear_cka(sample(4, 4), sample(4, 4)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("constant", [torch.full((9, 2), 0.1, dtype=torch.float64), torch.full((9, 2), 0.1)])
def test_constant_features_have_nothing_in_common(constant: torch.Tensor, form: str) -> None:
    x = sample(9, 3)
    for debiased in (True, False):
        found = cka_matrix([constant, x], [constant, x], debiased=debiased, form=form)  # type: ignore[arg-type]
        assert found.tolist() == [[0, 0], [0, pytest.approx(1)]]
    assert procrustes(x, constant, convention="disparity") == 1
    assert procrustes(x, constant, convention="opd") == 2
    assert svcca(x, constant) == 0


@pytest.mark.parametrize("form", FORMS)
def test_one_row_that_differs_is_no_structure(form: str) -> None:
    x = torch.zeros(9, 2)
    x[4] = 5.3
    found = cka_matrix([x], [sample(9, 3)], form=form)  # type: ignore[arg-type]
    assert float(found) == 0
    assert linear_cka(x, sample(9, 3), debiased=False) > 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("width", [3, 30])
def test_what_is_not_finite_gives_nan(bad: float, width: int) -> None:
    x, y = sample(10, width), sample(10, width, seed=1)
    x[2, 1] = bad
    assert all(math.isnan(f(x, y)) for f in (linear_cka, procrustes, svcca))
    for form in FORMS:
        found = cka_matrix([x, y], [y], form=form)  # type: ignore[arg-type]
        assert math.isnan(found[0, 0])
        assert math.isnan(cka_matrix([x], [torch.ones(10, 2)], form=form)), "beside constant features too"  # type: ignore[arg-type]
        assert float(found[1, 0]) == pytest.approx(1), "the other layers are not touched"


def test_procrustes_of_more_features_than_rows_is_that_of_all() -> None:
    x, y = sample(12, 40), sample(12, 50, seed=1)
    scaled = [(z - z.mean(0)) / (z - z.mean(0)).norm() for z in (x, y)]
    nuclear = float(torch.linalg.svdvals(scaled[0].T @ scaled[1]).sum())
    assert procrustes(x, y, convention="opd") == pytest.approx(2 - 2 * nuclear, abs=1e-12)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"shapes \[\(4, 2\), \(5, 2\)\]; expected \(n, d\) each"):
        linear_cka(sample(4, 2), sample(5, 2))
    with pytest.raises(ValueError, match="Pool tokens first"):
        cka_matrix([sample(4, 2)[None]])
    with pytest.raises(ValueError, match="3 rows; expected 4 or more"):
        gram_vectors([sample(3, 2)])
    with pytest.raises(ValueError, match="'squared' is none; expected 'opd'"):
        procrustes(X, H, convention="squared")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep is 99; expected a share"):
        svcca(X, H, keep=99)
    with pytest.raises(ValueError, match="of is 'sigma'; expected"):
        svcca(X, H, of="sigma")  # type: ignore[arg-type]
