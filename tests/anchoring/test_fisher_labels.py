"""What the labels of a diagonal Fisher mean: classes, tokens, targets with noise, labels that hold each by itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests import tiny
from tests.anchoring.test_fisher import loop, worst
from tl_callbacks.anchoring import diagonal_fisher


def test_sampled_labels_estimate_the_fisher_information() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    exact = torch.zeros(3, 3, dtype=torch.float64)
    for x in inputs:
        p = model(x).softmax(-1)
        for label in range(3):
            error = functional.one_hot(torch.tensor(label), 3) - p
            exact += (p[label] * torch.outer(error, x).square()).detach() / 4
    wrong = torch.zeros(4, dtype=torch.long)  # the data's labels, which the estimate must not depend on
    many = [(inputs, wrong)] * 1000
    ours = diagonal_fisher(model, many, labels="sampled", chunk_size=64)
    given = diagonal_fisher(model, [(inputs, wrong)])
    assert ours.facts["kind"] == "sampled"
    assert float((ours["weight"] - exact).norm() / exact.norm()) < 0.08
    assert float((given["weight"] - exact).norm() / exact.norm()) > 0.3
    again = diagonal_fisher(model, many[:3], labels="sampled", seed=5)
    assert torch.equal(diagonal_fisher(model, many[:3], labels="sampled", seed=5)["weight"], again["weight"])
    assert not torch.equal(diagonal_fisher(model, many[:3], labels="sampled", seed=6)["weight"], again["weight"])


SMALL: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def language_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "masked": BertForMaskedLM(BertConfig(**SMALL, intermediate_size=8)),
        "causal": LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=8)),
        "sequence to sequence": T5ForConditionalGeneration(
            T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
    }


@pytest.mark.parametrize("kind", ["masked", "causal", "sequence to sequence"])
def test_a_texts_tokens_are_one_sample(kind: str) -> None:
    model = language_models()[kind].double()
    ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, 4:] = -100
    labels[0] = -100  # a row that says nothing adds nothing
    batch = {"input_ids": ids, "labels": labels}

    def negative(m: Any, one: Any) -> Tensor:
        terms = int((one["labels"][:, 1:] if kind == "causal" else one["labels"]).ne(-100).sum())
        return m(**one).loss * terms if terms else 0 * m(**{**one, "labels": one["input_ids"]}).loss

    theirs = loop(model, [batch], negative)
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in (1, 2, 3, 0)]
    # transformers takes a language model's loss in float32
    assert worst(diagonal_fisher(model, rows), theirs) < (1e-6 if kind == "causal" else 1e-12)
    sampled = diagonal_fisher(model, rows, labels="sampled")
    assert worst(sampled, theirs) > 1e-3
    assert all(bool(tensor.isfinite().all()) for tensor in sampled.values())


def test_targets_with_a_fraction_are_gaussian() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5).double()
    ours = diagonal_fisher(model, [(inputs, targets)])
    errors = (model(inputs).squeeze(-1) - targets).detach()
    assert torch.allclose(ours["bias"], errors.square().mean()[None])
    sampled = diagonal_fisher(model, [(inputs, targets)] * 400, labels="sampled", chunk_size=64)
    assert float(sampled["bias"]) == pytest.approx(1.0, rel=0.1)  # the Fisher information of a Gaussian's mean


def several_labels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (6, 8), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (6, tiny.NUM_LABELS), generator=generator).double()}


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_labels_that_may_hold_together_have_each_a_probability(problem: str | None) -> None:
    """The model's own loss is their mean; without a problem type it says at its first loss what they mean."""
    model, batch = tiny.bert(problem_type=problem).double(), several_labels()
    theirs = loop(model, [batch], lambda m, one: tiny.NUM_LABELS * m(**one).loss)
    model = tiny.bert(problem_type=problem).double()
    ours = diagonal_fisher(model, [batch])
    assert worst(ours, theirs) < 1e-12
    gaussian = loop(model, [batch], lambda m, one: (m(one["input_ids"]).logits - one["labels"]).square().sum() / 2)
    assert worst(gaussian, theirs) > 0.1


def test_drawn_labels_that_may_hold_together_estimate_the_fisher_information() -> None:
    model, batch = tiny.bert(problem_type="multi_label_classification").double(), several_labels()
    model.classifier.bias.data = torch.tensor([-3.0, 0.0, 2.0]).double()
    many = [{key: value.repeat(200, *[1] * (value.ndim - 1)) for key, value in batch.items()}]
    ours = diagonal_fisher(model, many, names=["classifier.bias"], labels="sampled")["classifier.bias"]
    given = diagonal_fisher(model, [batch], names=["classifier.bias"])["classifier.bias"]
    p = model.eval()(batch["input_ids"]).logits.sigmoid().detach()
    exact = (p * (1 - p)).mean(0)
    assert torch.allclose(ours, exact, rtol=0.15)
    assert not torch.allclose(given, exact, rtol=0.15)


class Regression(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.out, self.loss = nn.Linear(3, 1), loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(x).squeeze(-1)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": self.loss(logits, labels)}


def test_another_loss_of_targets_than_the_mean_square_is_refused() -> None:
    batch = {"x": torch.ones(2, 3), "labels": torch.tensor([5.0, -7.0])}
    assert diagonal_fisher(Regression(functional.mse_loss), [batch]).facts["samples"] == 2
    with pytest.raises(ValueError, match=r"the mean squared error of its logits is .* Give `loss`"):
        diagonal_fisher(Regression(functional.l1_loss), [batch])
    model: Any = Regression(functional.mse_loss)
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="the binary cross-entropy of its logits is"):
        diagonal_fisher(model, [{**batch, "labels": torch.tensor([1.0, 0.0])}])


def test_classes_of_a_model_with_one_logit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"whole numbers and the model gives one logit; .* labels as floats"):
        diagonal_fisher(nn.Linear(3, 1), [(torch.ones(2, 3), torch.tensor([0, 4]))])
