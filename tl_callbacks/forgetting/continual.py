"""The rule: what a sequence of tasks made of each other, from the matrix of all tasks after all stages. No torch."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

Definition = Literal["lopez-paz", "chaudhry", "mammoth", "avalanche"]


@dataclass(frozen=True)
class TaskMatrix:
    """The metric of every task after every stage: `values[i][j]` is task j after training on task i.

    A metric that grows as a model gets better. Rows may end at the diagonal, and hold nan above it, where a task was
    not evaluated before it was learned; only `forward_transfer` reads there. Keep the whole matrix: the measures below
    are means of it that disagree even in sign.

    Args:
        values: a row for each stage, with the tasks in the order in which they were learned.
        baselines: each task's metric before anything was learned, as by random weights; `forward_transfer` needs them.

    Raises:
        ValueError: there are no rows, a row ends before the diagonal or is longer than there are stages, or there are
            more or fewer baselines than tasks.

    Example:
        >>> matrix = TaskMatrix([[0.7], [0.9, 0.85], [0.8, 0.9, 0.95]])
        >>> round(matrix.average_accuracy(), 4), round(matrix.learning_accuracy(), 4)
        (0.8833, 0.8333)
        >>> round(matrix.backward_transfer(), 4), round(matrix.forgetting("chaudhry"), 4)
        (0.075, 0.025)

    References:
        Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, section 3.
        https://arxiv.org/abs/1706.08840
        Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, section 3. https://arxiv.org/abs/1801.10112
        Riemer et al., "Learning to Learn without Forgetting by Maximizing Transfer and Minimizing Interference",
        ICLR 2019 (learning accuracy). https://arxiv.org/abs/1810.11910
    """

    values: Sequence[Sequence[float]]
    baselines: Sequence[float] | None = None

    def __post_init__(self) -> None:
        stages = len(self.values)
        if not stages:
            raise ValueError("the matrix has no rows; expected one for each stage. Evaluate after each task.")
        for number, row in enumerate(self.values):
            if not number < len(row) <= stages:
                raise ValueError(
                    f"row {number} of the matrix has {len(row)} values; expected {number + 1} to {stages}, one for "
                    f"each of the {stages} tasks or up to the diagonal. Fill what was not evaluated with nan."
                )
        if self.baselines is not None and len(self.baselines) != stages:
            raise ValueError(
                f"`baselines` has {len(self.baselines)} values; expected one for each of the {stages} tasks."
            )

    def average_accuracy(self) -> float:
        """Return the mean of all tasks after the last stage."""
        last = len(self.values) - 1
        return _mean([self._at(last, task) for task in range(last + 1)])

    def learning_accuracy(self) -> float:
        """Return the mean of each task right after its own stage."""
        return _mean([self._at(task, task) for task in range(len(self.values))])

    def backward_transfer(self) -> float:
        """Return the mean change of the earlier tasks from their own stage to the last; below 0 where they were lost.

        Raises:
            ValueError: there is one task only, or a value is missing.
        """
        last = self._last("backward transfer")
        return _mean([self._at(last, task) - self._at(task, task) for task in range(last)])

    def forward_transfer(self) -> float:
        """Return how far the later tasks stand above their baselines before they are learned, on average.

        Raises:
            ValueError: there is one task only, there are no baselines, or one of them or of the values above the
                diagonal is missing.
        """
        last = self._last("forward transfer")
        if self.baselines is None:
            raise ValueError(
                "forward transfer compares with what a model scores that has learned nothing. Give `baselines`, each "
                "task's metric under random weights."
            )
        for task, value in enumerate(self.baselines[1:], 1):
            if not math.isfinite(value):
                raise ValueError(
                    f"the baseline of task {task} is {value}; expected a number. Evaluate it before stage 0."
                )
        return _mean([self._at(task - 1, task) - self.baselines[task] for task in range(1, last + 1)])

    def forgetting(self, definition: Definition) -> float:
        """Return the forgetting of the earlier tasks by one of four definitions; name it beside the value.

        With R[l, j] task j after stage l and T the last stage, the mean over all tasks j but the last of

        - "chaudhry": max over l in j..T-1 of R[l, j], less R[T, j]; below 0 where the last stage helped;
        - "mammoth": max over l in j..T of R[l, j], less R[T, j]; never below 0;
        - "avalanche": R[j, j] - R[T, j]; below 0 where later stages helped;
        - "lopez-paz": R[T, j] - R[j, j], the backward transfer: its sign is the other way round.

        Values above the diagonal, of tasks that were not learned yet, do not count.

        Args:
            definition: one of the four names.

        Raises:
            ValueError: the name is unknown, there is one task only, or a value is missing.

        Example:
            >>> matrix = TaskMatrix([[0.7], [0.9, 0.85], [0.8, 0.9, 0.95]])
            >>> {name: round(matrix.forgetting(name), 4) for name in ("lopez-paz", "chaudhry", "mammoth", "avalanche")}
            {'lopez-paz': 0.075, 'chaudhry': 0.025, 'mammoth': 0.05, 'avalanche': -0.075}
        """
        if definition not in get_args(Definition):
            names = ", ".join(f'"{name}"' for name in get_args(Definition))
            raise ValueError(f"`definition` is {definition!r}; expected one of {names}.")
        if definition == "lopez-paz":
            return self.backward_transfer()
        last = self._last("forgetting")
        found = []
        for task in range(last):
            end = {"avalanche": task + 1, "chaudhry": last, "mammoth": last + 1}[definition]
            found.append(max(self._at(stage, task) for stage in range(task, end)) - self._at(last, task))
        return _mean(found)

    def facts(self) -> dict[str, Any]:
        """Return the matrix and all measures of it that its values allow, for `recipe.json`.

        Example:
            >>> facts = TaskMatrix([[0.7], [0.9, 0.85]]).facts()
            >>> facts["values"], round(facts["backward_transfer"], 4), facts["forward_transfer"]
            ([[0.7], [0.9, 0.85]], 0.2, None)
        """
        measures: dict[str, Callable[[], float]] = {
            "average_accuracy": self.average_accuracy,
            "learning_accuracy": self.learning_accuracy,
            "backward_transfer": self.backward_transfer,
            "forward_transfer": self.forward_transfer,
        }
        return {
            "values": [[value if math.isfinite(value) else None for value in row] for row in self.values],
            "baselines": self.baselines and list(self.baselines),
            **{name: _or_none(measure) for name, measure in measures.items()},
            "forgetting": {name: _or_none(partial(self.forgetting, name)) for name in get_args(Definition)},
        }

    def _last(self, what: str) -> int:
        if len(self.values) < 2:
            raise ValueError(f"{what} is of one task on another; expected two stages or more, got 1.")
        return len(self.values) - 1

    def _at(self, stage: int, task: int) -> float:
        row = self.values[stage]
        value = row[task] if task < len(row) else math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"task {task} after stage {stage} is {value if task < len(row) else 'missing'}; expected a number. "
                "Evaluate that task at the end of that stage (both count from 0)."
            )
        return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _or_none(measure: Callable[[], float]) -> float | None:
    """Return a measure, or None where a value that it needs is missing."""
    with contextlib.suppress(ValueError):
        return measure()
    return None
