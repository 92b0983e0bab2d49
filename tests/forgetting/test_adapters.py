"""Reading the base below adapters leaves open what was open, and frozen what was frozen."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from tests import tiny
from tests.forgetting.models import llama, sentences, tokenizer
from tests.forgetting.test_monitor import words
from tl_callbacks import (
    ForgettingMonitor,
    GradualUnfreezing,
    LanguageModelling,
    RepresentationProbes,
    attach,
    every,
    group_layers,
)
from tl_callbacks.reading.adapters import without_adapters

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
LOOKS: dict[str, Any] = {
    "none": lambda: [],
    "monitor": lambda: [ForgettingMonitor(LanguageModelling(sentences()))],
    "probes": lambda: [RepresentationProbes(words())],
}


def lora() -> Any:
    return get_peft_model(llama(), LORA)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Gradients(TrainerCallback):
    """How many parameters had a gradient, by step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.counts.append(sum(parameter.grad is not None for parameter in model.parameters()))


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_made_anew_is_opened_step_by_step(look: str, tmp_path: Path) -> None:
    seen = Gradients()
    callbacks = [GradualUnfreezing(group_layers(lora()), every(2)), *LOOKS[look](), seen]
    args = tiny.arguments(tmp_path, max_steps=4)
    trainer = Trainer(
        args=args, model_init=lora, train_dataset=words(), processing_class=tokenizer(), callbacks=callbacks
    )
    attach(trainer)
    trainer.train()
    assert seen.counts == [4, 4, 8, 8]


def frozen_by_hand(model: Any) -> None:
    """LoRA-FA: the first factor stays as it was drawn."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def one_of_two_frozen(model: Any) -> None:
    """A second adapter trains on top of one that stays."""
    model.add_adapter("other", LORA)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("freeze", [frozen_by_hand, one_of_two_frozen])
def test_an_adapter_that_is_frozen_stays_so(freeze: Any, look: str, tmp_path: Path) -> None:
    model = lora()
    freeze(model)
    before = trainable(model)
    assert 2 * len(before) == sum("lora_" in name for name, _ in model.named_parameters())
    args = tiny.arguments(tmp_path, max_steps=1)
    trainer = Trainer(model, args, train_dataset=words(), processing_class=tokenizer(), callbacks=LOOKS[look]())
    attach(trainer)
    assert trainable(model) == before
    trainer.train()
    assert trainable(model) == before


def test_an_error_while_the_adapters_are_off_leaves_them_as_they_were() -> None:
    model = lora()
    frozen_by_hand(model)
    before = trainable(model)
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        1 / (1 - model._adapters_disabled)
    assert trainable(model) == before
    assert not model._adapters_disabled
    with model.disable_adapter():
        pass
    assert trainable(model) != before, "the control: PEFT alone opens what was frozen"
