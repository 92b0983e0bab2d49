"""Runs of a comparison in; verdicts in words, `report.json`, `report.md` and a picture out.

It needs numbers only, no model, so a report can be checked or written again without training.
"""

import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from front import retention, retention_front
from intervals import LEVEL, RESAMPLES, Interval, paired_interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROWS = {
    "tfidf": "TF-IDF + logistic regression",
    "random_probe": "probe of a random network",
    "scratch": "training from scratch",
    "probe": "linear probe",
    "full": "full fine-tuning, one rate",
    "discriminative": "discriminative rates",
    "gradual": "gradual unfreezing + discriminative rates",
    "anchored": "anchored (decoupled)",
    "lora": "LoRA",
}
TRANSFER_ROW = "full"  # fixed before any run: the best row of a test set is too good by selection
ADAPTING_ROWS = ("full", "discriminative", "gradual", "anchored", "lora")
# Okabe and Ito's colour-blind safe palette, without its yellow, which is faint on white.
COLOURS = ("0.45", "0.45", "0", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
METHOD = """
Brackets: {level:.0%} percentile intervals of {resamples:,} bootstrap resamples of seeds and items,
the same items for all seeds and for both rows of a difference; few seeds understate training noise.
The transfer verdict is about one row fixed before any run, `{transfer_row}`: nothing was picked on
the test set. The adaptation verdict gives each of m rows the level 1 - (1 - {level}) / m, so that
all m hold at once. Nothing is corrected for the number of label counts, or the rows of a table.
"""
RETENTION = """
Retention: how many first lines of docstrings still find the paragraph that follows them, by the
model's mean-pooled features (recall@1), as a share of those that the pretrained model finds; the
packages are none of the task's. Intervals resample seeds and pairs. Nothing was chosen by it, and
measuring it is no part of the CPU-seconds. `-`: the row does not start from the pretrained weights.
"""
Names = Sequence[str]
Runs = Sequence[Mapping[str, Any]]  # `make_report` says what is in them
Cell = Mapping[str, Runs]  # one label count: row -> runs in the order of their seeds
Verdict = dict[str, Any]  # `outcome`, `sentence`, `comparisons` (row -> Interval of the difference)


def transfer_verdict(runs: Runs, n: int) -> Verdict:
    """Return whether the pretrained weights help at one label count, against training from scratch.

    One fixed row (`TRANSFER_ROW`) minus scratch decides: "positive" when its interval lies above
    0, "negative" when below, "none" when it includes 0, "unknown" without one of the two, however
    high the accuracy. The sentence says what did not converge, and when TF-IDF is ahead.
    """
    cell, outcomes = _grid(runs, n)[n], ("positive", "none", "negative")
    verdict = _verdict(cell, n, "Transfer", outcomes, [TRANSFER_ROW], "scratch")
    if {"tfidf", TRANSFER_ROW} <= cell.keys():
        lead = _gains(cell, ["tfidf"], TRANSFER_ROW)["tfidf"]
        verb = "beats" if lead.low > 0 else "is ahead of, though within the noise,"
        if lead.mean > 0:
            verdict["sentence"] += f" {ROWS['tfidf']} {verb} `{TRANSFER_ROW}`: {lead:+.2f} points."
    return verdict


def adaptation_verdict(runs: Runs, n: int) -> Verdict:
    """Return whether adapting more than a linear probe pays at one label count.

    Several rows are tried, and the luckiest of m is above the probe too often, so each interval
    gets the level 1 - 0.05 / m (Bonferroni): all m hold together with at least 95 %. Holm's
    step-down (Scand. J. Statist. 6, 1979) starts with the same threshold and can only find more,
    but decides without intervals to show. "pays" when an interval lies above 0, "hurts" when all
    lie below, "unknown" with nothing to compare, else "does not pay", no proof of equality.
    """
    cell, outcomes = _grid(runs, n)[n], ("pays", "does not pay", "hurts")
    return _verdict(cell, n, "More adaptation than the probe", outcomes, ADAPTING_ROWS, "probe")


def make_report(runs: Runs, **meta: Any) -> dict[str, Any]:
    """Return what a reader needs to judge the comparison, as one JSON-able dictionary.

    Args:
        runs: one per row, label count `n` and `seed`: `correct` (0 or 1 per item, the same items in
            all runs), `accuracy`, `trainable_share`, `cpu_seconds`, `steps`, `train_loss`,
            `converged`, `recipe` (folder), and `hits` (`before` and `after` training, 0 to 1 per text pair); None: not
            measured. All rows of an `n` share its seeds.
        meta: facts to keep with the numbers (versions, data set, model), as finite JSON values.

    Returns:
        Per label count the rows (accuracy, gain over scratch and retention as fractions, means over
        seeds of the costs, `converged` in all seeds), a note on the seeds, both verdicts and the front.

    Raises:
        ValueError: the runs are no full grid, contradict themselves, or hold a number not finite.
    """
    counts = []
    for n, cell in _grid(runs).items():
        own = _gains(cell, [*cell], "")
        gains = _gains(cell, [*cell], "scratch") if "scratch" in cell else {}
        rows = []
        for row, of_row in cell.items():
            facts = {"row": row, "label": ROWS[row], "accuracy": own[row], "gain": gains.get(row)}
            every = {key: [run[key] for run in of_row] for key in of_row[0]}
            facts["retention"] = retention(of_row)
            for key in ("trainable_share", "cpu_seconds", "steps"):
                facts[key] = None if None in every[key] else float(np.mean(every[key]))
            marks = {*every["converged"]}
            facts["converged"] = False if False in marks else None if None in marks else True
            rows.append(facts | {"accuracies": every["accuracy"], "recipes": every["recipe"]})
        counts.append({"n": n, "seeds": every["seed"], "note": _size(cell), "rows": rows})
        counts[-1]["transfer"] = transfer_verdict(runs, n)
        counts[-1]["adaptation"] = adaptation_verdict(runs, n)
        counts[-1]["front"] = retention_front(cell, ROWS)
        if counts[-1]["front"]:
            counts[-1]["front"]["sentence"] += f" {_seeds(cell)}."
    method = {"level": LEVEL, "resamples": RESAMPLES, "transfer_row": TRANSFER_ROW}
    report = {"schema_version": 1, "meta": meta, "method": method, "label_counts": counts}
    return dict(json.loads(json.dumps(report, default=asdict, allow_nan=False)))


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a page: per label count a table and verdicts, then method and meta."""
    lines = ["# Ways of adapting, compared", "", "![accuracy by trainable share](report.png)"]
    measured = False
    for count in report["label_counts"]:
        front = count.get("front")
        measured |= bool(front)
        titles = ["way of adapting", "accuracy, %", "gain over scratch, points", *["retention, %"] * bool(front)]
        sides = ["---"] * len(titles) + ["---:"] * 3
        lines += ["", f"## n = {count['n']}", ""]
        lines += ["|".join(["", *titles, "trainable, %", "CPU-seconds", "steps", ""]), "|".join(["", *sides, ""])]
        for row in count["rows"]:
            share, steps = row["trainable_share"], row["steps"]
            cells = [row["label"] + (" (not converged)" if row["converged"] is False else "")]
            cells += [f"{Interval(**row['accuracy']):.2f}"]
            cells += [f"{Interval(**row['gain']):+.2f}" if row["gain"] else "-"]
            if front:
                cells += [f"{Interval(**row['retention']):.2f}" if row["retention"] else "-"]
            cells += ["-" if share is None else f"{100 * share:.3g}", f"{row['cpu_seconds']:,.1f}"]
            lines += ["|".join(["", *cells, "-" if steps is None else f"{steps:,.0f}", ""])]
        verdicts = [count[key]["sentence"] for key in ("transfer", "adaptation", "front") if count.get(key)]
        for text in (count["note"], *verdicts):
            lines += ["", text]
    method = METHOD.format(**report["method"]) + (RETENTION if measured else "")
    lines += ["", "## How it was computed", method, "## Made with", ""]
    return "\n".join(lines + [f"- {key}: {value}" for key, value in report["meta"].items()]) + "\n"


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw accuracy by trainable share (PNG), a panel per `n`; rows without a share are lines."""
    counts = report["label_counts"]
    columns = 1 + any(count.get("front") for count in counts)
    figure = Figure(figsize=(5 + 4 * columns, 3.8 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), columns, squeeze=False, sharey="row")
    for (*left, axes), count in zip(panels, counts, strict=True):
        for beside in left:
            _plot_retention(beside, count)
        rows = sorted(count["rows"], key=lambda row: row["accuracy"]["mean"])
        limits = [[100 * row["accuracy"][key] for key in ("mean", "low", "high")] for row in rows]
        means = np.array(limits)[:, 0]
        lines = 0.06 * max(1, np.ptp(limits)) * np.arange(len(rows))
        heights = np.maximum.accumulate(means - lines) + lines  # labels at least one line apart
        heights -= (heights - means).mean()
        side = axes.get_yaxis_transform()  # x as a fraction of the panel, y in percent
        for row, (mean, low, high), height in zip(rows, limits, heights, strict=True):
            colour, point, unit = {"color": COLOURS[[*ROWS].index(row["row"])]}, (1, mean), side
            if share := row["trainable_share"]:
                twins = [twin for twin in rows if twin["trainable_share"] == share]
                x = share * 10 ** (0.06 * (twins.index(row) - len(twins) / 2 + 0.5))  # side by side
                point, unit = (x, mean), "data"
                axes.plot([x, x, x], [low, mean, high], "-o", markevery=[1], **colour)
            else:
                axes.axhline(mean, linestyle="--", **colour)
                axes.axhspan(low, high, alpha=0.15, linewidth=0, **colour)
            line = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5)} | colour
            axes.annotate(row["label"], point, (1.06, height), unit, side, line, va="center")
        axes.set(xscale="log", ylabel="accuracy, %", title=f"n = {count['n']}")
    panels[-1, -1].set_xlabel("trainable share of the parameters (equal shares side by side)")
    figure.savefig(path, format="png", dpi=150, facecolor="white")


def _plot_retention(axes: Axes, count: Mapping[str, Any]) -> None:
    """Draw accuracy by retention with both intervals, in the colours of the panel beside it."""
    for row in count["rows"]:
        if kept := row.get("retention"):
            x, y = ([100 * of[key] for key in ("low", "mean", "high")] for of in (kept, row["accuracy"]))
            colour = COLOURS[[*ROWS].index(row["row"])]
            axes.plot(x, [y[1]] * 3, "-o", [x[1]] * 3, y, "-", markevery=[1], color=colour)
    axes.set(xlabel="retention, %", ylabel="accuracy, %", title=f"n = {count['n']}")


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Write `report.png`, `.md` and `.json`: all three are made first, then moved into place."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as drafts:
        plot(report, Path(drafts, "report.png"))
        Path(drafts, "report.md").write_text(to_markdown(report), encoding="utf-8")
        Path(drafts, "report.json").write_text(json.dumps(report, indent=2) + "\n")
        for name in ("report.png", "report.md", "report.json"):
            Path(drafts, name).replace(Path(folder, name))


def _verdict(cell: Cell, n: int, question: str, outcomes: Names, rows: Names, base: str) -> Verdict:
    """Compare rows with a base; `outcomes`: when one is above it, none is, all are below it."""
    found = [row for row in rows if row in cell]
    if base not in cell or not found:
        absent = ", ".join(ROWS[row] for row in (base, *rows) if row not in cell)
        sentence = f"{question}: unknown at n = {n}. Not run at this n: {absent}."
        return {"outcome": "unknown", "sentence": sentence, "comparisons": {}}
    gains = _gains(cell, found, base, level=1 - (1 - LEVEL) / len(found))
    side = {row: int(gain.low > 0) - int(gain.high < 0) for row, gain in gains.items()}
    outcome = outcomes[0 if 1 in side.values() else 2 if {*side.values()} == {-1} else 1]
    sentence = f"{question}: {outcome} at n = {n}. In points over {ROWS[base]}:"
    for row, gain in gains.items():
        sentence += f" {ROWS[row]} {gain:+.2f} ({('includes 0', 'above 0', 'below 0')[side[row]]});"
    sentence += f" {_size(cell)}"
    for row in (base, *found):
        losses = [run["train_loss"] for run in cell[row] if run["converged"] not in (None, True)]
        if losses:
            loss = "not measured" if None in losses else f"{np.mean(losses):.3g}"
            sentence += f" But {row} is marked not converged (train loss {loss})."
    return {"outcome": outcome, "sentence": sentence, "comparisons": gains}


def _gains(cell: Cell, rows: Names, base: str, level: float = LEVEL) -> dict[str, Interval]:
    """Return rows minus the base, or the rows themselves where the base has no name."""
    answers = {row: [run["correct"] for run in of_row] for row, of_row in cell.items()}
    minus = answers[base] if base else 0
    return {row: paired_interval(answers[row], minus, level=level) for row in rows if row != base}


def _size(cell: Cell) -> str:
    """Return how much was measured, and what one seed cannot say."""
    runs = next(iter(cell.values()))
    return f"{len(runs[0]['correct'])} test items, {_seeds(cell)}."


def _seeds(cell: Cell) -> str:
    runs = next(iter(cell.values()))
    alone = "one seed: the interval covers test items, not training noise"
    return f"{len(runs)} seeds" if len(runs) > 1 else alone


def _grid(runs: Runs, *needed: int) -> Mapping[int, Cell]:
    """Return n -> row -> runs in the order of their seeds, once all rows are known to pair up."""
    num_pairs = next((len(run["hits"]["before"]) for run in runs if run.get("hits")), 0)
    for run in runs:
        problem, answers, num_items = "", run["correct"], len(runs[0]["correct"])
        if run["row"] not in ROWS:
            near = ", ".join(difflib.get_close_matches(run["row"], ROWS, cutoff=0))
            problem = f"the row is unknown. Closest names: {near}. `ROWS` has all names"
        elif len(answers) != num_items:
            problem = f"{len(answers)} answers, the first run has {num_items}. Use one test set"
        elif not ({*answers} <= {0, 1} and abs(np.mean(answers) - run["accuracy"]) < 1e-4):
            problem = f"`accuracy` {run['accuracy']} is not the mean of `correct`, each 0 or 1"
        elif {*map(len, (run.get("hits") or {}).values())} - {num_pairs}:
            problem = f"`hits` is not of {num_pairs} text pairs, as the first one measured. Use one set of pairs"
        if problem:
            raise ValueError(f"row `{run['row']}`, n {run['n']}, seed {run['seed']}: {problem}.")
    grid: dict[int, dict[str, list[Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["n"], [*ROWS].index(run["row"]), run["seed"])):
        grid.setdefault(run["n"], {}).setdefault(run["row"], []).append(run)
    if not grid or not {*needed} <= grid.keys():
        raise ValueError(f"label counts run: {[*grid]}, expected {needed or 'one'}. Run it first.")
    for n, cell in grid.items():
        expected = sorted({run["seed"] for of_row in cell.values() for run in of_row})
        for row, of_row in cell.items():
            if (seeds := [run["seed"] for run in of_row]) != expected:
                missing = sorted({*expected} - {*seeds}) or "none, but one is there twice"
                problem = f"has the seeds {seeds}, expected {expected}, missing: {missing}"
                raise ValueError(f"row `{row}`, n {n} {problem}. Run each once, or drop the row.")
    return grid
