"""The Trainer's scaling of losses that ignore the item count: measured in real runs, and said before them."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from tests import tiny
from tests.families import FAMILIES
from tests.families.core import SMALL, TEXT, images, language, model, tagged, texts
from tests.loss_scale_worker import CELLS, ROWS, logged, plain_bert, stepped
from tl_callbacks.loss_scale import ignores_item_count, loss_scale_caution

VIT = {"image_size": 16, "patch_size": 8, "num_labels": 3, **SMALL}
MODELS: dict[str, tuple[Any, Any, bool]] = {  # how to make it, its rows, whether it ignores the count
    "BERT, texts": (model("BertForSequenceClassification", **TEXT), texts, True),
    "BERT, tokens": (model("BertForTokenClassification", **TEXT), tagged, True),
    "BERT, masked": (model("BertForMaskedLM", **TEXT), language, True),
    "Llama, texts": (model("LlamaForSequenceClassification", **TEXT), texts, True),
    "Llama": (model("LlamaForCausalLM", **TEXT), language, False),
    "GPT-2": (model("GPT2LMHeadModel", vocab_size=50, n_embd=16, n_layer=2, n_head=2), language, False),
    "ViT": (model("ViTForImageClassification", **VIT), images, False),
}
SURVEY = json.loads((Path(__file__).parent / "survey_architectures" / "item_count.json").read_text())
CLASSES: dict[str, dict[str, Any]] = SURVEY["classes"]
AGAIN = (
    "BertForSequenceClassification", "BertForMaskedLM", "RobertaForMultipleChoice", "T5ForConditionalGeneration",
    "LlamaForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel", "ViTForImageClassification",
    "SegformerForSemanticSegmentation", "Wav2Vec2ForCTC", "BlipForQuestionAnswering", "WhisperForConditionalGeneration",
)  # fmt: skip


def times(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    """How many times the reference a gradient is; they must be parallel."""
    factor = float(gradient @ reference / (reference @ reference))
    assert torch.allclose(gradient, factor * reference, atol=1e-5 * float(reference.abs().max()))
    return factor


def lora(base: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_multiplies_the_gradient_of_heads_that_ignore_the_count(name: str) -> None:
    build, rows, ignores = MODELS[name]
    assert ignores_item_count(build()) is ignores
    (_, nothing, whole), (trainer, caution, halves) = (stepped(build(), rows(), steps) for steps in (1, 2))
    assert times(halves, whole) == pytest.approx(2.0 if ignores else 1.0, rel=1e-4)
    assert nothing is None
    assert (caution is not None) is ignores
    if caution:
        assert f"{type(trainer.model).__name__} and the loss it logs by 2 (gradient_accumulation_steps=2)" in caution
        assert logged(trainer, "loss") == pytest.approx(2 * logged(trainer, "eval_loss"), rel=0.1)


@pytest.mark.parametrize(
    "remedy", [{"on_model": {"accepts_loss_kwargs": False}}, {"on_trainer": {"model_accepts_loss_kwargs": False}}]
)
def test_the_remedies_that_it_names_work_and_silence_it(remedy: dict[str, Any]) -> None:
    _, _, whole = stepped(plain_bert(), tiny.texts(ROWS), 1)
    _, caution, halves = stepped(plain_bert(), tiny.texts(ROWS), 2, **remedy)
    assert caution is None
    assert times(halves, whole) == pytest.approx(1.0, rel=1e-4)


def test_it_is_kept_on_purpose() -> None:
    _, _, whole = stepped(plain_bert(), tiny.texts(ROWS), 1)
    _, caution, halves = stepped(plain_bert(), tiny.texts(ROWS), 2, on_model={"accepts_loss_kwargs": True})
    assert caution is None
    assert times(halves, whole) == pytest.approx(2.0, rel=1e-4)


def test_below_adapters_the_base_model_counts() -> None:
    _, _, whole = stepped(lora(plain_bert()), tiny.texts(ROWS), 1)
    on_wrapper = {"on_model": {"accepts_loss_kwargs": False}}
    for given in ({}, on_wrapper):
        _, caution, halves = stepped(lora(plain_bert()), tiny.texts(ROWS), 2, **given)
        assert times(halves, whole) == pytest.approx(2.0, rel=1e-4)
        assert caution is not None
        assert "the gradients of BertForSequenceClassification" in caution
        assert "Set `model.get_base_model().accepts_loss_kwargs = False`" in caution
    adapted = lora(plain_bert())
    adapted.get_base_model().accepts_loss_kwargs = False
    _, caution, halves = stepped(adapted, tiny.texts(ROWS), 2)
    assert times(halves, whole) == pytest.approx(1.0, rel=1e-4)
    assert caution is None


class OwnLoss(Trainer):
    """A Trainer that computes the loss itself."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_it_is_silent_where_the_loss_is_not_the_heads(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    assert loss_scale_caution(Trainer(plain_bert(), args))
    assert loss_scale_caution(OwnLoss(plain_bert(), args)) is None
    assert loss_scale_caution(Trainer(plain_bert(), args, compute_loss_func=lambda *a, **k: None)) is None
    smoothed = tiny.arguments(tmp_path, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    assert loss_scale_caution(Trainer(plain_bert(), smoothed)) is None
    _, _, whole = stepped(plain_bert(), tiny.texts(ROWS), 1, arguments={"label_smoothing_factor": 0.1})
    _, _, halves = stepped(plain_bert(), tiny.texts(ROWS), 2, arguments={"label_smoothing_factor": 0.1})
    assert times(halves, whole) == pytest.approx(1.0, rel=1e-4)


def test_boxes_are_not_counted(tmp_path: Path) -> None:
    family = FAMILIES["YOLOS"]
    detector = family.build()
    trainer = Trainer(detector, tiny.arguments(tmp_path, gradient_accumulation_steps=2))
    assert family.collate
    batch = family.collate(family.rows()[:2])
    assert trainer.model_accepts_loss_kwargs
    assert trainer._get_num_items_in_batch([batch], trainer.args.device) is None
    assert ignores_item_count(detector)
    assert loss_scale_caution(trainer) is None


@pytest.mark.parametrize(("labels", "kind"), [(1, None), (3, "multi_label_classification"), (3, "regression")])
def test_other_losses_of_a_classifier_ignore_the_count(labels: int, kind: str | None) -> None:
    def build() -> nn.Module:
        return model("ViTForImageClassification", **VIT | {"num_labels": labels, "problem_type": kind})()

    rows = [{**row, "labels": [float(row["labels"] == n) for n in range(labels)]} for row in images()]
    assert ignores_item_count(build())
    (_, _, whole), (_, caution, halves) = (stepped(build(), rows, steps) for steps in (1, 2))
    assert times(halves, whole) == pytest.approx(2.0, rel=1e-4)
    assert caution


class Head(nn.Module):
    """A head written by a user, around a BERT classifier."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels)


class Passes(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        return self.base(input_ids, labels=labels, **kwargs)


class PassesAll(Head):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **{"output_attentions": False, **kwargs})


class Drops(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        return self.loss_of(self.base(input_ids).logits, labels, **kwargs)


class Divides(Head):
    def forward(self, input_ids: Any, labels: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return nn.functional.cross_entropy(self.base(input_ids).logits, labels, reduction="sum") / num_items_in_batch


class Picks(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        loss = nn.functional.cross_entropy(self.base(input_ids).logits, labels, reduction="sum")
        return loss / kwargs.get("num_items_in_batch", 1)


class Keeps(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        self.kept = kwargs
        return self.loss_of(self.base(input_ids).logits, labels)


class Copies(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        more = {}
        for key, value in kwargs.items():
            more[str(key)] = value
        return self.base(input_ids, labels=labels, **more)


class Calls(Head):
    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
        (loss,) = [self.loss_of]
        return loss(self.base(input_ids).logits, labels, **kwargs)


class Unlabelled(Head):
    def forward(self, input_ids: Any, **kwargs: Any) -> Any:
        return self.base(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("head", "ignores"),
    [
        (Passes, True), (PassesAll, True), (Drops, True), (Divides, False), (Picks, None), (Keeps, None),
        (Copies, None), (Calls, None),
    ],
)  # fmt: skip
def test_heads_of_users(head: type[Head], ignores: bool | None) -> None:
    assert ignores_item_count(head(plain_bert())) is ignores


@pytest.mark.parametrize("head", [Passes, PassesAll, Unlabelled])
def test_what_delegates_is_what_it_delegates_to(head: type[Head]) -> None:
    assert ignores_item_count(head(MODELS["ViT"][0]())) is False
    assert ignores_item_count(head(MODELS["BERT, tokens"][0]())) is True


def test_what_has_no_loss_or_no_source_cannot_be_told() -> None:
    assert ignores_item_count(nn.Linear(2, 2)) is None
    gpt = MODELS["GPT-2"][0]()
    gpt.loss_function = max
    assert ignores_item_count(gpt) is None


def test_hooks_of_accelerate_hide_nothing() -> None:
    for name in ("BERT, texts", "GPT-2"):
        build, _, ignores = MODELS[name]
        assert ignores_item_count(add_hook_to_module(build(), ModelHook())) is ignores


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("loss_scale") / "found.json"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, *launcher, "-m", "tests.loss_scale_worker", str(file)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    return dict(json.loads(file.read_text()))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("cell", "gradient", "eval_loss", "said"),
    [
        ("processes", 2, 2, "by 2 (processes=2)"),
        ("both", 4, 2, "by 4 (gradient_accumulation_steps=2 x processes=2)"),
        ("accumulation", 2, 1, "by 2 (gradient_accumulation_steps=2)"),
        ("neither", 1, 1, None),
        ("divided", 2, 2, "by 2 (processes=2)"),
        ("set on the model", 1, 1, None),
        ("set on the trainer", 1, 1, None),
        ("set too late", 4, 2, "by 4 (gradient_accumulation_steps=2 x processes=2)"),
    ],
)
def test_the_factor_of_two_ranks(
    ranks: dict[str, Any], cell: str, gradient: int, eval_loss: int, said: str | None
) -> None:
    assert set(ranks) == set(CELLS)
    one, _, reference = stepped(plain_bert(), tiny.texts(ROWS), 1)
    found = ranks[cell]
    assert times(torch.tensor(found["gradient"]), reference) == pytest.approx(gradient, rel=1e-4)
    assert found["loss"] == pytest.approx(gradient * logged(one, "loss"), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(eval_loss * logged(one, "eval_loss"), rel=1e-4)
    assert (found["caution"] is None) is (said is None)
    assert said is None or said in found["caution"]


def test_the_figures_of_the_survey() -> None:
    run = {name: record for name, record in CLASSES.items() if record["measured"] is not None}
    wrongly_ignored = [name for name, record in run.items() if record["read"] and not record["measured"]]
    agree = [name for name, record in run.items() if record["read"] == record["measured"]]
    assert len(run) >= 300
    assert {record["measured"] for record in run.values()} == {True, False}
    assert wrongly_ignored == []
    assert len(agree) >= 0.98 * len(run)
    assert set(AGAIN) <= set(run)


@pytest.mark.slow
def test_the_survey_is_measured_again() -> None:
    item_count = pytest.importorskip("tests.survey_architectures.item_count")
    _same_version()
    entries = [entry for entry in item_count.classes() if entry[2].__name__ in AGAIN]
    found = {cls.__name__: item_count.measured(cls, item_count.configuration(kind, cls))[0] for kind, _, cls in entries}
    assert found == {name: CLASSES[name]["measured"] for name in AGAIN}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_is_read_again() -> None:
    pytest.importorskip("timm", reason="four of the classes have a part of timm")
    item_count = pytest.importorskip("tests.survey_architectures.item_count")
    _same_version()
    assert item_count.read_all() == {name: record["read"] for name, record in CLASSES.items()}


def _same_version() -> None:
    if importlib.metadata.version("transformers") != SURVEY["transformers"]:
        pytest.skip("the survey is of another version of transformers")
