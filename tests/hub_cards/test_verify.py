"""Verifying: the numbers of the card are found again, and a card that says others is caught."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from datasets import ClassLabel, Dataset
from sklearn.metrics import f1_score
from transformers import DataCollatorWithPadding

from hub_cards.pulling.pull import Pulled, pull
from hub_cards.pulling.rows import content_fingerprint, find_rows
from hub_cards.pulling.verify import Check, Verification, verify
from tests.hub_cards import pullable
from tests.hub_server import HubServer

COLUMNS = {"text": "sentence", "label": "grade"}
NAMES = list(pullable.LABELS.values())


def rows(count: int = 37, seed: int = 3) -> Dataset:
    """Texts of three to thirty words, so that some are cut, and labels by name."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 31, (count,), generator=generator).tolist()
    texts = [" ".join(f"w{w}" for w in torch.randint(0, 46, (n,), generator=generator).tolist()) for n in lengths]
    return Dataset.from_dict({"sentence": texts, "grade": [NAMES[number % 3] for number in range(count)], "id": texts})


def by_hand(pulled: Pulled, data: Dataset, batch_size: int) -> dict[str, float]:
    """Accuracy, macro F1 and loss without the Trainer; the loss is the mean over rows of their batch's mean."""
    labels = torch.tensor([NAMES.index(name) for name in data["grade"]])
    collate = DataCollatorWithPadding(pulled.processor)
    found, losses = [], []
    for start in range(0, len(labels), batch_size):
        texts = data["sentence"][start : start + batch_size]
        batch = collate([dict(pulled.processor(text, truncation=True, max_length=12)) for text in texts])
        with torch.no_grad():
            output = pulled.model(**batch, labels=labels[start : start + batch_size])
        found.append(output.logits)
        losses += [float(output.loss)] * len(texts)
    logits = torch.cat(found)
    predictions = logits.argmax(-1)
    return {
        "accuracy": float((predictions == labels).double().mean()),
        "f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
        "loss": sum(losses) / len(losses),
    }


def with_card(files: dict[str, bytes], data: Dataset, results: dict[str, float], **changes: Any) -> dict[str, bytes]:
    recipe = json.loads(files["recipe.json"])
    recipe["task"] = "text-classification"
    recipe["preprocessing"] = {"max_length": 12, **changes.pop("preprocessing", {})}
    recipe["training_arguments"]["per_device_eval_batch_size"] = 8
    fingerprint = content_fingerprint(data, COLUMNS)
    split = {"rows": len(data), "fingerprint": fingerprint, "split": changes.pop("source", "validation")}
    recipe["data"] = {
        "name": "rows.csv", "config": None, "local": True, "revision": None, "labels": NAMES, "columns": COLUMNS,
        "splits": {"validation": split}, **changes,
    }  # fmt: skip
    recipe["results"] = {"validation": results}
    return {**files, "recipe.json": json.dumps(recipe).encode()}


def published(hub: HubServer, kind: str, data: Dataset, **changes: Any) -> dict[str, float]:
    """A run on the Hub whose card has the true numbers; returns them."""
    made = pullable.on_hub(hub, kind)
    truth = by_hand(pull(made.repo_id), data, 8)
    files = hub.files(made.repo_id)
    results = {f"eval_{name}": value for name, value in truth.items()} | {"eval_runtime": 1.0}
    hub.seed(made.repo_id, with_card(files, data, results, **changes), user="alice")
    return truth


@pytest.mark.parametrize("kind", ["bert-lora", "bert-full", "bert-lora-bf16", "roberta-lora"])
def test_the_numbers_of_the_card_are_found_again(hub: HubServer, kind: str) -> None:
    data = rows()
    truth = published(hub, kind, data)
    found = verify("acme/run", data=data)
    assert found.ok, str(found)
    assert {check.metric for check in found.checks} == {"accuracy", "f1", "loss"}
    for check in found.checks:
        assert check.card == truth[check.metric]
        assert math.isclose(check.found or 0, check.card, abs_tol=1e-6)
        assert check.metric in str(found)


@pytest.mark.parametrize(("metric", "by"), [("accuracy", 1 / 37), ("f1", 1e-3), ("loss", 1e-3)])
def test_a_card_that_says_something_else_is_caught(hub: HubServer, metric: str, by: float) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    pulled = pull("acme/run")
    told = tuple(dataclasses.replace(r, value=r.value + by * (r.metric == metric)) for r in pulled.facts.results)
    found = verify(dataclasses.replace(pulled, facts=dataclasses.replace(pulled.facts, results=told)), data=data)
    assert not found.ok
    assert [check.metric for check in found.checks if not check.ok] == [metric]
    assert " > " in next(line for line in str(found).splitlines() if metric in line)
    assert verify(pulled, data=data).ok, "the control"
    assert not pulled.model.training


def test_changed_weights_are_caught(hub: HubServer) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    pulled = pull("acme/run")
    with torch.no_grad():
        for name, weight in pulled.model.named_parameters():
            if "classifier" in name:
                weight.add_(0.5 * torch.randn(weight.shape))
    assert not verify(pulled, data=data).ok


def test_other_rows_are_refused(hub: HubServer) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    for other in (rows(seed=4), data.select(range(36)), data.select([1, 0, *range(2, 37)])):
        with pytest.raises(ValueError, match=r"rows are not those of `validation` on the card: .* of 37 rows. Give"):
            verify("acme/run", data=other)
    with pytest.raises(ValueError, match=r"the data have no column `grade`, `sentence`; expected `grade`, `sentence`"):
        verify("acme/run", data=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(
        ValueError, match=r"evaluated on `rows.csv`, a file of another machine; pass data= with these 37"
    ):
        verify("acme/run")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_a_file(hub: HubServer, tmp_path: Path, suffix: str) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        data.to_parquet(path)
    elif suffix == "jsonl":
        data.to_json(path)
    else:
        data.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    assert verify("acme/run", data=path).ok
    with pytest.raises(ValueError, match=r"expected a file that is there and ends in one of .csv"):
        verify("acme/run", data=tmp_path / "rows.xlsx")


def test_rows_of_the_hub_at_the_recorded_commit(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(data: Dataset) -> str:
        named = data.cast_column("grade", ClassLabel(names=["good", "bad", "fair"]))
        named.to_parquet(tmp_path / "rows.parquet")
        files = {"data/validation-00000-of-00001.parquet": tmp_path / "rows.parquet"}
        return hub.seed("acme/grades", files, repo_type="dataset", user="alice")

    data = rows()
    sha = commit(data)
    commit(rows(seed=9))
    published(hub, "bert-lora", data, name="acme/grades", local=False, revision=sha)
    assert verify("acme/run").ok
    with monkeypatch.context() as offline:
        offline.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        offline.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        assert verify("acme/run").ok
    published(hub, "bert-lora", data, name="acme/grades", local=False, revision=None)
    with pytest.raises(ValueError, match=r"rows are not those of `validation`"):
        verify("acme/run")


@pytest.mark.parametrize("name", ["./folder", "acme/folder", "text", "pandas", "https://evil.example/a.csv"])
def test_a_data_set_is_never_one_of_this_machine(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pullable.on_hub(hub, "bert-full")
    files = with_card(hub.files("acme/run"), rows(), {"loss": 1.0}, name=name, local=False)
    hub.seed("acme/run", {"recipe.json": files["recipe.json"]}, user="alice")
    for folder in (tmp_path / "folder", tmp_path / "acme" / "folder"):
        folder.mkdir(parents=True)
        rows().to_csv(folder / "validation.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"on the data set `{name}`, which `datasets` would read from this machine"):
        verify("acme/run")


def test_rows_that_training_held_out(hub: HubServer) -> None:
    data = rows(80)
    held = data.train_test_split(test_size=0.25, seed=5)["test"]
    settings = {"validation_split_percentage": 25, "split_seed": 5}
    published(hub, "bert-lora", held, source="train", preprocessing=settings)
    assert verify("acme/run", data=data).ok
    assert verify("acme/run", data=held).ok
    assert find_rows(pull("acme/run").facts, "validation", data).num_rows == 20


def test_what_cannot_be_verified(hub: HubServer) -> None:
    data = rows()
    published(hub, "bert-lora", data)
    pulled = pull("acme/run")

    def told(**facts: Any) -> Pulled:
        return dataclasses.replace(pulled, facts=dataclasses.replace(pulled.facts, **facts))

    with pytest.raises(ValueError, match=r"the task on the card is `image-classification`; expected one of text-class"):
        verify(told(task="image-classification"), data=data)
    with pytest.raises(ValueError, match=r"the task on the card is `text-classification`, without data"):
        verify(told(data=None), data=data)
    with pytest.raises(ValueError, match=r"`split` is `test`; expected one that the card has both .*: `validation`"):
        verify(pulled, data=data, split="test")
    other = tuple(dataclasses.replace(result, metric="mcc") for result in pulled.facts.results)
    with pytest.raises(ValueError, match=r"the card has `mcc`.*, of which none can be computed again; expected one of"):
        verify(told(results=other), data=data)
    some = (*pulled.facts.results, other[0])
    found = verify(told(results=some), data=data)
    assert found.ok
    assert "not computed again" in str(found)
    with pytest.raises(ValueError, match=r"the data have the labels `bad`; expected those of the model: \('poor'"):
        verify(dataclasses.replace(pulled, labels=("poor", "fair", "good")), data=data)


def test_the_table() -> None:
    checks = (Check("test", "accuracy", 0.5, 0.5 + 2e-6, 1e-6), Check("test", "mcc", 0.1, None, 1e-6))
    assert not Verification(checks).ok
    assert Verification(checks[1:]).ok
    assert str(Verification(checks)).splitlines()[1] == "test   accuracy  0.500000  0.500002  +2.0e-06 > 1e-06"
