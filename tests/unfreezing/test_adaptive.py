"""Openings that a run's own record decides: the rule on histories, and what a real Trainer does with it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    PreflightError,
    PreflightWarning,
    WeightAnchoring,
    adapt,
    at_fractions,
    at_steps,
    attach,
    every,
    group_layers,
    layerwise_optimizer,
    schedule_from_probes,
    slanted_triangular,
)
from tl_callbacks.events import read
from tl_callbacks.frozen.state import frozen_by_us, set_frozen
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.unfreezing import ProbeSchedule
from tl_callbacks.unfreezing.adaptive import GRADIENT, Opening
from tl_callbacks.unfreezing.gradients import GradientMeter

LEVELS = [["head"], ["high"], ["middle"], ["low"]]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def logged(values: list[float], *, metric: str = "eval_loss", interval: int = 10) -> list[dict[str, Any]]:
    return [{metric: value, "step": interval * (place + 1)} for place, value in enumerate(values)]


def opened(schedule: ProbeSchedule, history: list[dict[str, Any]], *, step: int = 10**6) -> list[Opening]:
    return schedule.openings(LEVELS, history=history, step=step, max_steps=1000)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([1.0, 0.5, 0.25], {}, [(300, "latest"), (600, "latest"), (900, "latest")]),
        ([1.0, 0.8, 0.795], {}, [(30, "plateau"), (600, "latest"), (900, "latest")]),  # 0.795 is less than 1 % better
        ([1.0, 0.8, 0.79], {"threshold": 0.0}, [(300, "latest"), (600, "latest"), (900, "latest")]),
        ([1.0, 1.0, 1.0, 1.0], {}, [(20, "plateau"), (30, "plateau"), (40, "plateau")]),
        ([1.0, 1.0, 1.0, 1.0], {"patience": 2}, [(30, "plateau"), (600, "latest"), (900, "latest")]),
        ([1.0, 1.1, 0.9, 0.95, 1.0], {"patience": 2}, [(50, "plateau"), (600, "latest"), (900, "latest")]),
        ([1.0, 2.0, 4.0], {}, [(20, "plateau"), (30, "plateau"), (900, "latest")]),
        ([1.0, 2.0, 4.0], {"greater_is_better": True}, [(300, "latest"), (600, "latest"), (900, "latest")]),
        ([float("nan")] * 3, {}, [(20, "plateau"), (30, "plateau"), (900, "latest")]),
        ([1.0, 1.0], {"max_wait": 15}, [(15, "latest"), (20, "plateau"), (45, "latest")]),
    ],
)
def test_a_plateau_is_what_the_rule_says(
    values: list[float], options: dict[str, Any], expected: list[tuple[int, str]]
) -> None:
    found = opened(schedule_from_probes(**{"max_wait": 0.9, **options}), logged(values))
    assert [(opening.step, opening.reason["rule"]) for opening in found] == expected
    assert [opening.groups for opening in found] == [("high",), ("middle",), ("low",)]


@pytest.mark.parametrize(("metric", "lower"), [("eval_loss", True), ("eval_accuracy", False), ("tl/probe/low", False)])
def test_the_direction_follows_from_the_name(metric: str, lower: bool) -> None:
    falling = opened(schedule_from_probes(metric, max_wait=0.9), logged([1.0, 0.5, 0.25, 0.1], metric=metric))
    assert (falling[0].step == 300) is lower


@pytest.mark.parametrize(
    ("schedule", "fixed"),
    [
        (schedule_from_probes(max_wait=7), every(7)),
        (schedule_from_probes(max_wait=0.5), at_fractions([0.5 / 3, 1 / 3, 0.5])),
        (schedule_from_probes(max_wait=0.3, order="relative_gradient_norm"), at_fractions([0.1, 0.2, 0.3])),
    ],
)
@pytest.mark.parametrize("max_steps", [30, 100, 101])
def test_without_a_record_it_is_the_fixed_schedule(schedule: ProbeSchedule, fixed: Any, max_steps: int) -> None:
    latest = [opening.step for opening in schedule.openings(LEVELS, max_steps=max_steps)]
    assert latest == [stage.start for stage in fixed.in_steps(4, max_steps=max_steps)][1:]


@pytest.mark.parametrize("order", ["top_down", "relative_gradient_norm"])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_decided_does_not_change_with_what_comes_later(order: Any, seed: int) -> None:
    draw = random.Random(seed)
    schedule = schedule_from_probes(patience=1 + seed % 2, order=order, max_wait=12, measured_steps=1 + seed % 3)
    history: list[dict[str, Any]] = []
    before: list[Opening] = []
    for step in range(60):  # as a training goes: an evaluation, then the step, which may measure gradients
        if step % 3 == 0:
            history.append({"eval_loss": draw.random(), "step": step})
        now = opened(schedule, history, step=step)
        assert now == opened(schedule, json.loads(json.dumps(history)), step=step), "asked again, from a checkpoint"
        decided = [opening for opening in now if opening.step <= step]
        assert decided[: len(before)] == before
        assert all(opening.step >= step for opening in now[len(before) :]), "nothing opens in the past"
        before = decided
        if any(step in opening.measured for opening in now):
            history.append({f"{GRADIENT}{name}": draw.random() for (name,) in LEVELS[1:]} | {"step": step})
    assert len(before) == 3
    assert len({opening.step for opening in before}) > 1
    assert all(opening.step <= 12 * (place + 1) for place, opening in enumerate(before)), "never later than max_wait"


def test_the_group_with_the_largest_relative_gradient_opens_next() -> None:
    schedule = schedule_from_probes(order="relative_gradient_norm", max_wait=10, measured_steps=2)
    norms = [{"high": 1.0, "middle": 3.0, "low": 2.0}, {"high": 1.0, "middle": 1.0, "low": 3.0}]
    history = [
        {**{f"{GRADIENT}{name}": value for name, value in one.items()}, "step": 8 + place}
        for place, one in enumerate(norms)
    ]
    assert opened(schedule, history, step=9)[0].groups == ("high",), "not yet measured"
    first, second, last = opened(schedule, history, step=10)
    assert first == (
        10,
        ("low",),
        {
            "rule": "latest",
            "metric": "eval_loss",
            "values": [],
            "relative_gradient_norm": {"high": 1.0, "middle": 2.0, "low": 2.5},
        },
        (8, 9),
    )
    assert (second.groups, second.measured) == (("high",), (18, 19))
    assert (last.groups, last.measured) == (("middle",), ()), "the last one needs no measure"
    # Steps that a gradient scaler skipped measured nothing: the mean of the others, or the order of the layers.
    assert opened(schedule, history[:1], step=10)[0].groups == ("middle",)
    unmeasured = opened(schedule, [], step=10)[0]
    assert (unmeasured.groups, unmeasured.reason["relative_gradient_norm"]) == (("high",), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "bottom_up"}, "`order` is 'bottom_up'; expected one of top_down, relative_gradient_norm"),
        ({"patience": 0}, "`patience` is 0; expected a whole number from 1"),
        ({"measured_steps": 1.5}, r"`measured_steps` is 1\.5; expected a whole number"),
        ({"threshold": 1.0}, r"`threshold` is 1\.0; expected a share"),
        ({"max_wait": 0}, "`max_wait` is 0; expected the steps"),
        ({"max_wait": 1.0}, r"`max_wait` is 1\.0; .*the fraction of training"),
        ({"max_wait": True}, "`max_wait` is True"),
        ({"metric": ""}, "`metric` is ''; expected a key"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_probes(**options)


def test_too_little_time_to_measure_and_a_schedule_for_one_tower_are_refused() -> None:
    short = schedule_from_probes(order="relative_gradient_norm", measured_steps=4, max_wait=0.2)
    with pytest.raises(ValueError, match=r"leaves 2 steps for each of 3 openings, fewer than the 4"):
        short.openings(LEVELS, max_steps=30)
    with pytest.raises(ValueError, match=r"`max_steps` is None, but schedule_from_probes.* counts fractions"):
        short.openings(LEVELS)
    schedules: Any = {"*": schedule_from_probes()}
    with pytest.raises(ValueError, match=r"for each tower\. Give schedule_from_probes alone"):
        GradualUnfreezing(group_layers(tiny.bert()), schedules)


# --- on a real Trainer ---


def make(folder: Path, schedule: Any, *callbacks: TrainerCallback, **overrides: Any) -> Trainer:
    model = tiny.bert(layers=2)
    args = tiny.arguments(folder, **{**EVALUATED, "logging_steps": 1, **overrides})
    groups = group_layers(model)
    ours = [GradualUnfreezing(groups, schedule, rates=overrides.get("rates", "own")), *callbacks]
    return tiny.trainer(
        model, args, callbacks=ours, optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.7)
    )


def steps(trainer: Trainer) -> list[int]:
    return [event["step"] for event in read(trainer.state.log_history, "opening")]


@pytest.mark.parametrize("rates", ["own", slanted_triangular(), "shared"], ids=str)
def test_it_trains_as_the_fixed_schedule_of_the_same_openings(rates: Any, tmp_path: Path) -> None:
    def train(schedule: Any) -> tuple[Trainer, dict[str, torch.Tensor]]:
        model = tiny.bert(layers=2)
        args = tiny.arguments(tmp_path, **EVALUATED, logging_steps=1)
        groups = group_layers(model)
        optimizer = layerwise_optimizer(args, groups, decay=0.7)
        ours = [GradualUnfreezing(groups, schedule, rates=rates)]
        trainer = tiny.trainer(model, args, callbacks=ours, optimizer_cls_and_kwargs=optimizer)
        attach(trainer)
        trainer.train()
        return trainer, tiny.state(model)

    decided, ours = train(schedule_from_probes(patience=2, threshold=0.5, max_wait=0.9))
    fixed, theirs = train(at_steps([3, 5, 7]))
    _, apart = train(at_steps([5, 10, 11]))
    assert steps(decided) == steps(fixed) == [0, 3, 5, 7]
    assert tiny.moved(ours, theirs) == set()
    assert tiny.moved(ours, apart)
    callback = next(c for c in decided.callback_handler.callbacks if isinstance(c, GradualUnfreezing))
    found = callback.plan(12, history=decided.state.log_history, step=12)
    assert [phase.step for phase in found] == [0, 3, 5, 7]
    assert "latest" not in str(found)
    assert "decided up to step 0; openings after it are the latest possible" in str(callback.plan(40))


def test_the_event_holds_what_was_looked_at_as_json(tmp_path: Path) -> None:
    trainer = make(tmp_path, schedule_from_probes(patience=2, threshold=0.5, max_wait=0.9))
    attach(trainer)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    head, first, *_ = read(trainer.state.log_history, "opening")
    assert "decision" not in head
    assert first["decision"] == {
        "rule": "plateau",
        "metric": "eval_loss",
        "values": [[1, losses[1]], [2, losses[2]], [3, losses[3]]],
    }
    assert json.loads(json.dumps(first)) == first
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert [phase["step"] for phase in recipe["methods"]["GradualUnfreezing"]["plan"]] == [0, 3, 5, 7]


class Weights(TrainerCallback):
    """Copies the weights at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.held: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.held = tiny.state(kwargs["model"])
            self.frozen = frozen_by_us(kwargs["model"])


@pytest.mark.parametrize("taken_away", [True, False], ids=["as it is", "gradients left in place"])
def test_measuring_changes_nothing_of_the_steps_it_measures(
    taken_away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(schedule: Any) -> tuple[Trainer, Weights]:
        held = Weights(step=4)
        trainer = make(
            tmp_path,
            schedule,
            WeightAnchoring(0.5, form="penalty"),
            held,
            gradient_accumulation_steps=2,
            max_grad_norm=0.01,
        )
        attach(trainer)
        trainer.train()
        return trainer, held

    plain, _ = train(at_steps([4, 7, 8]))
    if not taken_away:
        monkeypatch.setattr(GradientMeter, "_taker", lambda self, name: lambda parameter: None)
    measured, held = train(
        schedule_from_probes(order="relative_gradient_norm", threshold=0.5, max_wait=0.9, measured_steps=2)
    )
    assert steps(plain) == steps(measured) == [0, 4, 7, 8]
    before = tiny.state(tiny.bert(layers=2))
    head = {name for name in before if name.startswith("classifier")}
    frozen = {name for name in before if name not in head}
    assert tiny.moved(before, held.held, frozen) == set()
    assert tiny.moved(before, held.held, head) == head
    earlier = [entry["grad_norm"] for entry in plain.state.log_history if "grad_norm" in entry][:4]
    ours = [entry["grad_norm"] for entry in measured.state.log_history if "grad_norm" in entry][:4]
    assert (earlier == ours) is taken_away
    logs = [entry for entry in measured.state.log_history if any(key.startswith(GRADIENT) for key in entry)]
    assert [entry["step"] for entry in logs] == [2, 3, 5, 6]
    if taken_away:
        assert all(value > 0 for entry in logs for key, value in entry.items() if key.startswith(GRADIENT))


def test_the_norms_are_those_of_autograd() -> None:
    model, rows = tiny.bert(layers=2).double().eval(), tiny.texts(8)
    groups = group_layers(model)
    batches = [
        {key: torch.tensor([row[key] for row in part]) for key in ("input_ids", "labels")}
        for part in (rows[:4], rows[4:])
    ]
    for batch in batches:
        (model(**batch).loss / 2).backward()
    parameters = parameters_by_name(model)
    names = {group.name: group.parameters for group in groups if group.name != groups.head}
    expected = {
        group: torch.linalg.vector_norm(torch.cat([parameters[n].grad.flatten() for n in held]))
        / torch.linalg.vector_norm(torch.cat([parameters[n].detach().flatten() for n in held]))
        for group, held in names.items()
    }
    model.zero_grad()
    below = [name for held in names.values() for name in held]
    set_frozen(model, frozenset(below))
    meter = GradientMeter(model, below)
    for batch in batches:
        (model(**batch).loss / 2 * 1024).backward()  # as under a gradient scaler
    found = meter.relative_norms(names, loss_scale=1024)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    assert all(parameters[name].grad is None for name in below)
    meter.remove()
    meter.remove()
    assert frozen_by_us(model) == frozenset(below)
    assert not any(parameters[name].requires_grad for name in below)


def test_a_group_of_zero_weights_comes_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.zero_()
    set_frozen(model, frozenset({"0.weight"}))
    meter = GradientMeter(model, ["0.weight"])
    model(torch.ones(1, 2)).sum().backward()
    (norm,) = meter.relative_norms({"zero": ["0.weight"]}).values()
    assert 1e6 < norm < float("inf")


class Boom(TrainerCallback):
    """Stops the run inside a step that measures."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_stopped_while_it_measures_leaves_nothing_behind(tmp_path: Path) -> None:
    schedule = schedule_from_probes(order="relative_gradient_norm", max_wait=0.9, threshold=0.5)
    trainer = make(tmp_path, schedule, Boom(), gradient_accumulation_steps=2)
    attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        assert parameter.requires_grad
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("schedule", "overrides", "message"),
    [
        (schedule_from_probes(), {"eval_strategy": "no"}, r"reads `eval_loss` .*eval_strategy is `no`. Set"),
        (schedule_from_probes(), {"eval_steps": 4}, r"cannot see a plateau before step 8, but .* by step 6. Evaluate"),
        (schedule_from_probes(max_wait=0.1, order="relative_gradient_norm"), {}, r"leaves 0\.4 steps for each of 3"),
    ],
)
def test_a_run_that_cannot_decide_is_refused(
    schedule: ProbeSchedule, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=message):
        attach(make(tmp_path, schedule, **overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval_steps": 2}, "opens a first group at step 3 whatever it sees. Evaluate every 1 steps"),
        ({"eval_steps": 1, "max_steps": 9}, "may leave `embeddings` frozen: its opening comes within 9 steps only if"),
        ({"eval_steps": 1, "eval_on_start": True}, "eval_on_start=True evaluates once more where a run is resumed"),
    ],
)
def test_what_works_but_should_be_known_is_said(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.warns(PreflightWarning, match=message):
        attach(make(tmp_path, schedule_from_probes(max_wait=3), **overrides))


def test_a_metric_that_no_evaluation_logs_is_an_error_with_near_names(tmp_path: Path) -> None:
    trainer = make(tmp_path, schedule_from_probes("eval_los", max_wait=0.9))
    attach(trainer)
    with pytest.raises(ValueError, match=r"reads `eval_los`, which the evaluation at step 1 did not log.*`?eval_loss"):
        trainer.train()


def test_a_strategy_takes_it_by_name(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, **EVALUATED)
    keywords = adapt(tiny.bert(layers=2), args, "gradual", schedule={"schedule_from_probes": {"max_wait": 0.9}})
    unfreezing = next(c for c in keywords["callbacks"] if isinstance(c, GradualUnfreezing))
    assert unfreezing.schedule == schedule_from_probes(max_wait=0.9)
