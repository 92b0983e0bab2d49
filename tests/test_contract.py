"""What every exported callback must do, whatever it is for."""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import tl_callbacks
from tests import tiny
from tests.forgetting import memory
from tl_callbacks import (
    GradualUnfreezing,
    Recorder,
    RepresentationProbes,
    Strategy,
    WeightAnchoring,
    WeightInterpolation,
    at_steps,
    attach,
    group_layers,
)

HOOKS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
EXPORTED = {
    name: value
    for name, value in vars(tl_callbacks).items()
    if inspect.isclass(value) and issubclass(value, TrainerCallback)
}
MAKE: dict[str, Any] = {
    "ForgettingMonitor": lambda groups: memory.monitor(),
    "GradualUnfreezing": lambda groups: GradualUnfreezing(groups, at_steps([3, 5, 7, 9])),
    "Recorder": lambda groups: Recorder(groups, {}),
    "RepresentationProbes": lambda groups: RepresentationProbes("eval", groups, reference_set=tiny.texts(20, seed=9)),
    "Strategy": lambda groups: Strategy("full", {}, "trains everything"),
    "WeightAnchoring": lambda groups: WeightAnchoring(0.05),
    "WeightInterpolation": lambda groups: WeightInterpolation([0.5]),
}


def test_every_exported_callback_is_here() -> None:
    assert set(EXPORTED) == set(MAKE)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_hooks_take_any_keyword_and_the_repr_informs(name: str) -> None:
    callback = MAKE[name](group_layers(tiny.bert()))
    own = [hook for hook in HOOKS if getattr(type(callback), hook) is not getattr(TrainerCallback, hook)]
    for hook in own:
        kinds = [p.kind for p in inspect.signature(getattr(callback, hook)).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds, f"{name}.{hook} must take **kwargs"
        function = ast.parse(textwrap.dedent(inspect.getsource(getattr(type(callback), hook)))).body[0]
        assert isinstance(function, ast.FunctionDef)
        body = function.body[1:]  # without the docstring
        lines = body[-1].end_lineno - body[0].lineno + 1  # type: ignore[operator]
        assert lines <= 10, f"{name}.{hook} decides too much: {lines} lines"
    assert repr(callback).startswith(f"{name}(")
    assert "object at" not in repr(callback)
    assert not isinstance(callback, ExportableState)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_it_attaches_leaves_nothing_behind_and_draws_no_random_numbers(name: str, tmp_path: Path) -> None:
    def run(with_callback: bool) -> tuple[torch.Tensor, Any]:
        model = tiny.bert(dropout=0.0)  # no random number depends on what is frozen
        callbacks = [MAKE[name](group_layers(model))] if with_callback else []
        args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
        trainer = tiny.trainer(model, args, callbacks=callbacks)
        attach(trainer)
        trainer.train()
        return torch.get_rng_state(), model

    (plain, _), (ours, model) = run(False), run(True)
    assert torch.equal(plain, ours)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
