"""What is left of the pretrained model's abilities beside accuracy: which rows are behind no other one in both."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from intervals import Interval, paired_interval, ratio_interval

Runs = Sequence[Mapping[str, Any]]  # of one row and label count, in the order of their seeds


def retention(runs: Runs) -> Interval | None:
    """Return the hits after training as a share of those before; None: not measured, or there were none before.

    Example:
        >>> retention([{"hits": {"before": [1, 1, 1, 1], "after": [1, 0, 1, 1]}}]).mean
        0.75
    """
    return ratio_interval(_hits(runs, "after"), _hits(runs, "before")) if _measured(runs) else None


def retention_front(cell: Mapping[str, Runs], labels: Mapping[str, str]) -> dict[str, Any] | None:
    """Return which rows are on the front of accuracy and retention, in words too; None: retention was not measured.

    A row is on the front when no other one is at least as high in both means and higher in one. Means have an order
    where noise has none, so `alike` names for each row of the front those whose differences from it have intervals that
    include 0 in both (paired, not corrected for the number of rows). Rows without a retention take no part.

    Args:
        cell: row -> runs, with `correct` and `hits` (see `report.make_report`), all of one pretrained model and of the
            same pairs.
        labels: row -> its name in the sentence.

    Raises:
        ValueError: two rows have other hits before training.

    Example:
        >>> hits = {"before": [1, 1, 1, 1], "after": [1, 1, 1, 1]}
        >>> cell = {"probe": [{"correct": [1, 0], "hits": hits}], "scratch": [{"correct": [1, 1], "hits": None}]}
        >>> retention_front(cell, {"probe": "linear probe"})["rows"]
        ['probe']
    """
    rows = [row for row, runs in cell.items() if _measured(runs)]
    if not rows:
        return None
    answers = {row: np.array([run["correct"] for run in cell[row]], dtype=float) for row in rows}
    after, base = {row: _hits(cell[row], "after") for row in rows}, _hits(cell[rows[0]], "before")
    for row in rows:
        if not np.array_equal(_hits(cell[row], "before"), base):
            raise ValueError(
                f"row `{row}`: its hits before training are not those of row `{rows[0]}`; expected one pretrained "
                "model and one set of pairs. Run the two again from the same model."
            )
    means = {row: (float(answers[row].mean()), float(after[row].sum() / base.sum())) for row in rows}

    def alike(row: str, other: str) -> bool:
        apart = paired_interval(answers[row], answers[other]), ratio_interval(after[row] - after[other], base)
        return all(gain.low <= 0 <= gain.high for gain in apart)

    front = [row for row in rows if not any(_above(means[other], means[row]) for other in rows)]
    front.sort(key=lambda row: means[row], reverse=True)
    near = {row: [other for other in rows if other != row and alike(row, other)] for row in front}
    sentence = "Front of accuracy and retention, where no other mean is higher in one and as high in the other:"
    sentence += ";".join(" {} {:.2f} and {:.2f} %".format(labels[row], *(100 * m for m in means[row])) for row in front)
    said: list[str] = []
    for row, others in near.items():
        if rest := [labels[other] for other in others if other not in said]:
            sentence += f". Not told apart from {labels[row]}, as both differences include 0: {', '.join(rest)}"
        said.append(row)
    sentence += f". {base.shape[1]} text pairs, of which the pretrained model finds {100 * base.mean():.2f} %,"
    return {"rows": front, "alike": near, "sentence": sentence}


def _measured(runs: Runs) -> bool:
    return all(run.get("hits") is not None and sum(run["hits"]["before"]) > 0 for run in runs)


def _hits(runs: Runs, when: str) -> np.ndarray:
    return np.array([run["hits"][when] for run in runs], dtype=float)


def _above(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Return whether one is at least as high in both and higher in one."""
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))
