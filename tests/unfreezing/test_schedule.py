"""The schedules, with integers."""

import pytest

from tl_callbacks import LayerGroup, LayerGroups, at_fractions, at_steps, every, per_epoch, staged
from tl_callbacks.unfreezing import UnfreezeSchedule
from tl_callbacks.unfreezing.plan import make_plan

GROUPS = LayerGroups(tuple(LayerGroup(name, (name,), (2,)) for name in ("a", "b", "c", "head")), "head")
ALL = [
    every(7),
    per_epoch(2),
    at_steps([0, 3, 3]),
    at_fractions([0.0, 0.31, 0.5]),
    staged([(0, 2), (0.25, 3, 0.5), (0.5, "all", 0.1)]),
    staged([(12, "all")]),
]


def opening_steps(schedule: UnfreezeSchedule, max_steps: int = 100, steps_per_epoch: int = 10) -> dict[str, int | None]:
    plan = make_plan(GROUPS, schedule, (), max_steps=max_steps, steps_per_epoch=steps_per_epoch)
    return {name: plan.opening_step(name) for name in GROUPS.names}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (every(10), {"head": 0, "c": 10, "b": 20, "a": 30}),
        (per_epoch(), {"head": 0, "c": 10, "b": 20, "a": 30}),
        (per_epoch(2), {"head": 0, "c": 10, "b": 10, "a": 20}),
        (at_steps([0, 5]), {"head": 0, "c": 0, "b": 5, "a": None}),
        (at_steps([]), {"head": 0, "c": None, "b": None, "a": None}),
        (at_fractions([0.1, 0.2, 0.301]), {"head": 0, "c": 10, "b": 20, "a": 31}),
        (staged([(0, 1), (0.2, 3, 1 / 3), (0.5, "all", 0.1)]), {"head": 0, "c": 20, "b": 20, "a": 50}),
        (staged([(99, "all")]), {"head": 0, "c": 99, "b": 99, "a": 99}),
        (staged([(100, "all")]), {"head": 0, "c": None, "b": None, "a": None}),
    ],
    ids=repr,
)
def test_opening_steps(schedule: UnfreezeSchedule, expected: dict[str, int | None]) -> None:
    assert opening_steps(schedule) == expected


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_open_groups_never_shrink_and_agree_with_the_plan(schedule: UnfreezeSchedule) -> None:
    plan = make_plan(GROUPS, schedule, (), max_steps=100, steps_per_epoch=10)
    counts = [schedule.open_groups(s, num_groups=4, max_steps=100, steps_per_epoch=10) for s in range(100)]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert counts[0] < 4
    assert counts == [len(plan.at(step).open) for step in range(100)]
    assert all(plan.at(step).open[-1] == "head" for step in range(100))


def test_a_fraction_is_rounded_up_to_a_step_but_not_by_floating_point() -> None:
    assert at_fractions([0.1]).in_steps(4, max_steps=30)[1].start == 3  # 0.1 * 30 is 3.0000000000000004
    assert at_fractions([0.1]).in_steps(4, max_steps=31)[1].start == 4


def test_an_unbounded_schedule_answers_without_a_number_of_groups() -> None:
    assert every(200).open_groups(step=450) == 3
    assert at_steps([5, 5, 8]).open_groups(step=8) == 4
    with pytest.raises(ValueError, match="`num_groups` is None"):
        staged([(3, "all")]).open_groups(step=5)


def test_lengths_that_are_needed_and_missing() -> None:
    with pytest.raises(ValueError, match="`max_steps` is None"):
        at_fractions([0.5]).open_groups(step=1)
    with pytest.raises(ValueError, match="`steps_per_epoch` is None"):
        per_epoch().open_groups(step=1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: every(0), "`steps` is 0; expected a whole number from 1"),
        (lambda: every(2.5), "`steps` is 2.5"),  # type: ignore[arg-type]
        (lambda: per_epoch(True), "`n` is True"),
        (lambda: at_steps([3, 1]), "not ascending"),
        (lambda: at_steps([-1]), "start -1 is out of range; expected steps, 0 or more"),
        (lambda: at_steps([0.5]), "step 0.5 is not a whole number; for shares of the training use at_fractions"),  # type: ignore[list-item]
        (lambda: at_fractions([1.0]), r"start 1.0 is out of range; expected fractions in \[0, 1\)"),
        (lambda: staged([(0,)]), "1 parts; expected"),
        (lambda: staged([(0, 0)]), "groups 0 in stage"),
        (lambda: staged([(0, 1.5)]), "groups 1.5 in stage"),
        (lambda: staged([(0, 1, 0)]), "factor 0 in stage"),
        (lambda: staged([("x", 1)]), "start 'x' in stage"),
        (lambda: staged([(5, 2), (0.5, 3)]), "use one of the two"),
        (lambda: staged([(5, 2), (6, 1)]), "opens fewer groups"),
    ],
)
def test_bad_schedules_are_refused(make: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()  # type: ignore[operator]


def test_held_groups_are_left_out_of_the_count() -> None:
    plan = make_plan(GROUPS, every(10), ("b",), max_steps=100, steps_per_epoch=None)
    assert plan.opening_step("a") == 20
    assert plan.opening_step("b") is None
    assert plan.never == ()
    assert "held frozen: b" in str(plan)


def test_the_plan_prints_what_never_opens_and_counts_parameters() -> None:
    plan = make_plan(GROUPS, every(40), (), max_steps=100, steps_per_epoch=20)
    assert plan.never == ("a",)
    assert "never opens: a" in str(plan)
    assert [phase.num_parameters for phase in plan] == [2, 4, 6]
    assert [phase.epoch for phase in plan] == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_repr_makes_the_schedule_again(schedule: UnfreezeSchedule) -> None:
    names = {
        "every": every,
        "per_epoch": per_epoch,
        "at_steps": at_steps,
        "at_fractions": at_fractions,
        "staged": staged,
    }
    text = repr(schedule).replace("None", "'all'")
    assert eval(text, names) == schedule
