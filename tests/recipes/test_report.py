"""The report of a comparison: intervals against references, verdicts against simulated grids."""

import doctest
import json
import time
from itertools import pairwise, product
from pathlib import Path
from statistics import NormalDist

import front
import intervals
import numpy as np
import pytest
import report
from intervals import Interval, paired_interval, ratio_interval
from matplotlib.text import Text
from report import (
    ROWS,
    adaptation_verdict,
    make_report,
    plot,
    to_markdown,
    transfer_verdict,
    write_report,
)

SHARES = dict.fromkeys(ROWS, 1.0) | {
    "tfidf": None,
    "probe": 4e-4,
    "random_probe": 4e-4,
    "lora": 0.01,
}


def simulated(accuracies, *, n=8, seeds=3, items=300, converged=True):
    """Runs whose rows answer right below a fixed quantile of one shared item difficulty."""
    runs = []
    for (row, accuracy), seed in product(accuracies.items(), range(seeds)):
        rng = np.random.default_rng(seed)  # the noise of a seed is shared by the rows: paired
        difficulty = np.linspace(0, 1, items, endpoint=False) + 0.02 * rng.standard_normal(items)
        correct = [int(d < accuracy) for d in difficulty]
        neural = row != "tfidf"
        runs.append(
            {
                "row": row,
                "n": n,
                "seed": seed,
                "correct": correct,
                "accuracy": float(np.mean(correct)),
                "trainable_share": SHARES[row],
                "cpu_seconds": 10.0 + seed,
                "steps": 60 if neural else None,
                "train_loss": 0.25 if neural else None,
                "converged": converged if neural else None,
                "recipe": f"runs/{row}-{n}-{seed}" if neural else None,
            }
        )
    return runs


def retaining(runs, shares, pairs=200):
    """The runs, with what the pretrained model and they find; only the rows of `shares` have it."""
    found = []
    for run in runs:
        before = [float(place < 0.6 * pairs) for place in range(pairs)]
        share = shares.get(run["row"])
        after = None if share is None else [float(place < share * 0.6 * pairs) for place in range(pairs)]
        found.append(run | {"hits": after and {"before": before, "after": after}})
    return found


def latent_answers(rng, *, seeds, seed_noise, items=540):
    """Answers of two rows with item difficulty, training noise and noise per seed and item."""
    difficulty = rng.standard_normal(items)
    answers = []
    for skill in (0.8, 0.5):
        ability = skill + seed_noise * rng.standard_normal((seeds, 1))
        answers.append(ability + difficulty + rng.standard_normal((seeds, items)) > 0)
    return answers


def coverage(*, seeds, seed_noise, trials=150):
    scale = (2 + seed_noise**2) ** 0.5
    truth = NormalDist().cdf(0.8 / scale) - NormalDist().cdf(0.5 / scale)
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(trials):
        a, b = latent_answers(rng, seeds=seeds, seed_noise=seed_noise)
        interval = paired_interval(a, b, resamples=500, seed=trial)
        hits += interval.low <= truth <= interval.high
    return hits / trials


# --- intervals -----------------------------------------------------------------------------------


def test_one_seed_matches_the_normal_approximation():
    rng = np.random.default_rng(0)
    difficulty = rng.random((1, 600))
    a, b = difficulty < 0.8, difficulty + 0.2 * rng.standard_normal((1, 600)) < 0.7
    difference = a.astype(float) - b
    half = 1.959964 * difference.std() / 600**0.5
    interval = paired_interval(a, b)
    assert interval.mean == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(difference.mean() + half, abs=0.1 * half)
    unpaired = 1.959964 * ((a.var() + b.var()) / 600) ** 0.5
    assert interval.high - interval.low < 1.6 * unpaired  # control: ignoring the pairs is wider


def test_a_row_alone_matches_the_binomial_and_its_level():
    a = np.random.default_rng(1).random((1, 500)) < 0.7
    for level, quantile in ((0.95, 1.959964), (0.8, 1.281552)):
        half = quantile * a.std() / 500**0.5
        interval = paired_interval(a, 0, level=level)
        assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)
    assert interval.mean == a.mean()


def test_equal_answers_give_exactly_zero_and_opposite_ones_the_negative():
    rng = np.random.default_rng(2)
    a, b = rng.random((5, 540)) < 0.8, rng.random((5, 540)) < 0.7
    assert paired_interval(a, a) == Interval(0.0, 0.0, 0.0)
    there, back = paired_interval(a, b), paired_interval(b, a)
    assert there.low > 0
    assert there.high == pytest.approx(-back.low)
    assert there.low == pytest.approx(-back.high)


def test_matches_a_plain_loop_over_crossed_resamples():
    rng = np.random.default_rng(3)
    a, b = latent_answers(rng, seeds=4, seed_noise=0.3, items=60)
    difference = a.astype(float) - b
    means = []
    for _ in range(10_000):
        drawn = np.ix_(rng.integers(4, size=4), rng.integers(60, size=60))
        means.append(difference[drawn].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    interval = paired_interval(a, b)
    assert interval.low == pytest.approx(low, abs=0.012)
    assert interval.high == pytest.approx(high, abs=0.012)


def test_repeating_a_seed_adds_no_certainty():
    """The seeds of a resample share items: copies of a seed do not average difficulty out."""
    a, b = latent_answers(np.random.default_rng(4), seeds=1, seed_noise=0.0)
    once, copied = paired_interval(a, b), paired_interval(np.repeat(a, 5, 0), np.repeat(b, 5, 0))
    width = once.high - once.low
    assert copied.high - copied.low == pytest.approx(width, rel=0.05)
    a, b = latent_answers(np.random.default_rng(4), seeds=5, seed_noise=0.0)
    fresh = paired_interval(a, b)
    assert fresh.high - fresh.low < 0.9 * width  # control: five real seeds do


def test_seeds_are_resampled():
    """Training noise alone: every seed is all right or all wrong, so items carry no spread."""
    a = np.repeat([[1], [0], [1], [0]], 50, axis=1)
    interval = paired_interval(a, 0)
    assert (interval.low, interval.high) == (0.0, 1.0)
    one_seed = paired_interval(a[:1], 0)
    assert one_seed == Interval(1.0, 1.0, 1.0)  # control: it shows none of the spread


def test_coverage_is_roughly_nominal_where_seeds_are_resampled():
    assert 0.9 <= coverage(seeds=5, seed_noise=0.1) <= 1.0
    assert coverage(seeds=1, seed_noise=0.1) < 0.85  # control: one seed misses the training noise


def test_resampling_is_reproducible_fast_and_the_same_in_chunks():
    rng = np.random.default_rng(5)
    a, b = rng.random((5, 540)) < 0.8, rng.random((5, 540)) < 0.7
    start = time.process_time()
    first = paired_interval(a, b)
    assert time.process_time() - start < 0.5  # 0.05 s on an idle core
    assert paired_interval(a, b) == first != paired_interval(a, b, seed=1)
    wide = np.tile(a[:1], (1, 2000))  # a million items: one resample a chunk
    assert paired_interval(wide, 0, resamples=3).mean == pytest.approx(a[0].mean())


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 0], 0), ([[]], 0), ([[1, 0]], [[1]]), ([[1, 0]], [[1, 0], [1, 0]])],
)
def test_interval_refuses_shapes_that_do_not_pair(a, b):
    with pytest.raises(ValueError, match=r"expected \(seeds, items\) of both, or `b` = 0"):
        paired_interval(a, b)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "scratch", "outcome", "place"),
    [
        (0.8, 0.6, "positive", "above 0"),
        (0.6, 0.6, "none", "includes 0"),
        (0.61, 0.605, "none", "includes 0"),
        (0.605, 0.61, "none", "includes 0"),
        (0.5, 0.7, "negative", "below 0"),
    ],
)
def test_transfer_verdict_follows_the_interval(full, scratch, outcome, place):
    verdict = transfer_verdict(simulated({"full": full, "scratch": scratch}), 8)
    gain = verdict["comparisons"]["full"]
    assert verdict["outcome"] == outcome
    assert f"Transfer: {outcome} at n = 8" in verdict["sentence"]
    assert f"{gain:+.2f} ({place})" in verdict["sentence"]
    assert gain.mean == pytest.approx(full - scratch, abs=0.02)
    assert ("not converged" in verdict["sentence"]) is False


def test_transfer_compares_the_fixed_row_and_not_the_best_one():
    verdict = transfer_verdict(simulated({"scratch": 0.6, "full": 0.6, "lora": 0.9}), 8)
    assert verdict["outcome"] == "none"
    assert list(verdict["comparisons"]) == ["full"]
    better = transfer_verdict(simulated({"scratch": 0.6, "full": 0.9, "lora": 0.6}), 8)
    assert better["outcome"] == "positive"  # control


@pytest.mark.parametrize("rows", [["full"], ["full", "probe", "tfidf"], ["scratch", "probe"]])
def test_transfer_is_unknown_without_one_of_the_two_rows(rows):
    runs = simulated(dict.fromkeys(rows, 0.99))
    verdict = transfer_verdict(runs, 8)
    absent = "full" if "scratch" in rows else "scratch"
    assert verdict["outcome"] == "unknown"
    assert verdict["comparisons"] == {}
    assert f"Not run at this n: {ROWS[absent]}" in verdict["sentence"]
    assert "positive" not in json.dumps(make_report(runs)) + to_markdown(make_report(runs))
    runs += simulated({absent: 0.4 if absent == "scratch" else 0.999})
    assert transfer_verdict(runs, 8)["outcome"] != "unknown"  # control


@pytest.mark.parametrize(
    ("losses", "words"),
    [([0.5, 0.7, 0.9], "0.7"), ([None] * 3, "not measured"), ([float("nan")] * 3, "nan")],
)
def test_transfer_says_that_scratch_did_not_converge(losses, words):
    scratch = simulated({"scratch": 0.6}, converged=False)
    for run, loss in zip(scratch, losses, strict=True):
        run["train_loss"] = loss
    verdict = transfer_verdict(simulated({"full": 0.8}) + scratch, 8)
    assert f"scratch is marked not converged (train loss {words})" in verdict["sentence"]
    assert "full is marked" not in verdict["sentence"]
    scratch[0]["converged"] = None
    scratch[1]["converged"] = scratch[2]["converged"] = True
    verdict = transfer_verdict(simulated({"full": 0.8}) + scratch, 8)
    assert "not converged" not in verdict["sentence"]  # control: not measured is no mark


@pytest.mark.parametrize(
    ("tfidf", "words"),
    [(0.9, "beats `full`"), (0.805, "is ahead of, though within the noise, `full`"), (0.5, None)],
)
def test_transfer_says_when_tfidf_is_ahead(tfidf, words):
    runs = simulated({"tfidf": tfidf, "scratch": 0.6, "full": 0.8})
    sentence = transfer_verdict(runs, 8)["sentence"]
    assert (ROWS["tfidf"] in sentence) is (words is not None)
    assert words is None or words in sentence


@pytest.mark.parametrize(
    ("rows", "outcome", "above"),
    [
        ({"full": 0.6, "lora": 0.8}, "pays", ["lora"]),
        ({"full": 0.4, "gradual": 0.8, "anchored": 0.7}, "pays", ["gradual", "anchored"]),
        ({"full": 0.6, "lora": 0.602}, "does not pay", []),
        ({"full": 0.4, "lora": 0.6}, "does not pay", []),
        ({"full": 0.4, "discriminative": 0.3}, "hurts", []),
    ],
)
def test_adaptation_verdict_follows_the_simultaneous_intervals(rows, outcome, above):
    verdict = adaptation_verdict(simulated({"probe": 0.6, "scratch": 0.9, **rows}), 8)
    assert verdict["outcome"] == outcome
    assert verdict["comparisons"].keys() == rows.keys()
    assert f": {outcome} at n = 8" in verdict["sentence"]
    for row, gain in verdict["comparisons"].items():
        assert (f"{ROWS[row]} {gain:+.2f} (above 0)" in verdict["sentence"]) is (row in above)


def test_adaptation_is_unknown_without_a_probe_or_a_row_to_compare():
    for rows, absent in (({"full": 0.9}, "probe"), ({"probe": 0.6, "scratch": 0.9}, "lora")):
        verdict = adaptation_verdict(simulated(rows), 8)
        assert verdict["outcome"] == "unknown"
        assert ROWS[absent] in verdict["sentence"]
        assert adaptation_verdict(simulated(rows | {absent: 0.5}), 8)["outcome"] != "unknown"


def test_adaptation_widens_the_intervals_with_the_number_of_rows():
    pair = simulated({"probe": 0.6, "full": 0.62})
    alone = adaptation_verdict(pair, 8)["comparisons"]["full"]
    others = simulated(dict.fromkeys(("discriminative", "gradual", "anchored", "lora"), 0.6))
    family = adaptation_verdict(pair + others, 8)["comparisons"]["full"]
    a, b = ([run["correct"] for run in pair if run["row"] == row] for row in ("full", "probe"))
    assert alone == paired_interval(a, b)
    assert family == paired_interval(a, b, level=0.99)
    assert family.high - family.low > 1.15 * (alone.high - alone.low)


def test_correction_keeps_false_findings_rare():
    """Five rows equal to the probe but for noise: about 5 % of grids may name one, not 20 %."""
    rng = np.random.default_rng(11)
    corrected = uncorrected = 0
    for _ in range(60):
        runs = simulated(dict.fromkeys(("probe", *report.ADAPTING_ROWS), 0.6), seeds=1, items=60)
        for run in runs:
            run["correct"] = [int(x) for x in rng.random(60) < 0.6]
            run["accuracy"] = float(np.mean(run["correct"]))
        answers = {run["row"]: [run["correct"]] for run in runs}
        gains = adaptation_verdict(runs, 8)["comparisons"]
        corrected += any(gain.low > 0 or gain.high < 0 for gain in gains.values())
        plain = [paired_interval(answers[row], answers["probe"], resamples=1000) for row in gains]
        uncorrected += any(gain.low > 0 or gain.high < 0 for gain in plain)
    assert corrected <= 6 < uncorrected


# --- accuracy and retention ---------------------------------------------------------------------

KEPT = {"probe": 1.0, "full": 0.5, "discriminative": 0.8, "anchored": 0.8, "lora": 0.55}
RIGHT = {"tfidf": 0.5, "scratch": 0.5, "probe": 0.5, "full": 0.7, "discriminative": 0.71, "anchored": 0.9, "lora": 0.4}


def test_a_ratio_matches_a_plain_loop_and_is_exact_where_nothing_changed():
    rng = np.random.default_rng(8)
    base = np.repeat(rng.random((1, 60)) < 0.6, 4, axis=0).astype(float)
    now = base * (rng.random((4, 60)) < 0.8)
    ratios = []
    for _ in range(10_000):
        drawn = np.ix_(rng.integers(4, size=4), rng.integers(60, size=60))
        ratios.append(now[drawn].sum() / base[drawn].sum())
    interval = ratio_interval(now, base)
    assert interval.mean == now.sum() / base.sum()
    assert interval.low == pytest.approx(np.quantile(ratios, 0.025), abs=0.012)
    assert interval.high == pytest.approx(np.quantile(ratios, 0.975), abs=0.012)
    assert ratio_interval(base, base) == Interval(1.0, 1.0, 1.0)
    loose = paired_interval(now, 0)  # control: with the base held fixed it is wider
    assert (loose.high - loose.low) / base.mean() > 1.1 * (interval.high - interval.low)


def test_a_ratio_refuses_a_base_without_hits_and_leaves_empty_draws_out():
    with pytest.raises(ValueError, match=r"`base` sums to 0.0; expected more than 0"):
        ratio_interval([[0, 0]], [[0, 0]])
    with pytest.raises(ValueError, match=r"expected \(seeds, items\) of both"):
        ratio_interval([[1, 0]], [[1]])
    assert ratio_interval([[1, 0, 0]], [[1, 0, 0]]) == Interval(1.0, 1.0, 1.0)


def test_the_front_holds_the_rows_that_no_other_one_is_above_in_both():
    runs = retaining(simulated(RIGHT, seeds=2), KEPT)
    count = make_report(runs)["label_counts"][0]
    front = count["front"]
    assert front["rows"] == ["anchored", "probe"]
    # `discriminative` retains as much and is less accurate; of what was not measured nothing is said.
    assert "anchored (decoupled) 91.00 and 80.00 %; linear probe 51.50 and 100.00 %." in front["sentence"]
    assert "Not told apart" not in front["sentence"]
    assert "200 text pairs, of which the pretrained model finds 60.00 %, 2 seeds." in front["sentence"]
    kept = {row["row"]: row["retention"] for row in count["rows"]}
    assert kept["probe"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert kept["full"]["low"] < kept["full"]["mean"] == 0.5 < kept["full"]["high"]
    assert kept["scratch"] is kept["tfidf"] is None
    assert make_report(retaining(simulated(RIGHT), KEPT | {"probe": 0.7}))["label_counts"][0]["front"]["rows"] == [
        "anchored"
    ]  # control


def test_the_front_says_what_noise_does_not_tell_apart():
    right = {"full": 0.700, "anchored": 0.703, "lora": 0.5}
    rng = np.random.default_rng(9)
    runs = retaining(simulated(right, seeds=2), dict.fromkeys(right, 0.8))
    for run in runs:  # as much is lost, of other pairs
        after = np.array(run["hits"]["before"])
        after[rng.choice(120, 24 + (run["row"] == "anchored"), replace=False)] = 0
        run["hits"]["after"] = after.tolist()
        run["correct"] = rng.permutation(run["correct"]).tolist()
    front = make_report(runs)["label_counts"][0]["front"]
    assert front["rows"] == ["anchored", "full"]
    assert front["alike"] == {"anchored": ["full"], "full": ["anchored"]}
    words = "Not told apart from anchored (decoupled), as both differences include 0: full fine-tuning, one rate. 200"
    assert words in front["sentence"]  # once, and without `lora`, which is behind in accuracy


def test_the_page_has_a_column_where_retention_was_measured(made, tmp_path, monkeypatch):
    runs = retaining(simulated(RIGHT, seeds=2), KEPT)
    measured = make_report(runs + simulated({"full": 0.9, "probe": 0.9}, n=64, seeds=1))
    page = to_markdown(measured)
    table = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert [len(cells) for cells in table] == [7] * 9 + [6] * 4
    assert table[0][3] == "retention, %"
    assert {cells[0]: cells[3] for cells in table[2:9]}[ROWS["probe"]] == "100.00 [100.00, 100.00]"
    assert {cells[0]: cells[3] for cells in table[2:9]}[ROWS["scratch"]] == "-"
    assert f"\n{measured['label_counts'][0]['front']['sentence']}\n" in page
    assert measured["label_counts"][1]["front"] is None
    assert "Retention: how many" in page
    assert "etention" not in to_markdown(made)
    figure, _ = panels(measured, tmp_path, monkeypatch)
    assert [axes.get_xlabel() for axes in figure.axes[::2]] == ["retention, %"] * 2
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[1]) for line in drawn) == pytest.approx(sorted(100 * k for k in KEPT.values()))
    assert not figure.axes[2].lines


def test_retention_needs_one_set_of_pairs_and_all_seeds():
    runs = retaining(simulated(RIGHT, seeds=2), KEPT)
    half = [run | {"hits": None} if run["row"] == "full" and run["seed"] else run for run in runs]
    rows = {row["row"]: row["retention"] for row in make_report(half)["label_counts"][0]["rows"]}
    assert rows["full"] is None
    assert rows["probe"] is not None  # control
    other = [run | {"hits": run["hits"] and {**run["hits"], "before": [1.0] * 200}} for run in runs]
    assert make_report(other), "the control: all of them began with the same model"
    mixed = [theirs if own["row"] == "lora" else own for own, theirs in zip(runs, other, strict=True)]
    with pytest.raises(ValueError, match="row `lora`: its hits before training are not those of row `probe`"):
        make_report(mixed)
    runs[-1]["hits"] = {"before": [1.0] * 9, "after": [1.0] * 9}
    with pytest.raises(ValueError, match=r"seed 1: `hits` is not of 200 text pairs, as the first one measured"):
        make_report(runs)


# --- the report ----------------------------------------------------------------------------------


def grid():
    low = simulated({row: 0.5 + 0.04 * k for k, row in enumerate(ROWS)}, n=8, seeds=2, items=80)
    for run in low:
        if run["row"] == "scratch":
            run["converged"] = run["seed"] == 0
    return low + simulated({row: 0.9 for row in ("full", "probe")}, n=64, seeds=1, items=80)


@pytest.fixture(scope="module")
def made():
    return make_report(grid(), torch="2.0", data={"name": "toy"})


def finite_numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in finite_numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_report_holds_the_numbers_of_the_runs(made):
    runs = grid()
    assert make_report(runs[::-1], torch="2.0", data={"name": "toy"}) == made
    assert made["schema_version"] == 1
    assert made["meta"] == {"torch": "2.0", "data": {"name": "toy"}}
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert len(finite_numbers(made)) > 100
    assert np.isfinite(finite_numbers(made)).all()
    few, many = made["label_counts"]
    assert (few["n"], few["seeds"], many["n"], many["seeds"]) == (8, [0, 1], 64, [0])
    assert [row["row"] for row in few["rows"]] == list(ROWS)  # display order, not that of the runs
    rows = {row["row"]: row for row in few["rows"]}
    lora = [run for run in runs if run["row"] == "lora"]
    scratch = [run["correct"] for run in runs if run["row"] == "scratch"]
    answers = [run["correct"] for run in lora]
    assert rows["lora"]["accuracies"] == [run["accuracy"] for run in lora]
    assert rows["lora"]["recipes"] == ["runs/lora-8-0", "runs/lora-8-1"]
    assert Interval(**rows["lora"]["accuracy"]) == paired_interval(answers, 0)
    assert Interval(**rows["lora"]["gain"]) == paired_interval(answers, scratch)
    assert rows["lora"]["cpu_seconds"] == 10.5
    assert rows["lora"]["steps"] == 60
    assert rows["tfidf"]["steps"] is rows["tfidf"]["trainable_share"] is None
    assert [rows[row]["converged"] for row in ("tfidf", "scratch", "lora")] == [None, False, True]
    assert rows["scratch"]["gain"] is None
    assert [row["gain"] for row in many["rows"]] == [None, None]  # no scratch at this n
    assert few["transfer"]["comparisons"]["full"] == rows["full"]["gain"]
    assert few["transfer"]["sentence"] == transfer_verdict(runs, 8)["sentence"]
    assert few["adaptation"]["outcome"] == adaptation_verdict(runs, 8)["outcome"]


def test_report_says_what_one_seed_cannot_say(made):
    few, many = made["label_counts"]
    words = "one seed: the interval covers test items, not training noise"
    assert words in many["note"]
    assert words in many["adaptation"]["sentence"]
    assert words not in few["note"]
    assert "80 test items, 2 seeds" in few["note"]


def changed(**change):
    runs = grid()
    runs[-1].update(change)
    return runs


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], r"label counts run: \[\], expected one"),
        (
            changed(row="prob"),
            r"row `prob`, n 64, seed 0: the row is unknown. Closest names: probe",
        ),
        (changed(correct=[1, 0]), r"row `probe`, n 64, seed 0: 2 answers, the first run has 80"),
        (changed(correct=[2] * 80), r"`accuracy` 0.* is not the mean of `correct`, each 0 or 1"),
        (changed(correct=[2, 0] * 40, accuracy=1.0), "`accuracy` 1.0 is not the mean"),
        (changed(accuracy=0.123), r"`accuracy` 0.123 is not the mean of `correct`"),
        (changed(accuracy=float("nan")), r"`accuracy` nan is not the mean of `correct`"),
        (
            grid()[:1] + grid(),
            r"row `tfidf`, n 8 has the seeds \[0, 0, 1\], expected \[0, 1\], .*twice",
        ),
        (grid()[1:], r"row `tfidf`, n 8 has the seeds \[1\], expected \[0, 1\], missing: \[0\]"),
        (
            changed(seed=4),
            r"row `probe`, n 64 has the seeds \[4\], expected \[0, 4\], missing: \[0\]",
        ),
        (changed(cpu_seconds=float("inf")), "not JSON compliant"),
    ],
)
def test_report_refuses_runs_that_do_not_pair_up(runs, words):
    with pytest.raises(ValueError, match=words):
        make_report(runs)


def test_report_takes_a_row_that_is_absent_at_one_label_count(made):
    """The control of the refusals above: the same runs, unchanged."""
    assert [len(count["rows"]) for count in made["label_counts"]] == [len(ROWS), 2]


def test_verdicts_refuse_a_label_count_that_was_not_run():
    for verdict in (transfer_verdict, adaptation_verdict):
        with pytest.raises(ValueError, match=r"label counts run: \[8, 64\], expected \(16,\)"):
            verdict(grid(), 16)


def test_a_broken_meta_is_refused():
    runs = simulated({"probe": 0.6}, seeds=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        make_report(runs, loss=float("nan"))
    with pytest.raises(TypeError):
        make_report(runs, folder=Path("runs"))
    assert make_report(runs, loss=0.5)["meta"] == {"loss": 0.5}  # control


def test_markdown_has_the_tables_the_verdicts_and_the_method(made):
    page = to_markdown(made)
    for count in made["label_counts"]:
        for text in (count["note"], count["transfer"]["sentence"], count["adaptation"]["sentence"]):
            assert f"\n{text}\n" in page
    table = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    assert {len(cells) for cells in table} == {6}
    assert len(table) == 2 * 2 + 9 + 2
    lora = next(row for row in made["label_counts"][0]["rows"] if row["row"] == "lora")
    gain = lora["gain"]
    limits = [f"{100 * gain[key]:+.2f}" for key in ("mean", "low", "high")]
    cells = next(cells for cells in table if cells[0] == "LoRA")
    assert cells[2] == f"{limits[0]} [{limits[1]}, {limits[2]}]"
    assert cells[1].startswith(f"{100 * lora['accuracy']['mean']:.2f} [")
    assert cells[3:] == ["1", "10.5", "60"]
    assert page.count("(not converged)") == 1
    assert f"{ROWS['scratch']} (not converged)|" in page
    assert all(f"\n\n{line}\n\n" in page for line in page.splitlines() if line.startswith("## "))
    assert "10,000 bootstrap resamples" in page
    assert "- torch: 2.0" in page


def panels(made, folder, monkeypatch):
    """The axes that `plot` saved, and the picture's file."""
    saved = []
    original = report.Figure.savefig

    def keep(figure, *args, **kwargs):
        original(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(report.Figure, "savefig", keep)
    plot(made, folder / "picture.png")
    return saved[0], folder / "picture.png"


@pytest.mark.parametrize("spread", [0.04, 0.002])
def test_plot_labels_every_row_once_without_overlap(spread, tmp_path, monkeypatch):
    runs = simulated({row: 0.5 + spread * k for k, row in enumerate(ROWS)}, seeds=2, items=80)
    made = make_report(runs + simulated({"full": 0.9, "probe": 0.7}, n=64, seeds=1, items=80))
    figure, picture = panels(made, tmp_path, monkeypatch)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 2
    for axes, count in zip(figure.axes, made["label_counts"], strict=True):
        assert axes.get_xscale() == "log"
        assert axes.get_title() == f"n = {count['n']}"
        assert {text.get_text() for text in axes.texts} == {row["label"] for row in count["rows"]}
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leader lines
        for lower, upper in pairwise(sorted(boxes, key=lambda box: box.y0)):
            assert upper.y0 > lower.y0 + 0.85 * lower.height
        points = [line for line in axes.lines if line.get_marker() == "o"]
        places = {(float(line.get_xdata()[1]), float(line.get_ydata()[1])) for line in points}
        assert len(places) == sum(row["trainable_share"] is not None for row in count["rows"])
        heights = sorted(100 * row["accuracy"]["mean"] for row in count["rows"])
        assert sorted(float(line.get_ydata()[1]) for line in axes.lines) == pytest.approx(heights)


def test_write_report_leaves_three_whole_files_or_none(made, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    write_report(made, folder)
    names = ["report.json", "report.md", "report.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "report.json").read_text()) == made
    assert (folder / "report.md").read_text() == to_markdown(made)
    before = {name: (folder / name).read_bytes() for name in names}

    def fails(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(report, "to_markdown", fails)
    other = make_report(simulated({"full": 0.9, "scratch": 0.2}))
    with pytest.raises(RuntimeError, match="no space left"):
        write_report(other, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(RuntimeError, match="no space left"):
        write_report(other, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    monkeypatch.undo()
    write_report(other, folder)
    assert (folder / "report.json").read_bytes() != before["report.json"]  # control


def test_examples_run():
    for module in (intervals, front):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
