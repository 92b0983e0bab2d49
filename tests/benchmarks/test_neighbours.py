"""Two ranks: ours stay equal, the naive callbacks fail as they do, and what compares them can tell."""

import copy
from typing import Any

import pytest
import torch

from tests.benchmarks.neighbours import beside
from tests.benchmarks.neighbours.compare import LIGHTNING, TRAINER, Result, compare, neighbours, run, table
from tests.benchmarks.neighbours.script import PHASES, STEPS_PER_EPOCH

STEPS = len(PHASES) * STEPS_PER_EPOCH
launched = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("cell", [pytest.param(c, marks=launched) for c in ("ours", "ours, activation checkpointing")])
def test_ours_opens_layers_that_move_and_stay_equal(cell: str) -> None:
    result = run(TRAINER, cell, 0)
    assert (result.error, result.steps, result.apart_before) == (None, STEPS, 0)
    assert [opening.step for opening in result.openings] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    for opening in result.openings:
        assert opening.moved > 1e-3
        assert opening.unmoved == 0
        assert opening.apart == 0
    assert result.verdict == "ranks equal"


@pytest.mark.parametrize(
    ("cell", "verdict"),
    [
        pytest.param(*case, marks=launched)
        for case in (
            ("naive, frozen before train()", "no effect"),
            ("naive, frozen before train(), groups added", "zip() argument 2 is shorter"),
            ("naive, frozen before train(), groups and rates added", "ranks drift apart"),
            ("naive, frozen in on_train_begin, activation checkpointing", "Expected to have finished reduction"),
        )
    ],
)
def test_naive_callbacks_fail(cell: str, verdict: str) -> None:
    result = run(TRAINER, cell, 0)
    assert verdict in result.verdict
    if result.error is None:
        assert (result.steps, result.apart_before) == (STEPS, 0)
    if verdict == "ranks drift apart":
        assert all(opening.apart > 1e-3 for opening in result.openings)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not beside.make_importable(), reason="`make bench-neighbours` installs Lightning")
@pytest.mark.parametrize("cell", ["finetuning-scheduler, ddp", "BackboneFinetuning, ddp", "BaseFinetuning, ddp"])
def test_the_others_train_as_they_are_set_up(cell: str) -> None:
    """That they run and open what they should; whether their ranks stay equal is theirs."""
    result = run(LIGHTNING, cell, 0)
    assert (result.error, result.steps, result.apart_before) == (None, STEPS, 0)
    assert result.openings[0].step == STEPS_PER_EPOCH
    assert all(opening.moved > 0 for opening in result.openings)


def test_what_is_absent_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    trained: list[str] = []

    def note(module: str, cell: str, seed: int) -> Result:
        trained.append(module)
        return Result(cell, 0, None, (), None)

    monkeypatch.setattr("tests.benchmarks.neighbours.compare.run", note)
    monkeypatch.setattr(beside, "make_importable", lambda: False)
    found = neighbours()
    assert set(trained) == {TRAINER}
    assert "lightning" not in found["versions"]
    assert "`make bench-neighbours`" in found["left out"]
    assert found["left out"] in capsys.readouterr().err
    assert len(found["results"]) == len(trained) >= 10


def record() -> dict[str, Any]:
    """A rank that opens `low` in its third step."""
    values = [(0.0, 0.0), (1.0, 0.0), (2.0, 0.5), (3.0, 2.0)]
    return {
        "steps": [{"head": torch.tensor([head]), "low": torch.tensor([low])} for head, low in values],
        "open": [["head"], ["head"], ["head", "low"], ["head", "low"]],
        "error": None,
    }


def test_equal_ranks_are_told_from_drifting_ones() -> None:
    equal = compare("equal", [record(), record()])
    assert (equal.verdict, equal.apart_before, equal.steps) == ("ranks equal", 0, 4)
    (opening,) = equal.openings
    assert (opening.step, opening.parameters, opening.moved, opening.unmoved, opening.apart) == (2, 1, 2.0, 0, 0)
    other = copy.deepcopy(record())
    other["steps"][3]["low"] += 0.25
    drifting = compare("drifting", [record(), other])
    assert (drifting.verdict, drifting.openings[0].apart) == ("ranks drift apart", 0.25)
    assert table([equal, drifting]).splitlines()[2:] == [
        "| equal | 0 | 0 | 2.0e+00 | ranks equal |",
        "| drifting | 2.5e-01 | 2.5e-01 | 2.0e+00 | ranks drift apart |",
    ]


def test_no_effect_and_errors_are_told() -> None:
    still = record()
    for step in still["steps"]:
        step["low"].zero_()
    assert compare("still", [still, still]).verdict == "no effect: what opened did not move"
    shut = {**record(), "open": [["head"]] * 4}
    assert compare("shut", [shut, shut]).verdict == "nothing opened"
    broken = {**record(), "error": "ValueError: no. Not at all.\nNever."}
    assert compare("broken", [record(), broken]).verdict == "error after step 4: ValueError: no"
