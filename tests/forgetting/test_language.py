"""Cross-entropy and divergence of held-out text: which tokens count, and that no batch changes the sums."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from tests import tiny
from tests.forgetting.models import bert_lm, llama, sentences, t5, tokenizer
from tl_callbacks import LanguageModelling, group_layers
from tl_callbacks.forgetting import language
from tl_callbacks.forgetting.language import cross_entropies, divergences, fixed_mask, predicted
from tl_callbacks.forgetting.readings import Reading, compare
from tl_callbacks.forgetting.texts import padded, tokenised


def read(
    measure: LanguageModelling, model: Any, folder: Path, *, tuned: Any = None, **options: Any
) -> dict[str, Reading]:
    """What a measure finds in a model, or in another one once the first was the base."""
    trainer = Trainer(model, tiny.arguments(folder, **options), processing_class=tokenizer())
    assert measure.findings(trainer) == []
    found = {}
    for one, base in ((model, True), *([(tuned, False)] if tuned is not None else [])):
        found = measure.score(measure.read(one, group_layers(one), base=base, rank=0, ranks=1).sorted())
    return found


def ids_of(text: str) -> Tensor:
    return torch.tensor([tokenizer()(text)["input_ids"]])


def by_hand(model: Any, texts: list[str], *, shift: int = 1) -> tuple[float, int]:
    """Nats and tokens of texts, each by itself, without padding."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = ids_of(text)
        with torch.no_grad():
            log_p = model.eval()(ids).logits[0].double().log_softmax(-1)
        for place in range(shift, ids.shape[1]):
            nats -= float(log_p[place - shift, ids[0, place]])
            tokens += 1
    return nats, tokens


def test_a_causal_models_cost_is_that_of_each_token_after_the_ones_before_it(tmp_path: Path) -> None:
    texts, model = sentences(), llama()
    found = read(LanguageModelling(texts), model, tmp_path)["language"]
    nats, tokens = by_hand(model, texts)
    assert float(found.weights.sum()) == tokens
    assert found.value == pytest.approx(nats / tokens, abs=1e-6)
    unshifted = by_hand(model, texts, shift=0)
    assert abs(unshifted[0] / unshifted[1] - found.value) > 0.05, "labels that are not shifted cost something else"
    means = [by_hand(model, [text])[0] / by_hand(model, [text])[1] for text in texts]
    assert abs(sum(means) / len(means) - found.value) > 1e-3, "nor is it a mean of means"


@pytest.mark.parametrize("size", [1, 5, 12])
def test_no_batch_size_changes_a_row(size: int, tmp_path: Path) -> None:
    measure, model, tuned = LanguageModelling(sentences(), kl_tokens=24), llama(), llama(seed=1)
    expected = read(measure, model, tmp_path, tuned=tuned, per_device_eval_batch_size=4)
    found = read(measure, model, tmp_path, tuned=tuned, per_device_eval_batch_size=size)
    for name in ("language", "language_kl"):
        assert torch.equal(found[name].weights, expected[name].weights)
        assert torch.allclose(found[name].sums, expected[name].sums, atol=1e-5)


def left_padded(rows: list[Any]) -> dict[str, Tensor]:
    batch = padded([{"input_ids": ids_of(text)[0].tolist()} for text in rows])
    missing = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(count) for row, count in zip(values, missing, strict=True)])
        for key, values in batch.items()
    }


def test_padding_on_the_left_costs_the_same(tmp_path: Path) -> None:
    model, texts = llama(), sentences()
    right = read(LanguageModelling(texts, kl_tokens=0), model, tmp_path)["language"]
    left = read(LanguageModelling(texts, kl_tokens=0, collate=left_padded), model, tmp_path)["language"]
    assert torch.equal(left.weights, right.weights)
    assert torch.allclose(left.sums, right.sums, atol=1e-4)
    assert left_padded(texts)["attention_mask"][0, 0] == 0, "the control: there is padding"


def padded_rows(texts: list[str], *, left: bool, length: int = 12) -> list[dict[str, list[int]]]:
    rows = []
    for text in texts:
        ids = ids_of(text)[0].tolist()
        pad, ones = [0] * (length - len(ids)), [1] * len(ids)
        rows.append({"input_ids": pad + ids, "attention_mask": pad + ones})
        if not left:
            rows[-1] = {"input_ids": ids + pad, "attention_mask": ones + pad}
    return rows


@pytest.mark.parametrize("left", [True, False])
def test_rows_that_were_padded_cost_what_their_texts_cost(left: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    numbers = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, **numbers))
    plain = read(LanguageModelling(sentences(), max_length=6), model, tmp_path)["language"]
    found = read(LanguageModelling(padded_rows(sentences(), left=left), max_length=6), model, tmp_path)["language"]
    assert torch.equal(found.weights, plain.weights), "six tokens of text are kept, and no padding"
    assert torch.allclose(found.sums, plain.sums, atol=1e-5), "at the positions that texts have"


def test_what_is_left_of_a_row() -> None:
    row = {"input_ids": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 0, 1, 0], "labels": [-100, 5, 6, -100, -100]}
    inside = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "labels": [5, 6, -100]}
    assert tokenised(row, None, 9, labels="tokens") == [inside], "a gap inside is no padding"
    assert tokenised(row, None, 9) == [{key: inside[key] for key in ("input_ids", "attention_mask")}]
    assert tokenised(row, None, 4, labels="target") == [{**inside, "labels": row["labels"][:4]}], "another sequence's"
    assert tokenised({**row, "attention_mask": [0] * 5}, None, 9) == []
    pack = {"input_ids": [0, 5, 6, 7, 8, 0], "attention_mask": [0, 1, 1, 1, 1, 0], "position_ids": [0, 0, 1, 0, 1, 0]}
    assert [part["input_ids"] for part in tokenised(pack, None, 9)] == [[5, 6], [7, 8]]


def test_packed_rows_cost_what_their_samples_cost(tmp_path: Path) -> None:
    model, texts = llama(), sentences(4)
    lengths = [ids_of(text).shape[1] for text in texts]
    packed = {
        "input_ids": torch.cat([ids_of(text)[0] for text in texts]).tolist(),
        "position_ids": [place for length in lengths for place in range(length)],
    }
    apart = read(LanguageModelling(texts), model, tmp_path)["language"]
    inside = read(LanguageModelling([packed, packed]), model, tmp_path)["language"]
    assert float(inside.weights.sum()) == 2 * float(apart.weights.sum())
    assert inside.value == pytest.approx(apart.value, abs=1e-6)
    flat = lambda rows: {key: torch.tensor([rows[0][key]]) for key in packed}  # noqa: E731
    kept = read(LanguageModelling([packed, packed], collate=flat), model, tmp_path, per_device_eval_batch_size=1)
    assert kept["language"].weights.tolist() == [float(sum(lengths) - len(lengths))] * 2, "no token across a boundary"
    assert kept["language"].value == pytest.approx(apart.value, abs=1e-5)


def test_labels_that_are_none_do_not_count(tmp_path: Path) -> None:
    model, text = llama(), sentences()[6]
    ids = ids_of(text)[0].tolist()
    labels = [-100] * 3 + ids[3:]
    found = read(LanguageModelling([{"input_ids": ids, "labels": labels}] * 2), model, tmp_path)["language"]
    with torch.no_grad():
        loss = model.eval()(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert found.value == pytest.approx(float(loss), abs=1e-6)
    assert found.weights.tolist() == [len(ids) - 3] * 2


def test_an_encoder_decoders_labels_are_not_shifted_again(tmp_path: Path) -> None:
    model = t5()
    pairs = zip(sentences(6), sentences(6, seed=9), strict=True)
    rows = [{"input_ids": ids_of(a)[0].tolist(), "labels": ids_of(b)[0].tolist()} for a, b in pairs]
    found = read(LanguageModelling(rows), model, tmp_path)["language"]
    nats = 0.0
    for row in rows:
        with torch.no_grad():
            out = model.eval()(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        nats += float(out.loss) * len(row["labels"])
    assert float(found.weights.sum()) == sum(len(row["labels"]) for row in rows)
    assert float(found.sums.sum()) == pytest.approx(nats, abs=1e-4)


def test_a_masked_model_is_asked_for_the_same_tokens_each_time(tmp_path: Path) -> None:
    model, texts = bert_lm(), [f"[CLS] {text} [SEP]" for text in sentences()]
    measure = LanguageModelling(texts)
    first = read(measure, model, tmp_path)["language"]
    again = read(LanguageModelling(texts), model, tmp_path)["language"]
    other = read(LanguageModelling(texts, seed=1), model, tmp_path)["language"]
    assert torch.equal(first.sums, again.sums)
    assert not torch.equal(first.sums, other.sums)
    assert first.weights.tolist() == [1.0] * len(texts), "15 % of at most 9 words, without [CLS] and [SEP]"
    assert measure._source is not None
    nats = 0.0
    for row in measure._source.dataset:
        assert row["input_ids"].count(4) == 1
        place = row["input_ids"].index(4)
        assert row["labels"][place] > 4
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, place]
        nats -= float(logits.double().log_softmax(0)[row["labels"][place]])
    assert float(first.sums.sum()) == pytest.approx(nats, abs=1e-4)


def test_the_head_that_the_model_had_before_it_got_another(tmp_path: Path) -> None:
    whole, texts = bert_lm(), sentences()
    classifier = BertForSequenceClassification(BertConfig(**whole.config.to_dict()))
    classifier.bert.load_state_dict(whole.bert.state_dict(), strict=False)
    head = copy.deepcopy(whole.cls)
    expected = read(LanguageModelling(texts), whole, tmp_path)["language"]
    found = read(LanguageModelling(texts, head=head, kind="masked"), classifier, tmp_path)["language"]
    assert torch.allclose(found.sums, expected.sums, atol=1e-5)
    assert not any(module._forward_hooks for module in classifier.modules())


def test_a_head_in_another_dtype_than_the_model(tmp_path: Path) -> None:
    whole, texts = bert_lm(), sentences()
    classifier = BertForSequenceClassification(BertConfig(**whole.config.to_dict()))
    classifier.bert.load_state_dict(whole.bert.state_dict(), strict=False)
    measure = LanguageModelling(texts, head=copy.deepcopy(whole.cls), kind="masked")
    expected = read(measure, classifier, tmp_path)["language"]
    found = read(measure, classifier.to(torch.bfloat16), tmp_path)["language"]
    assert found.value == pytest.approx(expected.value, abs=0.05)


def test_the_divergence_is_that_of_the_whole_vocabulary_at_each_token(tmp_path: Path) -> None:
    base, tuned, texts = llama(), llama(seed=1), sentences()
    found = read(LanguageModelling(texts), base, tmp_path, tuned=tuned)["language_kl"]
    total, tokens = 0.0, 0
    for text in texts:
        ids = ids_of(text)
        with torch.no_grad():
            p, q = (one.eval()(ids).logits[0, :-1].double().log_softmax(-1) for one in (base, tuned))
        total += float((p.exp() * (p - q)).sum())
        tokens += len(p)
    assert found.value == pytest.approx(total / tokens, rel=1e-5)
    assert found.value > 0.1
    same = read(LanguageModelling(texts), base, tmp_path, tuned=llama())["language_kl"]
    assert same.value == 0.0
    some = read(LanguageModelling(texts, kl_tokens=20), base, tmp_path, tuned=tuned)["language_kl"]
    assert some.weights.tolist() == found.weights.tolist(), "a row counts by its length"
    assert some.value != found.value
    assert abs(some.value - found.value) < 4 * some.error
    few = LanguageModelling(texts, kl_tokens=5)
    read(few, base, tmp_path)
    assert [tuple(kept.shape) for kept in few.kept.values()] == [(1, 40)] * 4, "every third row, one token of each"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_operations_against_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(37, 11, generator=generator).to(dtype) * 4 for _ in range(2))
    targets = torch.randint(0, 11, (37,), generator=generator)
    nats = functional.cross_entropy(base.double(), targets, reduction="none")
    far = functional.kl_div(
        tuned.double().log_softmax(1), base.double().log_softmax(1), log_target=True, reduction="none"
    )
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for chunk in (1 << 23, 50, 1):
        monkeypatch.setattr(language, "_CHUNK", chunk)
        assert torch.allclose(cross_entropies(base, targets), nats, atol=close)
        assert torch.allclose(divergences(base, tuned), far.sum(1), atol=close)
    assert divergences(base, base).eq(0).all()
    near = divergences(base.float(), base.float() * (1 + 1e-7) + 3)
    assert near.min() >= 0, "rounding is no negative divergence"
    assert not torch.allclose(divergences(tuned, base), far.sum(1), atol=1e-2), "it has a direction"
    base[:, 3] = -torch.inf
    assert divergences(base, tuned).isfinite().all()
    assert divergences(tuned, base).eq(torch.inf).all()
    with pytest.raises(ValueError, match=r"the base has logits of shape \(37, 11\) and the tuned model \(37, 12\)"):
        divergences(base, torch.zeros(37, 12))


def test_no_token_or_one(tmp_path: Path) -> None:
    empty = torch.zeros(0, 5)
    assert cross_entropies(empty, torch.zeros(0, dtype=torch.long)).tolist() == []
    assert divergences(empty, empty).tolist() == []
    assert (
        fixed_mask(torch.tensor([2, 3]), torch.tensor([True, True]), share=0.5, seed=0, place=0).tolist() == [False] * 2
    )
    assert predicted(torch.tensor([[7]]), shifted=True).tolist() == [[False]]
    found = read(LanguageModelling(["w5", *sentences(3)]), llama(), tmp_path, tuned=llama(seed=1))
    assert found["language"].weights[0] == 0, "a single token is predicted from nothing"
    assert found["language_kl"].weights[0] == 0


def test_changes_and_their_errors_are_paired_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (400,), generator=generator).double()
    level = torch.randn(400, generator=generator).double()
    before = weights * (3 + level)
    after = before + weights * (0.1 + 0.01 * torch.randn(400, generator=generator).double())
    base, now = Reading(before, weights, "loss"), Reading(after, weights, "loss")
    change = compare(now, base)
    assert change.forgetting == pytest.approx(0.1, abs=0.003)
    assert change.retention == pytest.approx(torch.tensor(-change.forgetting).exp().item())
    assert change.error < 0.002 < 0.03 < now.error
    drawn = torch.randint(0, 400, (2000, 400), generator=generator)
    again = (after - before)[drawn].sum(1) / weights[drawn].sum(1)
    assert change.error == pytest.approx(float(again.std()), rel=0.1), "as the bootstrap has it"
    better = compare(base, now)
    assert better.forgetting < 0
    assert better.retention > 1


CLASSED = [{"input_ids": [5, 6, 7], "labels": 1}] * 2

FINDINGS: dict[str, tuple[Any, Any, str]] = {
    "no language model": (lambda: tiny.bert(), {}, "BertForSequenceClassification is no language model by its class"),
    "a model of one's own": (
        lambda: torch.nn.Linear(2, 2),
        {},
        'Say which it is by kind="causal" or kind="masked", and',
    ),
    "classes": (bert_lm, {"rows": CLASSED}, "the `labels` of a row are 1 and its `input_ids` 3 tokens"),
    "classes, causal": (llama, {"rows": CLASSED}, "A class is none: leave `labels` out of such rows. The row: \"{'"),
    "the class of a word": (llama, {"rows": [{"input_ids": [5], "labels": 1}]}, "are 1 and its `input_ids` 1 tokens"),
    "more labels than tokens": (
        llama,
        {"rows": [{"input_ids": [5] * 9, "labels": [5] * 10}], "max_length": 8},
        "9 tokens; expected one for each",
    ),
    "another mask": (llama, {"rows": [{"input_ids": [5], "attention_mask": [1, 1]}]}, "the `attention_mask` of a row"),
    "no kind": (lambda: tiny.bert(), {"head": torch.nn.Linear(16, 40)}, "Say which it is by kind="),
    "a source without labels": (t5, {}, "measured on rows with `input_ids` and `labels`"),
    "its own head": (llama, {"head": "own"}, "`head` shares parameters with the model"),
    "no rows": (llama, {"rows": ["", ""]}, "no rows with tokens"),
    "numbers": (llama, {"rows": [1, 2]}, "expected texts, or rows with `input_ids`, got int"),
    "a stream": (llama, {"rows": iter([])}, "expected a data set with a length"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_cannot_be_measured_is_a_finding(name: str, tmp_path: Path) -> None:
    make, options, message = FINDINGS[name]
    model = make()
    if options.get("head") == "own":
        options = {"head": model.lm_head}
    measure = LanguageModelling(**{"rows": sentences(), **options})
    trainer = Trainer(model, tiny.arguments(tmp_path), processing_class=tokenizer())
    assert any(message in text for text in measure.findings(trainer)), measure.findings(trainer)


def test_batches_of_a_collator_that_are_not_a_row_for_each(tmp_path: Path) -> None:
    rows: Any = [{"input_ids": ids_of(text)[0].tolist()} for text in sentences(5)]
    flat = LanguageModelling(rows, collate=DataCollatorWithFlattening())
    with pytest.raises(
        ValueError, match=r"labels of shape \(1, \d+\) for \(1, \d+\) tokens of 5 rows; expected \(rows,"
    ):
        read(flat, llama(), tmp_path)
    assert read(flat, llama(), tmp_path, per_device_eval_batch_size=1)["language"].value > 0
    classed = lambda rows: {**padded(rows), "labels": torch.ones(len(rows)).long()}  # noqa: E731
    with pytest.raises(ValueError, match=r"`collate` makes labels of shape \(5,\) for \(5, 7\) tokens"):
        read(LanguageModelling(rows, collate=classed), bert_lm(), tmp_path)


class Own(torch.nn.Module):
    """A causal language model that is no class of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.inner(input_ids, attention_mask=attention_mask).logits}


def test_a_language_model_of_ones_own_is_known_by_its_kind(tmp_path: Path) -> None:
    found = read(LanguageModelling(sentences(), kind="causal"), Own(), tmp_path)["language"]
    assert torch.allclose(found.sums, read(LanguageModelling(sentences()), llama(), tmp_path)["language"].sums)


def test_a_masked_model_needs_a_mask_and_texts_a_tokenizer(tmp_path: Path) -> None:
    trainer = Trainer(bert_lm(), tiny.arguments(tmp_path))
    (found,) = LanguageModelling([{"input_ids": [5, 6, 7]}] * 2).findings(trainer)
    assert "a masked model needs a tokenizer that has a mask token" in found
    (found,) = LanguageModelling(sentences()).findings(trainer)
    assert "the rows are texts and there is no tokenizer" in found
    with pytest.raises(ValueError, match="`mask_share` is 0"):
        LanguageModelling(sentences(), mask_share=0)
    with pytest.raises(ValueError, match="`max_length` is 1"):
        LanguageModelling(sentences(), max_length=1)
    with pytest.raises(ValueError, match="`kind` is 'prefix'"):
        LanguageModelling(sentences(), kind="prefix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`max_rows` is 1"):
        LanguageModelling(sentences(), max_rows=1)
    with pytest.raises(ValueError, match="`name` is 'a/b'"):
        LanguageModelling(sentences(), name="a/b")
