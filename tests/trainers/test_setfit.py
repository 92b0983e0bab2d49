"""SetFit: its trainer has sentence-transformers' inside, which trains the embeddings; then it fits the classifier."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.trainers.words import WORDS, Steps, assert_left_as_found, bert_folder, check_openings
from tl_callbacks import (
    GradualUnfreezing,
    NoEffectWarning,
    WeightAnchoring,
    at_steps,
    attach,
    events,
    group_layers,
    layerwise_optimizer,
)

pytest.importorskip("setfit", reason="tests of its trainer")
import setfit

# SetFit's arguments have no dataloader_pin_memory, so torch warns where there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

# Opened at 0, 2 and 4; the first step of each warm-up has rate 0.
OPENINGS = {"0.model.encoder.layer.2": 1, "0.model.encoder.layer.1": 3, "0.model.encoder.layer.0": 5}


def classifier(folder: Path) -> setfit.SetFitModel:
    torch.manual_seed(0)
    return setfit.SetFitModel.from_pretrained(bert_folder(folder / "model"))


def trainer(folder: Path, model: setfit.SetFitModel, *callbacks: Any) -> setfit.Trainer:
    """SetFit's quick start on colours against animals."""
    args = setfit.TrainingArguments(
        str(folder / "run"), batch_size=4, max_steps=8, body_learning_rate=1e-2, logging_steps=2, report_to="none",
        show_progress_bar=False, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_dict({"text": list(WORDS[:6]), "label": [0, 0, 0, 1, 1, 1]})
    return setfit.Trainer(model, args, train_dataset=data, callbacks=list(callbacks), metric=lambda y, z: {"n": len(y)})


def test_the_quick_start_with_our_callbacks(tmp_path: Path) -> None:
    model = classifier(tmp_path)
    groups = group_layers(model.model_body)
    steps = Steps(model.model_body)
    unfreezing = GradualUnfreezing(groups, at_steps([2, 4]), keep_frozen=["embeddings"], rates="own")
    made = trainer(tmp_path, model, unfreezing, WeightAnchoring(0.1, exclude=()), steps)
    st_args = made.st_trainer.args
    made.st_trainer.optimizer_cls_and_kwargs = layerwise_optimizer(st_args, groups, decay=0.5)
    attach(made.st_trainer)
    made.train()
    check_openings(steps, groups, OPENINGS)
    history = made.st_trainer.state.log_history
    assert [event["step"] for event in events.read(history, "opening")] == [0, 2, 4]
    rates = [entry for entry in history if "tl/rate/embeddings" in entry][-1]
    assert rates["tl/rate/0.model.encoder.layer.2"] > rates["tl/rate/embeddings"] > 0
    assert any("tl/anchor/0.model.encoder.layer.2" in entry for entry in history)
    assert_left_as_found(model.model_body)
    assert len(model.predict(["red", "dog"])) == 2
    assert made.evaluate(made.train_dataset) == {"n": 6}


@pytest.mark.parametrize("callbacks", ["none", "neutral", "anchored"])
def test_neutral_callbacks_follow_the_plain_quick_start_bit_for_bit(callbacks: str, tmp_path: Path) -> None:
    def trained(attached: bool, *callbacks: Any) -> dict[str, torch.Tensor]:
        model = classifier(tmp_path)
        made = trainer(tmp_path, model, *callbacks)
        if attached:
            attach(made.st_trainer)
        torch.manual_seed(0)
        made.train()
        return {name: parameter.detach() for name, parameter in model.model_body.named_parameters()}

    plain = trained(False)
    groups = group_layers(classifier(tmp_path).model_body)
    given = {
        "none": lambda: [],
        "neutral": lambda: [GradualUnfreezing(groups, at_steps([0, 0, 0]))],
        "anchored": lambda: [WeightAnchoring(0.1, exclude=())],
    }
    with pytest.warns(NoEffectWarning) if callbacks == "neutral" else contextlib.nullcontext():
        ours = trained(True, *given[callbacks]())
    moved = {name for name in plain if not torch.equal(plain[name], ours[name])}
    assert bool(moved) == (callbacks == "anchored"), "anchored is the control"


def test_the_outer_trainer_is_refused_with_the_name_of_the_inner_one(tmp_path: Path) -> None:
    made = trainer(tmp_path, classifier(tmp_path))
    with pytest.raises(TypeError, match=r"got setfit.trainer.Trainer. .*attach\(trainer.st_trainer\)"):
        attach(made)  # type: ignore[arg-type]
