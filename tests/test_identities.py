"""Settings that must change nothing: bit for bit the plain Trainer's trajectory."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.training_args import OptimizerNames

from tests import tiny
from tests.forgetting import memory
from tl_callbacks import (
    GradualUnfreezing,
    NoEffectWarning,
    RepresentationProbes,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
)
from tl_callbacks.anchoring import Decoupled, sigmoid_annealing

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no clipping": {"max_grad_norm": 0.0},
    "tight clipping": {"max_grad_norm": 0.05},
    "accumulation": {"gradient_accumulation_steps": 3},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3},
}


def train(
    folder: Path, *, neutral: str | None, model: Any = None, **overrides: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Train once, plain or with a neutral setting of ours, and return the final weights."""
    model = tiny.bert() if model is None else model
    args = tiny.arguments(folder, **overrides)
    groups = group_layers(model)
    kwargs: dict[str, Any] = {}
    if neutral in ("factory", "all"):
        kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups)
    callbacks = {
        "unfreezing": [GradualUnfreezing(groups, at_steps([0] * (len(groups) - 1)))],
        "unfreezing, own rates": [GradualUnfreezing(groups, at_steps([0] * (len(groups) - 1)), rates="own")],
        "decoupled": [WeightAnchoring(0.0)],
        "penalty": [WeightAnchoring(0.0, form="penalty")],
        "mixout": [WeightAnchoring(0.0, form="mixout")],
        "annealing": [WeightAnchoring(0.0, form=Decoupled(annealing=sigmoid_annealing(0.1, 4)))],
        "features": [WeightAnchoring(0.0, form="features")],
        "outputs": [WeightAnchoring(0.0, form="outputs")],
        "probes": [RepresentationProbes("eval", groups, reference_set=tiny.texts(20, seed=9))],
        "probes, a pass of their own": [RepresentationProbes(tiny.texts(20, seed=8), groups, pooling="last")],
        "forgetting": [memory.monitor()],
        "all": [
            GradualUnfreezing(groups, at_steps([0] * (len(groups) - 1)), rates="own"),
            WeightAnchoring(0.0),
            RepresentationProbes("eval", groups),
            memory.monitor(),
        ],
    }.get(neutral or "", [])
    trainer = tiny.trainer(model, args, callbacks=callbacks, **kwargs)
    if neutral is not None:
        attach(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        trainer.train()
    return tiny.state(model), trainer


NEUTRAL = [
    "attached",
    "factory",
    "unfreezing",
    "unfreezing, own rates",
    "decoupled",
    "penalty",
    "features",
    "outputs",
    "probes",
    "probes, a pass of their own",
    "forgetting",
    "all",
]


@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("setting", SETTINGS)
def test_neutral_settings_follow_the_plain_trainer(neutral: str, setting: str, tmp_path: Path) -> None:
    start = tiny.state(tiny.bert())
    plain, _ = train(tmp_path / "plain", neutral=None, **SETTINGS[setting])
    ours, _ = train(tmp_path / "ours", neutral=neutral, **SETTINGS[setting])
    assert tiny.moved(plain, ours) == set()
    assert len(tiny.moved(start, plain)) > 30, "the control must move"


def test_a_setting_that_is_not_neutral_is_seen(tmp_path: Path) -> None:
    plain, _ = train(tmp_path / "plain", neutral=None)
    model = tiny.bert()
    args = tiny.arguments(tmp_path / "ours")
    trainer = tiny.trainer(
        model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, group_layers(model), decay=0.999999)
    )
    attach(trainer)
    trainer.train()
    assert tiny.moved(plain, tiny.state(model))


def test_neutral_settings_hold_for_a_peft_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def lora() -> Any:
        torch.manual_seed(0)
        return get_peft_model(
            tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", lora_dropout=0.1)
        )

    plain, _ = train(tmp_path / "plain", neutral=None, model=lora())
    ours, _ = train(tmp_path / "ours", neutral="all", model=lora())
    assert tiny.moved(plain, ours) == set()
    assert tiny.moved(tiny.state(lora()), plain)


# What `--optim` names, by what becomes of it on a CPU. A new name in a new release belongs in one of the three.
RUN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
REFUSED = {
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "lomo", "adalomo", "apollo_adamw", "apollo_adamw_layerwise",
}  # fmt: skip
NEED_A_PACKAGE_OR_DEVICE = {
    "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit",
    "ademamix", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
    "schedule_free_sgd", "stable_adamw",
}  # fmt: skip


def test_every_optimizer_name_is_accounted_for() -> None:
    assert {name.value for name in OptimizerNames} == RUN | REFUSED | NEED_A_PACKAGE_OR_DEVICE


@pytest.mark.parametrize("name", sorted(RUN))
def test_every_optimizer_follows_the_plain_trainer(name: str, tmp_path: Path) -> None:
    start = tiny.state(tiny.bert())
    plain, _ = train(tmp_path / "plain", neutral=None, optim=name, max_steps=4)
    ours, _ = train(tmp_path / "ours", neutral="factory", optim=name, max_steps=4)
    assert tiny.moved(plain, ours) == set()
    assert len(tiny.moved(start, plain)) > 30


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_optimizer_with_rules_of_its_own_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, optim=name, optim_target_modules="all-linear")
    trainer = tiny.trainer(model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, group_layers(model)))
    with pytest.raises(ValueError, match=f"optim={name} .*Choose another"):
        attach(trainer)
    with pytest.raises(ValueError, match=f"optim={name} .*Choose another"):
        trainer.create_optimizer()
