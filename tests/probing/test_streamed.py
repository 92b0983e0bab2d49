"""Sums over batches and ranks give what all rows at once give."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.forked import Ranks
from tests.probing import pairs_worker
from tests.probing.references import digits, gram_cka, sample
from tl_callbacks.probing.alignment import procrustes
from tl_callbacks.probing.minibatch import MinibatchCKA
from tl_callbacks.probing.similarity import cka_matrix
from tl_callbacks.probing.streamed import PairSums, reduce_pairs_

LAYERS = list(digits())


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize(("rows", "width"), [(5, 3), (97, 6), (40, 90)])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_any_split_gives_the_gram_oracle(size: int, rows: int, width: int, offset: float) -> None:
    x, y = sample(rows, width, offset=offset), sample(rows, 4, seed=1) + sample(rows, 1) - 3 * offset
    sums = PairSums(width, 4)
    for a, b in zip(x.split(size), y.split(size), strict=True):
        sums.update(a, b)
    assert sums.n == rows
    for debiased in (True, False):
        assert sums.linear_cka(debiased=debiased) == pytest.approx(gram_cka(x, y, debiased=debiased), abs=1e-10)
    for convention in ("opd", "disparity"):
        assert sums.procrustes(convention=convention) == pytest.approx(
            procrustes(x, y, convention=convention), abs=1e-10
        )


def test_merged_sums_are_those_of_all_rows_about_whatever_pilots() -> None:
    x, y = sample(60, 5, offset=1e4), sample(60, 3, seed=1).cumsum(0)
    parts = [PairSums(5, 3).update(x[rows], y[rows]) for rows in (slice(0, 9), slice(9, 10), slice(10, 60))]
    merged = PairSums(5, 3)
    for part in reversed(parts):
        merged.merge(part)
    merged.merge(PairSums(5, 3))
    assert merged.n == 60
    assert merged.linear_cka() == pytest.approx(gram_cka(x, y), abs=1e-10)
    assert parts[2].linear_cka() != pytest.approx(gram_cka(x, y), abs=1e-3), "the control"


def test_a_pilot_is_needed() -> None:
    x, y = sample(300, 5, offset=1e6), sample(300, 5, offset=1e6)[:, :2]
    sums = PairSums(5, 2)
    sums._pilots = torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert abs(sums.update(x, y).linear_cka() - gram_cka(x, y)) > 1e-6, "the control: about 0"
    assert PairSums(5, 2).update(x, y).linear_cka() == pytest.approx(gram_cka(x, y), abs=1e-10)


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x, y = sample(30, 4), sample(30, 4)[:, :2]
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[3, 1], bad_y[7, 0] = math.nan, math.inf
    sums = PairSums(4, 2).update(bad_x, bad_y)
    keep = [row for row in range(30) if row not in (3, 7)]
    assert (sums.n, sums.skipped) == (28, 2)
    assert sums.linear_cka() == pytest.approx(gram_cka(x[keep], y[keep]), abs=1e-10)


def test_the_edges_are_those_of_the_functions() -> None:
    x, constant = sample(9, 3), torch.full((9, 2), 0.1, dtype=torch.float64)
    sums = PairSums(3, 2)
    assert math.isnan(sums.linear_cka())
    assert math.isnan(sums.procrustes())
    for row in range(9):
        sums.update(x[row : row + 1], constant[row : row + 1])
        assert math.isnan(sums.linear_cka()) == (row < 3)
        assert math.isnan(sums.linear_cka(debiased=False)) == (row < 1)
    assert sums.linear_cka() == sums.linear_cka(debiased=False) == 0
    assert sums.procrustes() == pytest.approx(math.pi / 2)
    for value in (0.1, 1 / 3, 0.7):  # whose plain mean over 7 rows is not exact for all
        same = torch.full((7, 1), value, dtype=torch.float64)
        assert PairSums(1, 3).update(same, x[:7]).linear_cka(debiased=False) == 0
    one = torch.zeros(9, 3)
    one[4] = 5.3
    assert PairSums(3, 3).update(one, x).linear_cka() == 0
    assert PairSums(3, 2).update(x.bfloat16(), x[:, :2].bfloat16()).linear_cka() == pytest.approx(
        gram_cka(x.bfloat16(), x[:, :2].bfloat16()), abs=1e-10
    )


def test_without_other_ranks_nothing_changes() -> None:
    sums = PairSums(3, 3).update(sample(9, 3), sample(9, 3, seed=1))
    before = sums.linear_cka()
    reduce_pairs_([sums])
    assert sums.linear_cka() == before


@pytest.mark.parametrize(("size", "bound"), [(8, 0.02), (32, 0.015), (256, 0.006)])
def test_minibatch_cka_is_near_that_of_all_rows(size: int, bound: float) -> None:
    expected, biased = cka_matrix(LAYERS), cka_matrix(LAYERS, debiased=False)
    order = torch.randperm(len(LAYERS[0]), generator=torch.Generator().manual_seed(0))
    found, averages = MinibatchCKA(3, 3), []
    for rows in order.split(size):
        batch = [layer[rows] for layer in LAYERS]
        found.update(batch, batch)
        averages.append(cka_matrix(batch, debiased=False))
    assert float((found.matrix() - expected).abs().max()) < bound
    average = torch.stack(averages).mean(0)
    assert float((average - biased).abs().max()) > 4 * bound, "the control: averages of biased values"


def test_batches_count_by_their_rows_from_four_on() -> None:
    """The sums of Song's unbiased HSIC, batch by batch, in matrices."""
    x, y = sample(60, 4), sample(60, 4)[:, :3] + sample(60, 3, seed=1)
    sizes = [40, 4, 3, 13]

    def hsic(a: torch.Tensor, b: torch.Tensor) -> float:
        n = len(a)
        k, m = (z @ z.T - (z @ z.T).diag().diag() for z in (a, b))
        ends = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return float((k * m).sum() + ends) / (n * (n - 3))

    batches = [(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True) if len(a) > 3]
    xy, xx, yy = (
        sum(len(a) * hsic(*pick(a, b)) for a, b in batches)
        for pick in (lambda a, b: (a, b), lambda a, b: (a, a), lambda a, b: (b, b))
    )
    found = MinibatchCKA(1, 1)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        found.update([a], [b])
    assert (found.batches, found.dropped) == (3, 1)
    assert float(found.matrix()) == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-12)
    other = MinibatchCKA(1, 1).update([x[:3]], [y[:3]])
    assert (other.batches, other.dropped) == (0, 1)
    assert found.merge(other).dropped == 2
    xs, ys = [x, x[:, :2] - y[:, :2]], [y, y * torch.tensor([1.0, 2.0, 5.0]), sample(60, 2, seed=7)]
    assert torch.allclose(MinibatchCKA(2, 3).update(xs, ys).matrix(), cka_matrix(xs, ys), rtol=0, atol=1e-12)


def test_small_batches_are_dropped_and_merged_sums_are_one() -> None:
    x, y = sample(70, 4), sample(70, 4) + sample(70, 4, seed=1)
    whole, halves = MinibatchCKA(1, 1), [MinibatchCKA(1, 1), MinibatchCKA(1, 1)]
    assert whole.matrix().isnan().all()
    for number, (a, b) in enumerate(zip(x.split(23), y.split(23), strict=True)):
        whole.update([a], [b])
        halves[number % 2].update([a], [b])
    assert (whole.batches, whole.dropped) == (3, 1)
    assert torch.allclose(halves[0].merge(halves[1]).matrix(), whole.matrix(), rtol=0, atol=1e-14)
    once = MinibatchCKA(1, 1).update([x], [y])
    assert float(once.matrix()) == pytest.approx(gram_cka(x, y), abs=1e-12)
    assert MinibatchCKA(1, 1).update([x], [torch.ones(70, 2)]).matrix().tolist() == [[0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PairSums(0, 3), "widths are 0 and 3; expected the number of features"),
        (lambda: PairSums(2, 3).update(sample(5, 2), sample(5, 2)), r"widths 2 and 2; expected \(2, 3\)"),
        (lambda: PairSums(2, 3).merge(PairSums(2, 2)), "do not add up"),
        (lambda: MinibatchCKA(1, 2).update([sample(5, 2)], [sample(5, 2)]), "1 and 1 layers; expected 1 and 2"),
        (lambda: MinibatchCKA(1, 2).merge(MinibatchCKA(1, 1)), "do not add up"),
    ],
)
def test_errors_say_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.distributed
@pytest.mark.parametrize("shares", ["some each", "all at the last"])
def test_two_ranks_have_the_result_of_one_process(shares: str, tmp_path: Path) -> None:
    ranks = Ranks(pairs_worker.count, tmp_path, shares, log=tmp_path / "log", ranks=2)
    assert ranks.wait() == [0, 0], (tmp_path / "log").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert found[0] == found[1], "the same on each rank"
    x, y, _ = pairs_worker.layers()
    assert found[0]["n"] == [pairs_worker.ROWS] * 2
    assert found[0]["cka"] == [pytest.approx(gram_cka(x, y), abs=1e-10), 0]
    assert found[0]["biased"] == [pytest.approx(gram_cka(x, y, debiased=False), abs=1e-10), 0]
    assert found[0]["procrustes"] == [pytest.approx(procrustes(x, y), abs=1e-10), pytest.approx(math.pi / 2)]
    expected = MinibatchCKA(1, 1)
    for a, b in zip(x.split(16), y.split(16), strict=True):
        expected.update([a], [b])
    assert found[0]["batches"] == expected.batches == 6
    assert found[0]["minibatch"] == pytest.approx(expected.matrix().item(), abs=1e-12)
    half = gram_cka(x[:32], y[:32])
    assert abs(half - found[0]["cka"][0]) > 1e-3, "the control: one rank's rows are not all"
