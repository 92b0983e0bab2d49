"""The trainers of sentence-transformers, with losses that have weights of their own and losses that have none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from tests.trainers.words import Steps, assert_left_as_found, bert_folder, check_openings, texts
from tl_callbacks import (
    ForgettingMonitor,
    GradualUnfreezing,
    PreflightError,
    Retrieval,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
    preview,
    slanted_triangular,
    staged,
)
from tl_callbacks.anchoring import feature_distance
from tl_callbacks.forgetting import recall_at
from tl_callbacks.losses import loss_parameters

pytest.importorskip("sentence_transformers", reason="tests of its trainers")
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

OPENINGS = {"0.model.encoder.layer.2": 0, "0.model.encoder.layer.1": 2, "0.model.encoder.layer.0": 4}


def embedder(folder: Path, *above: nn.Module) -> SentenceTransformer:
    """A tiny embedding model."""
    return SentenceTransformer(modules=[Transformer(bert_folder(folder / "model")), Pooling(16), *above])


def arguments(folder: Path, kind: Any = SentenceTransformerTrainingArguments, **overrides: Any) -> Any:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 6,
        "logging_steps": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "log_level": "error", "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(str(folder / "run"), **{**defaults, **overrides})


def pairs(count: int = 32) -> Dataset:
    return Dataset.from_dict({"anchor": texts(count, seed=1), "positive": texts(count, seed=2)})


def labelled(count: int = 32) -> Dataset:
    return pairs(count).add_column("label", [number % 3 for number in range(count)])


def softmax(model: SentenceTransformer) -> nn.Module:
    torch.manual_seed(1)
    return losses.SoftmaxLoss(model, 16, num_labels=3)


def ranking(model: SentenceTransformer) -> nn.Module:
    return losses.MultipleNegativesRankingLoss(model)


def nested(model: SentenceTransformer) -> nn.Module:
    return losses.MatryoshkaLoss(model, ranking(model), [16, 8])


def several(model: SentenceTransformer) -> dict[str, nn.Module]:
    return {"pairs": ranking(model), "classes": softmax(model)}


LOSSES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "no weights": (ranking, pairs),
    "no weights, nested": (nested, pairs),
    "weights": (softmax, labelled),
    "a loss for each data set": (several, lambda: {"pairs": pairs(), "classes": labelled()}),
}


def trainer(folder: Path, loss: str = "weights", *, model: Any = None, **keywords: Any) -> SentenceTransformerTrainer:
    """A trainer with the loss of that name."""
    model = embedder(folder) if model is None else model
    make, data = LOSSES[loss]
    args = keywords.pop("args", None) or arguments(folder)
    return SentenceTransformerTrainer(model, args, train_dataset=data(), loss=make(model), **keywords)


def trained(made: SentenceTransformerTrainer, **keywords: Any) -> dict[str, torch.Tensor]:
    """The weights of model and loss after training."""
    torch.manual_seed(3)
    made.train(**keywords)
    weights = {**dict(made.model.named_parameters()), **{f"loss.{n}": p for n, p in loss_parameters(made).items()}}
    return {name: parameter.detach().clone() for name, parameter in weights.items()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_neutral_factory_of_attach_follows_the_plain_trainer_bit_for_bit(loss: str, tmp_path: Path) -> None:
    plain = trained(trainer(tmp_path, loss))
    neutral, lower = trainer(tmp_path, loss), trainer(tmp_path, loss)
    lower.optimizer_cls_and_kwargs = layerwise_optimizer(lower.args, group_layers(lower.model), decay=0.5)
    for made in (neutral, lower):
        attach(made)
    assert any(name.startswith("loss.") for name in plain) == (loss in ("weights", "a loss for each data set"))
    assert not differ(plain, trained(neutral))
    assert len(differ(plain, trained(lower))) > len(plain) / 2, "the control: other rates"


@pytest.mark.parametrize("loss", ["no weights", "weights", "a loss for each data set"])
def test_groups_open_in_their_turn_and_the_loss_trains_throughout(loss: str, tmp_path: Path) -> None:
    model = embedder(tmp_path)
    groups = group_layers(model)
    args = arguments(tmp_path, max_steps=8)
    made = trainer(
        tmp_path, loss, model=model, args=args,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5),
        callbacks=[GradualUnfreezing(groups, at_steps([2, 4]), keep_frozen=["embeddings"])],
    )  # fmt: skip
    weights = nn.ParameterList(loss_parameters(made).values())
    of_model, of_loss = Steps(model), Steps(weights)
    made.add_callback(of_model)
    made.add_callback(of_loss)
    attach(made)
    assert ("loss: 147 parameters of its own" in preview(made)) == (loss != "no weights")
    made.train()
    check_openings(of_model, groups, OPENINGS)
    rates = next(entry for entry in made.state.log_history if "tl/rate/embeddings" in entry)
    assert rates["tl/rate/0.model.encoder.layer.1"] == pytest.approx(0.5 * rates["tl/rate/0.model.encoder.layer.2"])
    if loss != "no weights":
        assert rates["tl/rate/loss"] == rates["tl/rate/0.model.encoder.layer.2"]
        assert set.union(*(of_loss.moved_in(step) for step in range(8))) == {"0", "1"}
    else:
        assert "tl/rate/loss" not in rates
    assert_left_as_found(model)


@pytest.mark.parametrize("rates", ["slanted", "staged"])
def test_the_weights_of_a_loss_have_the_rate_of_the_top_group(rates: str, tmp_path: Path) -> None:
    model = embedder(tmp_path)
    groups = group_layers(model)
    made = trainer(tmp_path, model=model)
    schedule = {"slanted": at_steps([2, 4]), "staged": staged([(0.5, "all", 0.1)])}[rates]
    made.add_callback(
        GradualUnfreezing(
            groups,
            schedule,
            rates="own" if rates == "staged" else slanted_triangular(),
            keep_frozen=["embeddings"] * (rates == "slanted"),
        )
    )
    attach(made)
    made.train()
    logged = [e for e in made.state.log_history if "tl/rate/loss" in e]
    assert [e["tl/rate/loss"] for e in logged] == [e["tl/rate/0.model.encoder.layer.2"] for e in logged]
    if rates == "staged":
        assert logged[-1]["tl/rate/loss"] < 0.1 * logged[0]["tl/rate/loss"], "the control: the factor is there"


def test_a_resumed_run_has_the_weights_of_the_loss(tmp_path: Path) -> None:
    def made() -> SentenceTransformerTrainer:
        model = embedder(tmp_path)
        groups = group_layers(model)
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 5])), WeightAnchoring(0.1, exclude=())]
        one = trainer(tmp_path, model=model, args=args, callbacks=callbacks)
        attach(one)
        return one

    straight = trained(made())
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert not differ(straight, trained(made(), resume_from_checkpoint=str(checkpoint)))
    path = checkpoint / "loss.safetensors"
    saved = load_file(path)
    save_file({name: tensor + 1 for name, tensor in saved.items()}, path)
    assert differ(straight, trained(made(), resume_from_checkpoint=str(checkpoint))), "the control: it is read"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"`loss.safetensors` is missing in .*`classifier.weight` and 1 other"):
        made().train(resume_from_checkpoint=str(checkpoint))


def test_a_guide_of_a_loss_is_in_no_checkpoint(tmp_path: Path) -> None:
    class Guided(losses.SoftmaxLoss):
        """A loss with weights that train and a guide that does not."""

        def __init__(self, model: Any) -> None:
            super().__init__(model, 16, num_labels=3)
            self.guide = nn.Linear(2, 2)

    model = embedder(tmp_path)
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    made = SentenceTransformerTrainer(model, args, train_dataset=labelled(), loss=Guided(model))
    attach(made)
    made.train()
    assert set(load_file(tmp_path / "run" / "checkpoint-3" / "loss.safetensors")) == {
        "classifier.weight",
        "classifier.bias",
    }


def test_rates_by_pattern_are_refused_beside_groups(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate_mapping={"classifier": 0.1})
    model = embedder(tmp_path)
    attach(trainer(tmp_path, model=model, args=args))
    factory = layerwise_optimizer(args, group_layers(model))
    with pytest.raises(PreflightError, match=r"learning_rate_mapping=\{'classifier': 0.1\} makes parameter groups"):
        attach(trainer(tmp_path, model=model, args=args, optimizer_cls_and_kwargs=factory))


def test_a_cross_encoder_opens_below_its_head(tmp_path: Path) -> None:
    model = CrossEncoder(bert_folder(tmp_path / "model"), num_labels=1)
    groups = group_layers(model)
    args = arguments(tmp_path, CrossEncoderTrainingArguments, max_steps=8)
    data = pairs().add_column("label", [float(number % 2) for number in range(32)])
    steps = Steps(model)
    callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 5]), keep_frozen=["embeddings"]), steps]
    made = CrossEncoderTrainer(model, args, train_dataset=data, callbacks=callbacks)
    attach(made)
    made.train()
    check_openings(steps, groups, dict(zip(reversed(groups.names[1:]), [0, 2, 4, 5], strict=True)))
    assert_left_as_found(model)


def test_a_sparse_encoder_opens_below_its_head(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    model = SparseEncoder(folder)
    groups = group_layers(model)
    args = arguments(tmp_path, SparseEncoderTrainingArguments, max_steps=8)
    steps = Steps(model)
    callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 5]), keep_frozen=["embeddings"]), steps]
    made = SparseEncoderTrainer(model, args, train_dataset=pairs(), callbacks=callbacks)
    attach(made)
    made.train()
    check_openings(steps, groups, dict(zip(reversed(groups.names[1:]), [0, 2, 4, 5], strict=True)))
    assert_left_as_found(model)


def test_a_dense_layer_above_the_encoder_does_not_hide_its_layers(tmp_path: Path) -> None:
    for above in (1, 2):
        groups = group_layers(embedder(tmp_path, *(Dense(16, 16) for _ in range(above))))
        assert groups.names == ("embeddings", *reversed(OPENINGS), "head")
        assert groups["head"].parameters == (f"{above + 1}.linear.weight", f"{above + 1}.linear.bias")
    assert group_layers(embedder(tmp_path)).names == ("embeddings", *reversed(OPENINGS))


@pytest.mark.parametrize("loss", ["no weights", "weights"])
def test_features_are_kept_where_the_texts_are(loss: str, tmp_path: Path) -> None:
    model, old = embedder(tmp_path), embedder(tmp_path)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.5)
    columns = {"anchor": [*texts(4, length=2), *texts(4, length=5)], "positive": texts(8, seed=2)}
    data = Dataset.from_dict({**columns, **({"label": [0, 1] * 4} if loss == "weights" else {})})
    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=1, learning_rate=0.0)
    reference = {name: p.detach().clone() for name, p in old.named_parameters()}
    anchor = WeightAnchoring(1.0, form="features", reference=reference)
    made = SentenceTransformerTrainer(model, args, train_dataset=data, loss=LOSSES[loss][0](model), callbacks=[anchor])
    attach(made)
    # Dropout would tell the forwards apart.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    made.train()
    (entry,) = (e for e in made.state.log_history if "tl/anchor/features/0.model.encoder.layer.1" in e)
    expected = []
    for column in columns.values():
        batch = model.preprocess(column)
        with torch.no_grad():
            kept = {key: batch[key] for key in ("input_ids", "attention_mask")}
            ours, theirs = (m.eval()[0].model(**kept, output_hidden_states=True).hidden_states[2] for m in (model, old))
        expected.append(float(feature_distance(ours, theirs, kept["attention_mask"] != 0)))
    assert entry["tl/anchor/features/0.model.encoder.layer.1"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert expected[0] > 0


def test_a_loss_whose_graph_is_made_in_the_backward_pass_is_refused(tmp_path: Path) -> None:
    model = embedder(tmp_path)
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    anchor = WeightAnchoring(1.0, form="features")
    made = SentenceTransformerTrainer(
        model, arguments(tmp_path), train_dataset=pairs(), loss=cached, callbacks=[anchor]
    )
    attach(made)
    with pytest.raises(RuntimeError, match="without a call of SentenceTransformer that records a gradient"):
        made.train()


def test_what_an_embedding_model_has_forgotten_of_retrieval(tmp_path: Path) -> None:
    held = [(text, f"{text} {text}") for text in dict.fromkeys(texts(40, length=4))]
    model = embedder(tmp_path, Dense(16, 16))
    expected = recall_at(*(model.encode([pair[side] for pair in held], convert_to_tensor=True) for side in (0, 1)))
    monitor = ForgettingMonitor(Retrieval(held))
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3)
    made = trainer(tmp_path, model=model, args=args, callbacks=[monitor], eval_dataset=labelled())
    attach(made)
    made.train()
    assert monitor.facts()["measures"]["retrieval"]["before"] == pytest.approx(float(expected.mean()))
    assert float(expected.mean()) > 0.3
    now = recall_at(*(model.encode([pair[side] for pair in held], convert_to_tensor=True) for side in (0, 1)))
    assert monitor.facts()["retention"] == pytest.approx(float(now.mean() / expected.mean()))
