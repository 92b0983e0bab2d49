"""The comparison, end to end on a tiny model: every row, its files, and the verdicts."""

import json
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from compare import Comparison, main
from datasets import load_from_disk
from peft import PeftModel
from report import ROWS
from rows import RANDOM, SETTINGS
from transformers import AutoModelForSequenceClassification, BertTokenizerFast

from hub_cards import publish, pull, verify
from tests import timm_beside, tiny
from tests.hub_server import HubServer
from tests.test_attach import SCHEMA


def test_every_row_but_the_baseline_has_settings() -> None:
    assert set(ROWS) == {"tfidf", *SETTINGS}


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="`rows` names `ful`"):
        Comparison(rows=["ful"])
    with pytest.raises(ValueError, match="`hub_row` is `tfidf`; expected one of `rows` that has a model"):
        Comparison(push_to_hub=True, hub_row="tfidf")
    with pytest.raises(ValueError, match="`hub_model_id` is None; --push_to_hub needs owner/name, before training"):
        Comparison(push_to_hub=True)
    with pytest.raises(ValueError, match="at least one"):
        Comparison(num_seeds=0)
    with pytest.raises(ValueError, match=r"`min_retention` is 0\.9; expected a share above 0 and up to 1"):
        Comparison(min_retention=0.9)
    published = {"push_to_hub": True, "hub_model_id": "alice/x", "min_retention": 0.9}
    assert Comparison(**published).min_retention == 0.9  # control
    for change in ({"min_retention": 98.0}, {"num_pairs": 0}):
        with pytest.raises(ValueError, match="together with --push_to_hub and some --num_pairs"):
            Comparison(**{**published, **change})
    with pytest.raises(ValueError, match="but the row `scratch` starts from random weights and has nothing to retain"):
        Comparison(**published, hub_row="scratch")


def tiny_model(folder: Path) -> Path:
    """A tiny model with a tokenizer of single letters, as a folder."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(n) for n in range(97, 123)), "the", "of", "is"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    network = tiny.bert(layers=2)
    network.resize_token_embeddings(len(vocabulary))
    network.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_comparison_runs_and_leaves_a_run_folder_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The processes that it starts get this one's path, and must not find a torchvision that breaks transformers.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(timm_beside.FOLDER)])
    model = tiny_model(tmp_path / "model")
    folder = tmp_path / "runs"
    comparison = Comparison(
        output_dir=str(folder), model_name_or_path=str(model), label_counts=[20], num_seeds=1, max_seq_length=12,
        num_pairs=100, push_to_hub=True, hub_row="full", hub_model_id="alice/docstrings", min_retention=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"retention is 0\.\d+ \(`retrieval`\), and at least 1 was asked for"):
        main(comparison)  # all of it is done before it is refused
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "report.png").stat().st_size > 10_000
    text = (folder / "report.md").read_text()
    assert all(label in text for label in ROWS.values())
    assert "Transfer:" in text
    assert "one seed" in text
    (cell,) = report["label_counts"]
    rows = {row["row"]: row for row in cell["rows"]}
    assert set(rows) == set(ROWS)
    assert rows["probe"]["retention"] == {"mean": 1.0, "low": 1.0, "high": 1.0}  # its features are the pretrained ones
    kept = {row for row in ROWS if rows[row]["retention"] is not None}
    assert kept == set(SETTINGS) - {*RANDOM}
    assert {rows[row]["retention"]["mean"] for row in kept} != {1.0}
    assert set(cell["front"]["rows"]) <= kept
    assert cell["front"]["sentence"] in text
    assert "retention, %" in text
    assert "pairs " in report["meta"]["fingerprints"]
    assert rows["probe"]["trainable_share"] < rows["lora"]["trainable_share"] < rows["gradual"]["trainable_share"] == 1
    fingerprints: set[str] = set()
    for row in SETTINGS:
        found = json.loads((folder / f"{row}-20-0" / "recipe.json").read_text())
        jsonschema.validate(found, SCHEMA)
        assert found["results"]["test"]["accuracy"] == pytest.approx(rows[row]["accuracy"]["mean"])
        comparison = found["comparison"]
        assert (comparison["row"], comparison["n"], comparison["test_items"]) == (row, 20, 9 * 54)
        beside = {one["row"]: one for one in comparison["rows"]}
        assert set(beside) == set(ROWS)
        assert beside[row]["values"] == rows[row]["accuracies"]
        assert beside[row]["value"] == rows[row]["accuracy"]
        assert beside["scratch"]["gain"] is None
        assert beside["full"]["gain"]["low"] <= beside["full"]["gain"]["mean"] <= beside["full"]["gain"]["high"]
        assert beside[row]["retention"] == rows[row]["retention"]
        assert comparison["front"]["rows"] == cell["front"]["rows"]
        monitor = found["methods"].get("ForgettingMonitor")
        assert (monitor is not None) is (row in kept)
        if monitor is not None:
            assert monitor["rows"] == {"retrieval": 100}
            assert monitor["retention"] == pytest.approx(rows[row]["retention"]["mean"])
        assert comparison["transfer"]["sentence"] == cell["transfer"]["sentence"]
        splits = found["data"]["splits"]
        assert {name: split["rows"] for name, split in splits.items()} == {"train": 20, "test": 9 * 54}
        fingerprints.add(splits["test"]["fingerprint"])
        assert found["preprocessing"] == {"max_length": 12}
        assert (found["model"]["fingerprint"] is None) is (row in ("scratch", "random_probe"))
        history = json.loads((folder / f"{row}-20-0" / "trainer_state.json").read_text())["log_history"]
        assert any("tl/rate/head" in entry for entry in history)
    assert len(fingerprints) == 1


@pytest.mark.slow
def test_the_run_of_a_row_is_published_if_transfer_paid(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(timm_beside.FOLDER)])
    folder = tmp_path / "runs"
    comparison = Comparison(
        output_dir=str(folder), model_name_or_path=str(tiny_model(tmp_path / "model")), label_counts=[20], num_seeds=1,
        max_seq_length=12, rows=["scratch", "lora"], push_to_hub=True, hub_row="lora", hub_model_id="alice/docstrings",
        require_positive_transfer=True, num_pairs=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"transfer is .*, and only positive transfer was to be published"):
        main(comparison)  # the row that decides was not run
    assert "alice/docstrings" not in hub.repos
    publish(folder / "lora-20-0", "alice/docstrings", license="mit")
    card = hub.files("alice/docstrings")["README.md"].decode()
    assert "**LoRA**" in card
    assert "Transfer: unknown" in card
    pulled = pull("alice/docstrings", base=tmp_path / "model")
    assert len(pulled.labels) == 9
    verified = verify(pulled, data=load_from_disk(str(folder / "data"))["test"])
    assert [check.metric for check in verified.checks] == ["accuracy"]
    assert verified.checks[0].found is not None
    assert verified.ok, str(verified)
    network = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=9, ignore_mismatched_sizes=True
    )
    plain = PeftModel.from_pretrained(network, folder / "lora-20-0").eval()
    batch = pulled.processor(["a of the b", "return c"], padding=True, return_tensors="pt")
    assert torch.equal(plain(**batch).logits, pulled.model(**batch).logits)
    assert not (folder / "scratch-20-0" / "model.safetensors").exists()
