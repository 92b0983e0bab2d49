"""The measures of a sequence of tasks, by the names of those who defined them."""

import json
import math
import random

import pytest

from tl_callbacks.forgetting import TaskMatrix

ROWS = [[0.7], [0.9, 0.85], [0.8, 0.9, 0.95]]
NAN = math.nan


def test_four_definitions_four_values_two_signs_on_one_matrix() -> None:
    for values in (ROWS, [[0.7, NAN, NAN], [0.9, 0.85, NAN], [0.8, 0.9, 0.95]]):
        matrix = TaskMatrix(values)
        found = {name: matrix.forgetting(name) for name in ("lopez-paz", "chaudhry", "mammoth", "avalanche")}  # type: ignore[arg-type]
        assert found == pytest.approx({"lopez-paz": 0.075, "chaudhry": 0.025, "mammoth": 0.05, "avalanche": -0.075})
        assert matrix.backward_transfer() == pytest.approx(0.075)
        assert matrix.average_accuracy() == pytest.approx((0.8 + 0.9 + 0.95) / 3)
        assert matrix.learning_accuracy() == pytest.approx((0.7 + 0.85 + 0.95) / 3)


def test_the_facts_are_the_measures_and_null_where_a_value_is_missing() -> None:
    matrix = TaskMatrix([[0.7, NAN, NAN], [0.9, 0.85, NAN], [0.8, 0.9, 0.95]])
    facts = json.loads(json.dumps(matrix.facts(), allow_nan=False))
    assert facts["values"] == [[0.7, None, None], [0.9, 0.85, None], [0.8, 0.9, 0.95]]
    assert facts["forgetting"] == {name: matrix.forgetting(name) for name in facts["forgetting"]}  # type: ignore[arg-type]
    assert (facts["backward_transfer"], facts["forward_transfer"]) == (matrix.backward_transfer(), None)
    assert TaskMatrix([[0.7]]).facts()["forgetting"] == dict.fromkeys(facts["forgetting"])
    full = TaskMatrix([[0.9, 0.4], [0.8, 0.9]], baselines=[0.1, 0.3])
    assert full.facts()["forward_transfer"] == full.forward_transfer()


def test_forward_transfer_reads_what_stands_above_the_diagonal() -> None:
    matrix = TaskMatrix([[0.9, 0.4, 0.2], [0.8, 0.9, 0.5], [0.7, 0.8, 0.9]], baselines=[0.1, 0.3, 0.3])
    assert matrix.forward_transfer() == pytest.approx(((0.4 - 0.3) + (0.5 - 0.3)) / 2)
    with pytest.raises(ValueError, match="task 1 after stage 0 is missing"):
        TaskMatrix(ROWS, baselines=[0.1] * 3).forward_transfer()
    with pytest.raises(ValueError, match="Give `baselines`"):
        TaskMatrix(ROWS).forward_transfer()


def test_what_holds_of_every_matrix() -> None:
    draw = random.Random(0)
    for size in range(2, 7):
        rows = [[draw.random() for _ in range(size)] for _ in range(size)]
        matrix = TaskMatrix(rows)
        assert matrix.forgetting("avalanche") == pytest.approx(-matrix.backward_transfer())
        assert matrix.forgetting("mammoth") >= max(0.0, matrix.forgetting("chaudhry"))
        assert matrix.forgetting("chaudhry") >= matrix.forgetting("avalanche") - 1e-12
        lowered = [*rows[:-1], [value - 0.1 for value in rows[-1]]]
        assert TaskMatrix(lowered).forgetting("chaudhry") == pytest.approx(matrix.forgetting("chaudhry") + 0.1)
        above = [[value if j <= i else 9.0 for j, value in enumerate(row)] for i, row in enumerate(rows)]
        assert TaskMatrix(above).forgetting("mammoth") == matrix.forgetting("mammoth"), "not learned yet, not forgotten"


ERRORS = {
    "no rows": ([], "has no rows"),
    "too short": ([[0.7], [0.9]], "row 1 of the matrix has 1 values; expected 2 to 2"),
    "too long": ([[0.7, 0.1, 0.2], [0.9, 0.8]], "row 0 of the matrix has 3 values; expected 1 to 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_matrix_of_another_shape_is_refused(name: str) -> None:
    values, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        TaskMatrix(values)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="task 1 after stage 2 is nan; expected a number"):
        TaskMatrix([[0.7], [0.9, 0.85], [0.8, NAN, 0.95]]).backward_transfer()
    with pytest.raises(ValueError, match="expected two stages or more, got 1"):
        TaskMatrix([[0.7]]).forgetting("chaudhry")
    square = [[0.7, 0.1], [0.9, 0.8]]
    assert TaskMatrix(square, baselines=[NAN, 0.1]).forward_transfer() == 0.0, "that of the first task does not count"
    with pytest.raises(ValueError, match="the baseline of task 1 is nan; expected a number"):
        TaskMatrix(square, baselines=[0.1, NAN]).forward_transfer()
    with pytest.raises(ValueError, match="`definition` is 'gem'; expected one of \"lopez-paz\""):
        TaskMatrix(ROWS).forgetting("gem")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`baselines` has 2 values; expected one for each of the 3 tasks"):
        TaskMatrix(ROWS, baselines=[0.1, 0.2])
