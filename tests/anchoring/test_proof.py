"""A resumed run proves that its reference is the one it began with, and says where it lives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from tests import tiny
from tests.anchoring.test_reference import bert_from_body
from tl_callbacks import PreflightError, WeightAnchoring, attach, events
from tl_callbacks.anchoring import Outputs

STEPS, CHECKPOINT = 6, 3


def make(folder: Path, model: nn.Module, **options: Any) -> Trainer:
    options = {"strength": 0.2, **options}
    args = tiny.arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=CHECKPOINT)
    trainer = tiny.trainer(model, args, callbacks=[WeightAnchoring(**options)])
    attach(trainer)
    return trainer


def lora(seed: int, base: int = 0, **config: Any) -> nn.Module:
    model = tiny.bert(layers=1, seed=base)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **config))


def old_head(seed: int) -> nn.Module:
    width = tiny.bert().config.hidden_size
    torch.manual_seed(seed)
    return nn.Linear(width, 4)


def loaded(folder: Path) -> nn.Module:
    model: nn.Module = type(tiny.bert()).from_pretrained(folder / f"checkpoint-{CHECKPOINT}")
    return model


def given(seed: int) -> dict[str, Tensor]:
    return tiny.state(tiny.bert(seed=seed))


# What the first start makes, and what the resumed one does: the model, the options and whether it is refused.
Start = tuple[Callable[[Path], nn.Module], dict[str, Any]]
BERT: Start = (lambda folder: tiny.bert(), {})
RESUMES: dict[str, tuple[Start, Start, bool]] = {
    "the same": (BERT, BERT, False),
    "another seed": (BERT, (lambda folder: tiny.bert(seed=3), {}), True),
    "another strength": (BERT, (BERT[0], {"strength": 0.1}), False),
    "another form": (BERT, (BERT[0], {"form": "penalty"}), False),
    "other groups": (BERT, (BERT[0], {"exclude": ("embeddings", "head")}), True),
    "other groups by strength": (BERT, (BERT[0], {"strength": {"encoder.layer.*": 0.2}}), True),
    "the same, given": (BERT, (BERT[0], {"reference": given(0)}), False),
    "the same, in bfloat16": (BERT, (BERT[0], {"reference_dtype": torch.bfloat16, "reference_device": "cpu"}), False),
    "a checkpoint, and the pretrained weights given": (BERT, (loaded, {"reference": given(0)}), False),
    "a checkpoint, and other weights given": (BERT, (loaded, {"reference": given(3)}), True),
    "LoRA, another seed of the adapter": ((lambda folder: lora(0), {}), (lambda folder: lora(1), {}), False),
    "LoRA, another base": ((lambda folder: lora(0), {}), (lambda folder: lora(0, base=1), {}), True),
    "old outputs, another old head": (
        (lambda folder: tiny.bert(), {"form": Outputs(old_head=old_head(0))}),
        (lambda folder: tiny.bert(), {"form": Outputs(old_head=old_head(1))}),
        True,
    ),
    "old outputs, the same old head": (
        (lambda folder: tiny.bert(), {"form": Outputs(old_head=old_head(0))}),
        (lambda folder: tiny.bert(), {"form": Outputs(old_head=old_head(0)), "strength": 0.3}),
        False,
    ),
    "LoRA in mixout, another seed": (
        (lambda folder: lora(0), {"form": "mixout"}),
        (lambda folder: lora(1), {"form": "mixout"}),
        True,
    ),
    "DoRA, another seed": (
        (lambda folder: lora(0, use_dora=True), {}),
        (lambda folder: lora(1, use_dora=True), {}),
        True,
    ),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_has_the_reference_it_began_with(name: str, tmp_path: Path) -> None:
    (first, options), (second, others), refused = RESUMES[name]
    straight = make(tmp_path, first(tmp_path), **options)
    straight.train()
    began = events.read(straight.state.log_history, "anchoring")
    assert len(began) == 1
    resumed = make(tmp_path, second(tmp_path), **others)
    source = f"{tmp_path}/checkpoint-{CHECKPOINT}"
    if refused:
        text = r"WeightAnchoring has the reference \w+ \(\d+ tensors\), and the run that is resumed began with \w+ \("
        with pytest.raises(RuntimeError, match=text):
            resumed.train(resume_from_checkpoint=source)
        assert resumed.state.global_step == CHECKPOINT, "before the first step"
    else:
        resumed.train(resume_from_checkpoint=source)
        assert events.read(resumed.state.log_history, "anchoring") == began
        if others.keys() <= {"reference"} and name != "LoRA, another seed of the adapter":
            assert straight.model is not None
            assert resumed.model is not None
            assert not tiny.moved(tiny.state(straight.model), tiny.state(resumed.model))


@pytest.mark.parametrize(("form", "refused"), [("features", True), ("decoupled", False)])
def test_statistics_belong_to_the_reference_of_a_form_that_runs_it(form: Any, refused: bool, tmp_path: Path) -> None:
    def trainer(shift: float) -> Trainer:
        model = tiny.resnet()
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        norm.running_mean.add_(shift)  # type: ignore[operator]
        args = tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        made = tiny.trainer(model, args, tiny.images(), callbacks=[WeightAnchoring(0.1, form=form)])
        attach(made)
        return made

    trainer(0.0).train()
    resumed = trainer(0.5)
    if refused:
        with pytest.raises(RuntimeError, match="expected the same pretrained weights"):
            resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    else:
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")


def test_a_checkpoint_is_still_refused_without_a_reference(tmp_path: Path) -> None:
    make(tmp_path, tiny.bert()).train()
    with pytest.raises(PreflightError, match="for the pretrained ones"):
        make(tmp_path, loaded(tmp_path))


def test_a_second_training_is_a_run_of_its_own(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny.bert())
    trainer.train()
    first = events.read(trainer.state.log_history, "anchoring")
    trainer.train()
    assert events.read(trainer.state.log_history, "anchoring") == first


WHERE: list[tuple[dict[str, Any], str]] = [
    ({"reference": "checkpoint"}, "; the reference: {n} tensors, {n} mapped from "),
    ({"reference_dtype": torch.bfloat16}, "; the reference: {n} tensors in memory, in bfloat16 on the cpu"),
    ({"reference_device": "cpu"}, "; the reference: {n} tensors in memory, in float32 on the cpu"),
]


def test_where_the_reference_lives_is_said_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(strength: float, **options: Any) -> tuple[Any, dict[str, Tensor], str]:
        torch.manual_seed(0)
        model = bert_from_body(tmp_path / "pretrained")
        trainer = make(tmp_path / "run", model, strength=strength, **options)
        trainer.train()
        return trainer, tiny.state(model), capsys.readouterr().out

    def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)

    (_, expected, plain), (_, free, _) = run(0.2), run(1e-6)
    assert "the reference: " not in plain
    for options, said in WHERE:
        trainer, found, text = run(0.2, **options)
        (event,) = events.read(trainer.state.log_history, "anchoring")
        assert said.format(n=event["tensors"]) in text
        recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["methods"]["WeightAnchoring"]["reference"]
        assert recipe["fingerprint"] == event["reference"]
        assert recipe["tensors"] == event["tensors"] > 10
        assert recipe["kind"] == ("checkpoint" if "reference" in options else "memory")
        if "reference_dtype" in options:
            assert 0 < gap(expected, found) < 1e-3 * gap(expected, free)
        else:
            assert not tiny.moved(expected, found)
