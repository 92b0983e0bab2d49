"""fp16: the penalty under a loss scale, and steps that the gradient scaler skips."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests import scaler, tiny
from tl_callbacks import GradualUnfreezing, WeightAnchoring, at_steps, attach, group_layers, staged
from tl_callbacks.anchoring import Decoupled, Penalty
from tl_callbacks.events import read

OPTIMIZERS = ["sgd", "adamw_torch", "adamw_torch_fused"]
OVERFLOWS = (2, 5, 6)


class Steps(TrainerCallback):
    """Keeps the weights before and after each step, and the rates that it used."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append({group.get("layer_group", ""): group["lr"] for group in kwargs["optimizer"].param_groups})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))


def reference() -> dict[str, torch.Tensor]:
    """Weights away from the start, so that anchors pull from the first step."""
    return tiny.state(tiny.bert(seed=3))


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def penalised(folder: Path, strength: float, *, fp16: bool, optim: str, scale: float = 1.0, **overrides: Any) -> Any:
    """The end of a training with a penalty, with a loss scale or without."""
    model = tiny.bert(dropout=0.0)
    # A large epsilon, because Adam makes steps of full size out of the rounding of gradients that should be zero.
    args = tiny.arguments(folder, fp16=fp16, optim=optim, adam_epsilon=1e-3, **overrides)
    anchors = [WeightAnchoring(strength, form="penalty", reference=reference())] if strength else []
    trainer = scaler.trainer(model, args, half=False, scale=scale, callbacks=anchors)
    attach(trainer)
    trainer.train()
    if fp16:
        assert trainer.accelerator.scaler.get_scale() == scale * 2**4, "the scale doubles after every third step"
    return tiny.state(model)


@pytest.mark.parametrize(
    ("scale", "overrides"),
    [
        (2.0**16, {"optim": "sgd"}),
        (2.0**-8, {"optim": "adamw_torch"}),
        (2.0**16, {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
        (2.0**16, {"optim": "adamw_torch_fused", "max_grad_norm": 0.0}),
    ],
    ids=["sgd", "small scale", "accumulation and clipping", "no clipping"],
)
def test_the_penalty_does_not_depend_on_the_loss_scale(scale: float, overrides: dict[str, Any], tmp_path: Path) -> None:
    free = penalised(tmp_path, 0.0, fp16=False, **overrides)
    exact = penalised(tmp_path, 0.5, fp16=False, **overrides)
    scaled = penalised(tmp_path, 0.5, fp16=True, scale=scale, **overrides)
    effect = largest_gap(free, exact)
    assert effect > 1e-4, "the control: the penalty must change the run"
    assert largest_gap(exact, scaled) < 1e-4 * effect


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_penalty_that_is_not_scaled_with_the_loss_is_seen(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = penalised(tmp_path, 0.5, fp16=False, optim=optim)
    effect = largest_gap(penalised(tmp_path, 0.0, fp16=False, optim=optim), exact)
    note = Penalty.begin_step

    def unscaled(self: Penalty, optimizer: Any, state: Any) -> None:
        note(self, optimizer, state)
        self._loss_scale = 1.0

    monkeypatch.setattr(Penalty, "begin_step", unscaled)
    assert largest_gap(exact, penalised(tmp_path, 0.5, fp16=True, scale=2.0**16, optim=optim)) > 0.1 * effect


def skipping(folder: Path, callbacks: list[Any], *, model: Any = None, **overrides: Any) -> tuple[Any, Steps]:
    """A training in float16 with overflows."""
    model = tiny.bert() if model is None else model
    steps = Steps()
    args = tiny.arguments(folder, **{"fp16": True, "logging_steps": 1, **overrides})
    trainer = scaler.trainer(model, args, overflows=OVERFLOWS, callbacks=[*callbacks, steps])
    attach(trainer)
    trainer.train()
    return trainer, steps


def still(steps: Steps) -> list[int]:
    """The steps at which no tensor moved."""
    pairs = zip(steps.states, steps.states[1:], strict=False)
    return [step for step, (before, after) in enumerate(pairs) if not tiny.moved(before, after)]


@pytest.mark.parametrize("form", ["decoupled", "penalty"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_anchor_moves_nothing_on_a_skipped_step(optim: str, form: Any, tmp_path: Path) -> None:
    trainer, steps = skipping(tmp_path, [WeightAnchoring(0.1, form=form, reference=reference())], optim=optim)
    assert still(steps) == list(OVERFLOWS)
    assert trainer.accelerator.scaler.get_scale() == 2**8, "halved three times, doubled after steps 7 to 9"
    assert len(steps.states) == 13, "skipped steps count"


def test_a_pull_that_does_not_ask_whether_the_step_counts_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = Decoupled._pull

    def always(self: Decoupled, optimizer: Any, args: Any, kwargs: Any) -> None:
        found, optimizer.found_inf = optimizer.found_inf, None
        pull(self, optimizer, args, kwargs)
        optimizer.found_inf = found

    monkeypatch.setattr(Decoupled, "_pull", always)
    anchors = [WeightAnchoring(0.1, reference=reference())]
    assert still(skipping(tmp_path, anchors, optim="adamw_torch_fused")[1]) == []


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_groups_open_by_the_step_although_steps_are_skipped(optim: str, tmp_path: Path) -> None:
    model = tiny.bert()
    groups = group_layers(model)
    # Groups open at a skipped step, between skipped steps and after them.
    unfreezing = GradualUnfreezing(groups, at_steps([2, 4, 5, 8]))
    trainer, steps = skipping(tmp_path, [unfreezing], model=model, optim=optim)
    plan = unfreezing.plan(max_steps=12)
    assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, 2, 4, 5, 8]
    for step in range(12):
        before, after = steps.states[step], steps.states[step + 1]
        moved = {group.name for group in groups if tiny.moved(before, after, group.parameters)}
        assert moved == (set() if step in OVERFLOWS else set(plan.at(step).open)), step


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_the_infinite_norm_of_a_skipped_step_does_not_stop_the_run(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "environment":  # what `accelerate launch --mixed_precision fp16` sets
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    trainer, _ = skipping(tmp_path, [], fp16=source == "argument")
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [step for step, norm in enumerate(norms) if not torch.isfinite(torch.tensor(norm))] == list(OVERFLOWS)


def callbacks_of(name: str, model: Any) -> list[Any]:
    groups = group_layers(model)
    return {
        "unfreezing": [GradualUnfreezing(groups, at_steps([2, 4, 5, 8]), rates="own")],
        "stages": [GradualUnfreezing(groups, staged([(0, 1), (4, 2, 0.5), (8, "all", 0.1)]))],
        "decoupled": [WeightAnchoring(0.1, reference=reference())],
        "penalty": [WeightAnchoring(0.1, form="penalty", reference=reference())],
    }[name]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", ["unfreezing", "stages", "decoupled", "penalty"])
def test_a_run_with_skipped_steps_resumes_to_the_same_end(name: str, optim: str, tmp_path: Path) -> None:
    def run(resume: str | None, **overrides: Any) -> tuple[Any, Steps]:
        model, steps = tiny.bert(), Steps()
        args = tiny.arguments(tmp_path, fp16=True, optim=optim, logging_steps=1, **overrides)
        callbacks = [*callbacks_of(name, model), steps]
        trainer = scaler.trainer(model, args, overflows=OVERFLOWS, callbacks=callbacks)
        attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, steps

    straight, whole = run(None, save_strategy="steps", save_steps=3)
    for step in (3, 6, 9):  # before skipped steps, between two of them, after them
        resumed, rest = run(str(tmp_path / f"checkpoint-{step}"))
        assert tiny.moved(whole.states[-1], rest.states[-1]) == set()
        assert rest.rates == whole.rates[step:]
        assert resumed.accelerator.scaler.state_dict() == straight.accelerator.scaler.state_dict()
        assert tiny.moved(whole.states[step], whole.states[-1]), "the checkpoint must not be the end already"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", ["lp_ft", "own"])
def test_rates_keep_up_with_the_openings_although_the_scheduler_waits(name: str, optim: str, tmp_path: Path) -> None:
    # The Trainer's scheduler stands still on a skipped step, except with a fused optimizer; three come before step 8.
    model = tiny.bert()
    groups = group_layers(model)
    if name == "lp_ft":
        unfreezing = GradualUnfreezing(groups, staged([(8, "all", 0.1)]))
    else:
        unfreezing = GradualUnfreezing(groups, at_steps([8, 8, 8, 8]), rates="own")
    trainer, steps = skipping(tmp_path, [unfreezing], model=model, optim=optim)
    behind = 0 if "fused" in optim else len(OVERFLOWS)
    assert trainer.lr_scheduler.last_epoch == 12 - behind
    shared = [1e-2 * (1 - (step - behind) / 12) for step in range(8, 12)]
    late = [0.0, *(1e-2 * (1 - step / 3) for step in range(3))]  # a warm-up of one step, then three of decay
    assert [rates["head"] for rates in steps.rates[8:]] == pytest.approx(
        [0.1 * rate for rate in shared] if name == "lp_ft" else shared
    )
    assert [rates["embeddings"] for rates in steps.rates[8:]] == pytest.approx(
        [0.1 * rate for rate in shared] if name == "lp_ft" else late
    )
    assert steps.rates[7]["head"] == pytest.approx(1e-2 * (1 - (7 - behind) / 12))
