"""The rates under unfreezing: rules against the paper and against transformers, and what the live optimizer has."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, get_linear_schedule_with_warmup

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
    slanted_triangular,
    staged,
)
from tl_callbacks.unfreezing import UnfreezeSchedule


class Rates(TrainerCallback):
    """Notes the rate of each layer group that each step uses, and what is open."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({g["layer_group"]: g["lr"] for g in kwargs["optimizer"].param_groups})


def rates(
    folder: Path, schedule: UnfreezeSchedule, how: Any, *, decay: float = 1.0, **overrides: Any
) -> list[dict[str, float]]:
    model = tiny.bert(dropout=0.0)
    args = tiny.arguments(folder, max_steps=20, **overrides)
    groups = group_layers(model)
    notes = Rates()
    trainer = tiny.trainer(
        model,
        args,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=decay),
        callbacks=[GradualUnfreezing(groups, schedule, rates=how), notes],
    )
    attach(trainer)
    trainer.train()
    return notes.seen


def paper_triangle(t: int, steps: int, cut_frac: float, ratio: float) -> float:
    """ULMFiT, equation 3, as printed."""
    cut = math.floor(steps * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("cut_frac", "ratio"), [(0.1, 32), (0.25, 8), (0.5, 100)])
def test_slanted_triangular_is_the_papers(cut_frac: float, ratio: float) -> None:
    rule = slanted_triangular(cut_frac, ratio)
    ours = [rule(t, 200) for t in range(201)]
    assert ours == pytest.approx([paper_triangle(t, 200, cut_frac, ratio) for t in range(201)])
    assert max(ours) == 1
    assert min(ours) == pytest.approx(1 / ratio)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0.0, 32), "`cut_frac` is 0.0"), ((1.0, 32), "`cut_frac` is 1.0"), ((0.1, 1), "`ratio` is 1")],
)
def test_slanted_triangular_refuses(arguments: tuple[float, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        slanted_triangular(*arguments)


def test_shared_rates_are_the_trainers(tmp_path: Path) -> None:
    seen = rates(tmp_path, at_steps([5, 8, 10, 12]), "shared", warmup_steps=4)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    scheduler = get_linear_schedule_with_warmup(optimizer, 4, 20)
    for step in seen:
        assert set(step.values()) == {optimizer.param_groups[0]["lr"]}
        optimizer.step()
        scheduler.step()


def test_own_rates_warm_up_from_the_opening_and_are_not_decayed(tmp_path: Path) -> None:
    seen = rates(tmp_path, at_steps([5, 10, 10, 10]), "own")
    late = [step["encoder.layer.1"] for step in seen]
    assert late[10] == 0, "starts from 0 at its opening"
    assert max(late[10:]) == pytest.approx(1e-2), "reaches its own peak, long after the shared schedule decayed"
    assert late[-1] < 2e-3, "ends decayed"
    assert seen[10]["head"] == pytest.approx(5e-3), "the shared schedule is at half by then"
    shared = rates(tmp_path, at_steps([5, 10, 10, 10]), "shared")
    assert max(step["encoder.layer.1"] for step in shared[10:]) == pytest.approx(5e-3)


def test_own_rates_of_a_late_group_are_the_trainers_rule_over_its_own_time(tmp_path: Path) -> None:
    seen = rates(tmp_path, at_steps([4, 4, 4, 4]), "own", lr_scheduler_type="cosine", warmup_steps=0.25)
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 4, 16)  # a quarter of the 16 steps that are left
    for step in seen[4:]:
        assert step["embeddings"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_slanted_rates_keep_the_layerwise_ratios(tmp_path: Path) -> None:
    seen = rates(tmp_path, at_steps([0, 0, 0, 6]), slanted_triangular(0.25, 4), decay=0.5)
    rule = slanted_triangular(0.25, 4)
    for step, now in enumerate(seen):
        assert now["head"] == pytest.approx(1e-2 * rule(step, 20))
        assert now["encoder.layer.2"] == pytest.approx(0.5 * now["head"])
        if step >= 6:
            assert now["embeddings"] == pytest.approx(1e-2 * 0.5**4 * rule(step - 6, 14))


def test_stages_multiply_the_rates(tmp_path: Path) -> None:
    plain = rates(tmp_path, at_steps([0, 0, 0, 1]), "shared")
    seen = rates(tmp_path, staged([(0, 1), (6, 3, 0.5), (12, "all", 0.1)]), "shared")
    factors = [now["head"] / before["head"] for now, before in zip(seen, plain, strict=True)]
    assert factors == pytest.approx([1.0] * 6 + [0.5] * 6 + [0.1] * 8)


def test_rates_of_all_groups_are_logged_as_the_steps_used_them(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, max_steps=20, logging_steps=1)
    groups = group_layers(model)
    notes = Rates()
    trainer = tiny.trainer(
        model,
        args,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5),
        callbacks=[GradualUnfreezing(groups, at_steps([5, 8, 10, 12]), rates="own"), notes],
    )
    attach(trainer)
    trainer.train()
    logged = [
        {key.removeprefix("tl/rate/"): value for key, value in entry.items() if key.startswith("tl/rate/")}
        for entry in trainer.state.log_history
        if "tl/rate/head" in entry
    ]
    assert logged == notes.seen
    main = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert main == [step["head"] for step in notes.seen], "group 0 is the head's"
    assert list(logged[0]) == list(groups.names), "bottom to top"


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedulers_of_the_loss_are_refused_with_late_openings(kind: str, tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, lr_scheduler_type=kind, eval_strategy="steps", eval_steps=4)
    groups = group_layers(model)
    trainer = tiny.trainer(model, args, callbacks=[GradualUnfreezing(groups, at_steps([3, 4, 5, 6]))])
    with pytest.raises(ValueError, match=f"lr_scheduler_type={kind}"):
        attach(trainer)


def test_own_rates_need_our_groups(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path)
    groups = group_layers(model)
    optimizer = (torch.optim.SGD, {"lr": 1e-2})
    callbacks = [GradualUnfreezing(groups, at_steps([3, 4, 5, 6]), rates="own")]
    trainer = tiny.trainer(model, args, optimizer_cls_and_kwargs=optimizer, callbacks=callbacks)
    attach(trainer)
    with pytest.raises(ValueError, match="needs the groups of layerwise_optimizer"):
        trainer.train()


def test_a_late_group_warms_up_under_a_constant_schedule_too(tmp_path: Path) -> None:
    seen = rates(tmp_path, at_steps([5, 5, 5, 5]), "own", lr_scheduler_type="constant")
    late = [step["embeddings"] for step in seen[5:]]
    assert late == pytest.approx([0.0, 5e-3] + [1e-2] * 13), "a tenth of its 15 steps, rounded up"
    assert {step["head"] for step in seen} == {1e-2}


def test_a_stable_schedule_decays_within_a_late_groups_time(tmp_path: Path) -> None:
    kwargs = {"num_decay_steps": 12}
    schedule = at_steps([12, 12, 12, 12])
    seen = rates(tmp_path, schedule, "own", lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs)
    late = [step["embeddings"] for step in seen[12:]]
    assert max(late) == pytest.approx(1e-2)
    assert late[-1] < 5e-3
