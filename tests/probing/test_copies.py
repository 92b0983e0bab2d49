"""Copies share a fold, so that a probe is not scored on what it remembers; rows without copies are dealt as ever."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from tests.probing.references import sample
from tl_callbacks.probing import lda_probe, ridge_probe, stratified_folds
from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.linear_probe import ridge_probes
from tl_callbacks.probing.measures import measure
from tl_callbacks.probing.scores import score, shuffled_labels


def twice(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows of noise, each twice, far apart, and labels that a probe can only remember."""
    x = sample(rows, width).float()
    labels = torch.arange(rows) % 2
    order = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(1))
    return torch.cat([x, x])[order], torch.cat([labels, labels])[order]


def test_what_is_remembered_scores_no_better_than_chance() -> None:
    x, labels = twice(100, 300)
    alone = ridge_probes(x + 1e-3 * sample(200, 300, seed=2).float(), {"task": labels})["task"]
    assert alone.value > 0.9, "the control: near copies, on both sides of a split"
    found = [ridge_probe(x, labels), lda_probe(x, labels)]
    measured = measure({"layer": x}, labels, copies=copies({"layer": x}))
    for value in (*(one.value for one in found), measured["probe"]["layer"]):
        assert value == pytest.approx(0.5, abs=0.15)
    assert measure({"layer": x}, labels)["probe"]["layer"] > 0.9, "the control"
    assert found[0].error == pytest.approx((found[0].value * (1 - found[0].value) / 100) ** 0.5), "100 rows, not 200"
    assert found[1].error == pytest.approx((found[1].value * (1 - found[1].value) / 100) ** 0.5)
    assert measured["probe_se"]["layer"] == pytest.approx(found[0].error, rel=0.05)
    assert ridge_probe(x, labels.double()).value < 0.1, "R^2"


def test_rows_without_copies_are_dealt_as_without_looking() -> None:
    labels = torch.arange(50) % 3
    same = copies({"layer": sample(50, 4)})
    assert same.tolist() == list(range(50))
    assert torch.equal(stratified_folds(labels, 5, seed=3, copies=same), stratified_folds(labels, 5, seed=3))


def test_copies_share_a_fold_and_folds_stay_even() -> None:
    x, labels = twice(60, 4)
    number = copies({"a": x, "b": 2 * x})
    fold = stratified_folds(labels, 5, copies=number)
    assert int(number.max()) == 59
    for one in range(60):
        assert len(fold[number == one].unique()) == 1
    for kind in (0, 1):
        assert torch.bincount(fold[labels == kind]).tolist() == [12] * 5
    shuffled = shuffled_labels(labels, fold)
    assert torch.equal(torch.bincount(shuffled + 2 * fold), torch.bincount(labels + 2 * fold))
    few = torch.tensor([0, 1, 2, 3] * 5)
    assert torch.bincount(stratified_folds(labels[:20], 5, copies=few)).tolist() == [4] * 5, "fewer rows than folds"


def test_rows_are_copies_where_they_are_equal_in_every_layer() -> None:
    x = sample(20, 3)
    first = torch.ones(20, 2)  # a class token before any layer
    x[7] = x[3]
    other = sample(20, 5, seed=1)
    assert copies({"first": first, "layer": x})[7] == 3
    assert int(copies({"first": first, "layer": x}).max()) == 18
    assert int(copies({"first": first, "layer": x, "next": other}).max()) == 19
    assert copies({"first": first}).tolist() == [0] * 20
    x[[3, 7, 9, 11]] = torch.nan
    x[12] = torch.inf
    assert int(copies({"layer": x}).max()) == 19, "what is no number is a copy of nothing"
    assert copies({"layer": x[:0]}).tolist() == copies({}).tolist() == []
    x = sample(20, 3)
    x[7] = x[3] * (1 + 1e-3)
    assert int(copies({"layer": x}).max()) == 19
    x[7] = x[3] * (1 + 1e-7)
    assert int(copies({"layer": x}).max()) == 18


def test_the_same_text_in_batches_padded_otherwise_is_a_copy() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96)
    model, ids = BertModel(config).eval(), torch.randint(1, 90, (40, 9))
    parts: list[list[Tensor]] = [[], []]
    for rows, extra in ((ids, 0), (ids[:7], 14)):
        mask = torch.nn.functional.pad(torch.ones_like(rows), (0, extra))
        with torch.no_grad():
            out = model(torch.nn.functional.pad(rows, (0, extra)), mask, output_hidden_states=True)
        for part, layer in zip(parts, (out.hidden_states[0], out.hidden_states[-1]), strict=True):
            part.append((layer * mask[..., None]).sum(1) / 9)
    low, high = (torch.cat(part) for part in parts)
    assert not torch.equal(high[:7], high[40:]), "the control: rounding differs"
    assert copies({"low": low, "high": high}).tolist() == [*range(40), *range(7)]


def test_the_error_counts_copies_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 3, (50,), generator=generator) for _ in range(2))
    columns, values = torch.eye(3)[guess], torch.randn(50, 1, generator=generator)
    for rows, kind in ((columns, 3), (values, None)):
        once = score(rows, truth, kind)
        tripled = score(rows.repeat(3, 1), truth.repeat(3), kind, torch.arange(50).repeat(3))
        assert (tripled.value, tripled.error) == (pytest.approx(once.value), pytest.approx(once.error))
        assert score(rows.repeat(3, 1), truth.repeat(3), kind).error == pytest.approx(once.error / 3**0.5), "control"
    columns[4:9] = torch.nan
    assert score(columns, truth, 3, torch.arange(50)).error == pytest.approx(score(columns, truth, 3).error)
