"""Recall of text pairs: ties are shared, no order of the rows matters, and padding is no part of a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests import tiny
from tests.forgetting.models import bert_lm, llama, sentences, t5, tokenizer
from tl_callbacks import Retrieval, group_layers
from tl_callbacks.forgetting import recall_at, retrieval


def brute_force(queries: torch.Tensor, documents: torch.Tensor, k: int) -> list[bool]:
    x, y = (torch.nn.functional.normalize(side.double(), dim=1) for side in (queries, documents))
    return [number in (row @ y.T).topk(k).indices.tolist() for number, row in enumerate(x)]


@pytest.mark.parametrize("k", [1, 3])
def test_recall_is_that_of_a_search_by_hand(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(60, 8, generator=generator)
    documents = queries + 0.9 * torch.randn(60, 8, generator=generator)
    expected = brute_force(queries, documents, k)
    assert 0.2 < sum(expected) / 60 < 0.95
    for chunk in (1 << 22, 100):
        monkeypatch.setattr(retrieval, "_CHUNK", chunk)
        assert recall_at(queries, documents, k).tolist() == [float(hit) for hit in expected]
    assert torch.equal(recall_at(queries, 7 * documents, k), recall_at(queries, documents, k))


def test_equally_near_documents_share_the_place() -> None:
    same = torch.ones(8, 3)
    assert recall_at(same, same).tolist() == pytest.approx([1 / 8] * 8), "no knowledge scores chance"
    assert recall_at(same, same, 4).tolist() == pytest.approx([0.5] * 8)
    assert recall_at(same, same, 20).tolist() == [1.0] * 8
    assert recall_at(torch.zeros(4, 3), torch.zeros(4, 3)).tolist() == pytest.approx([0.25] * 4)
    twins = torch.eye(4)[[0, 0, 1, 2]]
    assert recall_at(twins, twins).tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    order = torch.tensor([3, 1, 0, 2])
    assert recall_at(twins[order], twins[order]).tolist() == recall_at(twins, twins)[order].tolist()
    broken = torch.eye(4)
    broken[1] = torch.nan
    assert recall_at(broken, torch.eye(4)).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert recall_at(torch.eye(4), broken).tolist() == [1.0, 0.0, 1.0, 1.0], "nor does a document that is no number"
    assert recall_at(broken, torch.full((4, 4), torch.nan)).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r"the queries are \(4, 4\) and the documents \(3, 4\)"):
        recall_at(torch.eye(4), torch.eye(4)[:3])
    with pytest.raises(ValueError, match="`k` is 0"):
        recall_at(torch.eye(4), torch.eye(4), 0)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_texts_are_read_without_their_padding(pooling: Any, tmp_path: Path) -> None:
    pairs, model = list(zip(sentences(9), sentences(9, seed=8), strict=True)), bert_lm()
    measure = Retrieval(pairs, pooling=pooling)
    trainer = Trainer(model, tiny.arguments(tmp_path, per_device_eval_batch_size=5), processing_class=tokenizer())
    assert measure.findings(trainer) == []
    part = measure.read(model, group_layers(model), base=True, rank=0, ranks=1).sorted()
    sides = []
    for side in range(2):
        rows = []
        for pair in pairs:
            ids = torch.tensor([tokenizer()(pair[side])["input_ids"]])
            with torch.no_grad():
                states = model.bert.eval()(ids).last_hidden_state[0]
            rows.append({"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling])
        sides.append(torch.stack(rows))
    assert torch.allclose(part.features["features"], torch.cat(sides), atol=1e-5)
    assert measure.score(part)["retrieval"].sums.tolist() == recall_at(*sides).tolist()
    assert measure.score(part)["retrieval"].chance == 1 / 9
    assert measure.rows == 9
    assert not any(module._forward_hooks for module in model.modules())


class Wrapped(torch.nn.Module):
    """A model that is no class of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 3)

    def forward(self, input_ids: Any) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.encoder(input_ids))}


def test_a_model_that_is_no_class_of_transformers_is_read_below_its_head(tmp_path: Path) -> None:
    model, pairs = Wrapped(), list(zip(sentences(4), sentences(4, seed=8), strict=True))
    measure = Retrieval(pairs)
    trainer = Trainer(model, tiny.arguments(tmp_path), processing_class=tokenizer())
    assert measure.findings(trainer) == []
    part = measure.read(model, group_layers(model), base=True, rank=0, ranks=1).sorted()
    ids = torch.tensor(tokenizer()(pairs[0][0])["input_ids"])
    assert torch.allclose(part.features["features"][0], model.encoder(ids).mean(0), atol=1e-6)
    assert part.features["features"].shape == (8, 16), "and not the logits"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_tokenised_texts_with_padding_on_the_left_lose_none_of_their_tokens(pooling: Any, tmp_path: Path) -> None:
    model, longest = llama(), 12
    sides = [[tokenizer()(text)["input_ids"] for text in sentences(9, seed=seed)] for seed in (3, 8)]
    plain = [[{"input_ids": ids} for ids in pair] for pair in zip(*sides, strict=True)]
    blank = lambda ids: [0] * (longest - len(ids))  # noqa: E731
    padded = [
        [{"input_ids": blank(ids) + ids, "attention_mask": blank(ids) + [1] * len(ids)} for ids in pair]
        for pair in zip(*sides, strict=True)
    ]
    found = []
    for pairs in (plain, padded):
        measure = Retrieval(pairs, pooling=pooling, max_length=9)
        trainer = Trainer(model, tiny.arguments(tmp_path), processing_class=tokenizer())
        assert measure.findings(trainer) == []
        found.append(measure.read(model, group_layers(model), base=True, rank=0, ranks=1).sorted().features["features"])
    assert torch.allclose(*found, atol=1e-5)


FINDINGS: dict[str, tuple[Any, Any, str]] = {
    "an encoder-decoder": (t5, {}, "models of one stack"),
    "no pairs": (llama, {"pairs": sentences()}, "expected pairs (query, document), got 'w"),
    "three": (llama, {"pairs": [("w5", "w6", "w7")] * 3}, "expected pairs"),
    "an empty text": (llama, {"pairs": [("w5", ""), ("w6", "w7")]}, "a text gives 0 samples"),
    "few": (llama, {"pairs": [("w5", "w6")] * 3, "k": 3}, "there are 3 pairs and k=3; expected more"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_cannot_be_measured_is_a_finding(name: str, tmp_path: Path) -> None:
    make, options, message = FINDINGS[name]
    pairs = list(zip(sentences(), sentences(seed=9), strict=True))
    measure = Retrieval(**{"pairs": pairs, **options})
    trainer = Trainer(make(), tiny.arguments(tmp_path), processing_class=tokenizer())
    assert any(message in text for text in measure.findings(trainer)), measure.findings(trainer)


def test_pairs_may_be_columns_and_numbers_are_checked(tmp_path: Path) -> None:
    rows = [{"query": a, "document": b} for a, b in zip(sentences(), sentences(seed=9), strict=True)]
    trainer = Trainer(llama(), tiny.arguments(tmp_path), processing_class=tokenizer())
    assert Retrieval(rows).findings(trainer) == []
    with pytest.raises(ValueError, match="`k` is 0"):
        Retrieval(rows, k=0)
    with pytest.raises(ValueError, match="`pooling` is 'max'"):
        Retrieval(rows, pooling="max")  # type: ignore[arg-type]
