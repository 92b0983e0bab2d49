"""From a run's folder to the Hub: what arrives, what is refused, and what stays as it was."""

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification

from hub_cards import PublishError, list_adapters, publish, pull, read_facts, render
from hub_cards.__main__ import main
from hub_cards.licences import LicenceError
from tests.hub_cards import runs, trained
from tests.hub_cards.trained import BASE, RUN, Run, go, writes
from tests.hub_server import HubServer
from tl_callbacks.fingerprints import fingerprint


def ours(hub: HubServer) -> set[str]:
    return set(hub.files(RUN)) - {".gitattributes"}


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_a_model_arrives_and_says_what_it_said(hub: HubServer, tmp_path: Path) -> None:
    full = trained.train("full").copy(tmp_path / "run", curves=True)
    trained.seed_base(hub, full)
    found = go(full, base_model=BASE)
    assert ours(hub) == set(found.files) == set(found.added)
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.json", "training_args.json"} <= ours(hub)
    assert "figures/curve.png" in ours(hub)
    assert "training_args.bin" in found.left_out
    assert hub.repos[RUN].private
    assert [commit.sha for commit in hub.commits(RUN)][:-1] == [found.commit]
    folder = snapshot_download(RUN)
    model = BertForSequenceClassification.from_pretrained(folder)
    assert torch.equal(trained.logits(model), full.logits)
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == [3, 4]
    tags = HfApi().model_info(RUN).tags
    assert {f"base_model:finetune:{BASE}", "license:mit"} <= set(tags)


def test_an_adapter_is_pinned_and_knows_its_head(lora: Run, hub: HubServer, tmp_path: Path) -> None:
    sha = trained.seed_base(hub, lora)
    trained.change(lora.folder / "adapter_config.json", inference_mode=False)
    go(lora.on_hub())
    config = json.loads(hub.files(RUN)["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"], config["inference_mode"]) == (BASE, sha, True)
    head = config["auto_mapping"]
    assert head["base_model_class"] == "BertForSequenceClassification"
    assert (head["num_labels"], head["id2label"]) == (3, {"0": "bad", "1": "fair", "2": "good"})
    assert head["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    # Its base moves on; the adapter still meets the one it was trained on.
    hub.seed(BASE, {"model.safetensors": (trained.base(seed=9) / "model.safetensors").read_bytes()})
    auto = AutoPeftModelForSequenceClassification.from_pretrained(RUN, num_labels=3)
    assert torch.equal(trained.logits(auto), lora.logits)
    model = BertForSequenceClassification.from_pretrained(BASE, num_labels=3, revision=sha)
    assert torch.equal(trained.logits(PeftModel.from_pretrained(model, RUN)), lora.logits)
    assert [model.id for model in HfApi().list_models(filter=f"base_model:adapter:{BASE}")] == [RUN]
    moved = BertForSequenceClassification.from_pretrained(BASE, num_labels=3)
    assert not torch.equal(trained.logits(PeftModel.from_pretrained(moved, RUN)), lora.logits)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_published_can_be_pulled(kind: str, hub: HubServer, tmp_path: Path) -> None:
    run = trained.train(kind).copy(tmp_path / "run").on_hub()
    trained.seed_base(hub, run)
    go(run)
    pulled = pull(RUN)
    assert torch.equal(trained.logits(pulled.model), run.logits)
    assert pulled.processor("w1 w2").input_ids == [3, 4]
    assert pulled.facts.base.verified
    downloaded = snapshot_download(RUN, local_dir=tmp_path / "downloaded")
    assert publish(downloaded, "alice/again").commit
    again = pull("alice/again")
    assert torch.equal(trained.logits(again.model), run.logits)
    assert again.facts.repo_id == "alice/again"
    assert again.facts.licence == pulled.facts.licence


@pytest.mark.parametrize("part_size", [1 << 30, 5000])
def test_uploads_in_parts(full: Run, hub: HubServer, part_size: int) -> None:
    hub.part_size = part_size
    go(full)
    assert hub.files(RUN)["model.safetensors"] == (full.folder / "model.safetensors").read_bytes()
    parts = [call for call in hub.requests if "/storage/" in call.path]
    assert (len(parts) > 2) == (part_size == 5000)


@pytest.mark.slow
def test_one_commit_with_xet(full: Run, hub: HubServer, tmp_path: Path) -> None:
    hub.xet = True
    command = [sys.executable, "-m", "hub_cards", "publish", str(full.folder), RUN, "--license", "mit"]
    done = subprocess.run(
        command, env=hub.environment(tmp_path / "home", os.environ["HF_TOKEN"]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"published as {hub.commits(RUN)[0].sha}" in done.stdout
    assert len(hub.commits(RUN)) == 2
    assert hub.files(RUN)["model.safetensors"] == (full.folder / "model.safetensors").read_bytes()
    assert any("xet-write-token" in call.path for call in hub.requests)


def test_an_adapter_of_a_local_base_names_no_base(lora: Run, hub: HubServer) -> None:
    go(lora)
    files = hub.files(RUN)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert b"base_model" not in files["README.md"].split(b"\n---", 1)[0]
    facts = read_facts(snapshot_download(RUN))
    assert facts.base.name is None
    assert facts.base.digest == read_facts(lora.folder).base.digest
    model = BertForSequenceClassification.from_pretrained(lora.base, num_labels=3)
    assert torch.equal(trained.logits(PeftModel.from_pretrained(model, RUN)), lora.logits)
    assert not hub.ever_saw(str(lora.base))


def test_the_card_on_the_hub_is_made_from_the_facts_beside_it(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora)
    found = go(lora.on_hub())
    folder = Path(snapshot_download(RUN))
    facts = read_facts(folder)
    assert (folder / "README.md").read_text() == found.card == render(facts)
    assert (facts.repo_id, facts.merged, facts.base.verified) == (RUN, False, True)
    assert facts.licence is not None
    assert facts.licence.identifier == "mit"
    manifest = json.loads((folder / "recipe.json").read_text())["published"]["files"]
    assert set(manifest) == ours(hub) - {"recipe.json", "README.md"}
    assert manifest["adapter_model.safetensors"]["size"] == found.files["adapter_model.safetensors"]


def test_a_merged_model_needs_no_peft(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora)
    found = go(lora.on_hub(), merge=True)
    assert "adapter_config.json" not in found.files
    folder = snapshot_download(RUN)
    model = BertForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(trained.logits(model), lora.logits, atol=1e-5, rtol=0)
    assert model.config.id2label == trained.LABELS
    assert "base_model_relation: merge" in found.card
    assert read_facts(folder).merged
    assert not read_facts(folder).is_adapter


def test_a_merged_model_of_a_local_base(lora: Run, hub: HubServer) -> None:
    found = go(lora, merge=True)
    assert "base_model:" not in found.card
    model = BertForSequenceClassification.from_pretrained(snapshot_download(RUN))
    torch.testing.assert_close(trained.logits(model), lora.logits, atol=1e-5, rtol=0)
    assert not hub.ever_saw(str(lora.base))


def test_a_parameter_called_token_is_no_secret(full: Run, hub: HubServer) -> None:
    found = json.loads((full.folder / "recipe.json").read_text())["model"]["fingerprint"]
    found["tensors"]["vit.embeddings.cls_token"] = "125d0c0f9a8b7c6d"
    trained.change(full.folder / "recipe.json", within="model", fingerprint=found)
    assert go(full).commit
    trained.change(full.folder / "recipe.json", notes={"cls_token": "125d0c0f9a8b7c6e"})
    with pytest.raises(ValueError, match=r"recipe.json:\d+: value of a secret"):
        go(full)


@pytest.mark.parametrize("token", ["hf_aBcD1eFg\n", " hf_aBcD1eFg", "hf_aBcD1eFgä", "hf_aBcD 1eFg", "", "\n"])
def test_a_token_that_cannot_be_one_is_told_and_not_shown(full: Run, hub: HubServer, token: str) -> None:
    for call in (
        lambda: go(full, token=token),
        lambda: pull(RUN, token=token),
        lambda: list_adapters(BASE, token=token),
    ):
        with pytest.raises(ValueError, match=r"^the token (is empty|begins or ends|has a character)") as caught:
            call()
        assert "aBcD" not in "".join(traceback.format_exception_only(caught.value))
    assert not hub.requests


@pytest.mark.parametrize("where", ["here", "on the Hub"])
def test_a_card_that_is_no_utf8(full: Run, hub: HubServer, where: str) -> None:
    trained.seed_base(hub, full)
    if where == "here":
        (full.folder / "README.md").write_bytes(b"caf\xe9\n")
    else:
        hub.seed(RUN, {"README.md": b"caf\xe9\n"}, user="alice")
    with pytest.raises(ValueError, match=r"README.md` is no UTF-8 \(.* at byte 3\), so what is your own"):
        go(full, private=where == "here")


def test_a_recipe_of_brackets_on_the_hub_is_replaced(full: Run, hub: HubServer) -> None:
    hub.seed(RUN, {"recipe.json": b"[" * 100_000}, user="alice")
    assert go(full, private=False).changed


def test_what_could_not_be_pulled_is_not_published(full: Run, hub: HubServer) -> None:
    trained.change(full.folder / "tokenizer_config.json", vocab_file="vocab.txt")
    with pytest.raises(ValueError, match=r"`tokenizer_config.json` has `vocab_file: vocab.txt`, which is none of the"):
        go(full)


def test_merge_needs_an_adapter(full: Run, hub: HubServer) -> None:
    with pytest.raises(ValueError, match="no adapter to merge"):
        go(full, merge=True)


# -- again ------------------------------------------------------------------------------------------------------------


def test_again_makes_no_commit(full: Run, hub: HubServer) -> None:
    first = go(full)
    seen = len(hub.requests)
    again = go(full, license=None)  # the licence is the one that the card states
    assert not again.changed
    assert again.commit == first.commit == hub.commits(RUN)[0].sha
    assert not again.diff
    assert writes(hub, seen) == []
    trained.change(full.folder / "recipe.json", task="summarization")
    third = go(full)
    assert third.changed
    assert third.commit == hub.commits(RUN)[0].sha != first.commit
    assert "README.md" in third.modified
    assert "model.safetensors" not in third.modified


def test_a_dry_run_reads_only(full: Run, hub: HubServer) -> None:
    shown = go(full, dry_run=True)
    assert shown.commit is None
    assert writes(hub) == []
    assert RUN not in hub.repos
    assert "model.safetensors" in str(shown)
    assert "license: mit" in str(shown)
    assert "left out: training_args.bin" in str(shown)
    go(full)
    seen = len(hub.requests)
    trained.change(full.folder / "recipe.json", task="summarization")
    shown = go(full, dry_run=True)
    assert writes(hub, seen) == []
    assert "-pipeline_tag: text-classification\n+pipeline_tag: summarization" in str(shown)
    assert not [path for path in full.folder.iterdir() if path.name.startswith(".publishing")]


def test_only_our_own_stale_files_are_deleted(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora)
    lora.on_hub()
    (lora.folder / "LICENSE").write_text("MIT")
    first = go(lora)
    hub.seed(RUN, {"notes.txt": b"theirs", "figures/theirs.png": b"\x89PNG\r\n\x1a\n"}, user="alice")
    (lora.folder / "LICENSE").unlink()
    merged = go(lora, merge=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "LICENSE"} <= set(merged.deleted)
    assert ours(hub) == set(merged.files) | {"notes.txt", "figures/theirs.png"}
    back = go(lora)
    assert {"config.json", "model.safetensors"} <= set(back.deleted)
    assert set(back.files) == set(first.files) - {"LICENSE"}


def test_what_somebody_wrote_on_the_hub_stays(full: Run, hub: HubServer) -> None:
    go(full)
    card = hub.files(RUN)["README.md"].decode() + "\n## My own remarks\n\nSeen by me.\n"
    hub.seed(RUN, {"README.md": card}, user="alice")
    trained.change(full.folder / "recipe.json", task="summarization")
    found = go(full)
    assert "Seen by me." in found.card
    assert "summarization" in found.card


def test_a_gitignore_in_the_repository_holds_nothing_back(full: Run, hub: HubServer) -> None:
    hub.seed(RUN, {".gitignore": b"*.json\n*.safetensors\n"}, private=True, user="alice")
    found = go(full)
    assert ours(hub) == {*found.files, ".gitignore"}


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_of_another_model_in_the_repository(full: Run, hub: HubServer, name: str) -> None:
    hub.seed(RUN, {name: b"{}", "onnx/model.onnx": b"kept"}, private=True, user="alice")
    with pytest.raises(ValueError, match=rf"`{re.escape(name)}` of another model"):
        go(full)
    assert ours(hub) == {name, "onnx/model.onnx"}


# -- gates ------------------------------------------------------------------------------------------------------------


def refused(run: Run, hub: HubServer, error: type[Exception], match: str, **options: Any) -> None:
    """Refuses, sends nothing that could change something, and leaves no staging folder."""
    before = sorted(path.name for path in run.folder.iterdir())
    seen = len(hub.requests)
    with pytest.raises(error, match=match):
        go(run, **options)
    assert writes(hub, seen) == []
    assert RUN not in hub.repos
    assert sorted(path.name for path in run.folder.iterdir()) == before


def test_a_run_that_did_not_finish(full: Run, hub: HubServer) -> None:
    trained.change(full.folder / "recipe.json", status="running")
    refused(full, hub, ValueError, "stopped at step 3 of 3")


def test_no_such_run(tmp_path: Path, hub: HubServer) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no recipe\.json"):
        publish(tmp_path, RUN)


@pytest.mark.parametrize("name", ["run", "alice/../x", "alice/a b", "alice/run/more"])
def test_no_name_of_a_repository(full: Run, hub: HubServer, name: str) -> None:
    with pytest.raises(ValueError, match="expected `owner/name`"):
        publish(full.folder, name)
    assert hub.requests == []


def test_transfer_has_to_be_measured_and_positive(full: Run, hub: HubServer) -> None:
    refused(full, hub, ValueError, "transfer is not measured", require_positive_transfer=True)
    verdict = {"outcome": "inconclusive", "sentence": "Transfer: inconclusive."}
    trained.change(full.folder / "recipe.json", comparison={**runs.COMPARISON, "transfer": verdict})
    refused(full, hub, ValueError, "transfer is inconclusive", require_positive_transfer=True)
    positive = {**verdict, "outcome": "positive"}
    trained.change(full.folder / "recipe.json", comparison={**runs.COMPARISON, "transfer": positive})
    assert go(full, require_positive_transfer=True).commit


def test_retention_has_to_be_measured_and_enough(full: Run, hub: HubServer) -> None:
    refused(full, hub, ValueError, "retention was not measured, and at least 0.9 was", min_retention=0.9)
    refused(full, hub, ValueError, "`min_retention` is 98", min_retention=98)
    methods = json.loads((full.folder / "recipe.json").read_text())["methods"]

    def measured(**changes: Any) -> None:
        monitor = {**runs.RETENTION, **changes}
        trained.change(full.folder / "recipe.json", methods={**methods, "ForgettingMonitor": monitor})

    measured()
    refused(
        full, hub, ValueError, r"retention is 0.96 \(`retrieval`\), and at least 0.97 was asked", min_retention=0.97
    )
    measured(min_retention=0.98)
    refused(full, hub, ValueError, "at least 0.98 the run itself asked for", min_retention=0.9)
    refused(full, hub, ValueError, "at least 0.98 the run itself asked for")
    measured(retention=None)
    refused(full, hub, ValueError, "retention was not measured, and at least 0.95 was")
    text = {**runs.RETENTION["measures"]["text"], "after": None, "retention": None}
    measures = {**runs.RETENTION["measures"], "text": text}
    measured(retention=None, weights_of_step=6, measures=measures)
    refused(full, hub, ValueError, "`text` was measured and is no number, and a retention of at least 0.95 was asked")
    measured()
    assert go(full, min_retention=0.96).commit


def test_public_and_private(full: Run, hub: HubServer) -> None:
    hub.seed(RUN, {"notes.txt": b"x"}, user="alice")
    with pytest.raises(ValueError, match=r"is public, and private=True .* Pass private=False"):
        go(full)
    assert go(full, private=False).commit
    hub.seed("alice/closed", {"notes.txt": b"x"}, private=True, user="alice")
    with pytest.raises(ValueError, match="is private, and private=False"):
        publish(full.folder, "alice/closed", private=False)
    assert publish(full.folder, "alice/closed").commit
    publish(full.folder, "alice/open", private=False)
    assert not hub.repos["alice/open"].private


# -- the base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_main_is_the_base_where_its_contents_are(kind: str, hub: HubServer, tmp_path: Path) -> None:
    run = trained.train(kind).copy(tmp_path / "run").on_hub()
    sha = trained.seed_base(hub, run)
    go(run)
    facts = read_facts(snapshot_download(RUN))
    assert (facts.base.name, facts.base.revision, facts.base.verified) == (BASE, sha, True)
    assert facts.base.license == "apache-2.0"


def test_main_has_other_contents(lora: Run, hub: HubServer) -> None:
    old = trained.seed_base(hub, lora)
    other = (trained.base(seed=9) / "model.safetensors").read_bytes()
    new = trained.seed_base(hub, lora, **{"model.safetensors": other})
    lora.on_hub()
    refused(lora, hub, ValueError, r"is not the base .*: `bert\.embeddings\.\S+` differs.* Give base_revision")
    refused(lora, hub, ValueError, f"`{BASE}` at {new} is not the base", base_revision=new)
    go(lora, base_revision=old)
    assert read_facts(snapshot_download(RUN)).base.revision == old


def test_a_recorded_revision_is_checked_too(lora: Run, hub: HubServer) -> None:
    old = trained.seed_base(hub, lora)
    other = (trained.base(seed=9) / "model.safetensors").read_bytes()
    new = trained.seed_base(hub, lora, **{"model.safetensors": other})
    lora.on_hub(revision=new)
    refused(lora, hub, ValueError, "is not the base that was trained on")
    lora.on_hub(revision=old)
    refused(lora, hub, ValueError, "the run recorded commit", base_revision=new)
    assert go(lora).commit


def test_one_flipped_bit_of_the_base(lora: Run, hub: HubServer) -> None:
    weights = bytearray((lora.base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    trained.seed_base(hub, lora, **{"model.safetensors": bytes(weights)})
    refused(lora.on_hub(), hub, ValueError, "is not the base that was trained on")


def test_nothing_to_compare_with(lora: Run, hub: HubServer) -> None:
    trained.change(lora.folder / "recipe.json", within="model", fingerprint=None)
    sha = trained.seed_base(hub, lora)
    lora.on_hub()
    refused(lora, hub, ValueError, "is not known: .* Give base_revision")
    found = go(lora, base_revision=sha)
    assert read_facts(snapshot_download(RUN)).base.verified is False
    assert "not verified: the author stated the commit" in found.card


def test_a_base_without_safetensors(lora: Run, hub: HubServer) -> None:
    sha = hub.seed(BASE, {"config.json": b"{}", "pytorch_model.bin": b"x"}, user="alice")
    refused(lora.on_hub(), hub, ValueError, "no safetensors there")
    go(lora.on_hub(revision=sha))
    assert read_facts(snapshot_download(RUN)).base.verified is None


def test_names_that_loading_changed_altogether(lora: Run, hub: HubServer, tmp_path: Path) -> None:
    weights = load_file(lora.base / "model.safetensors")
    fused = {"all": np.concatenate([weights[name].ravel() for name in sorted(weights)])}
    save_file(fused, tmp_path / "fused.safetensors")
    trained.seed_base(hub, lora, **{"model.safetensors": (tmp_path / "fused.safetensors").read_bytes()})
    refused(lora.on_hub(), hub, ValueError, "cannot be compared")


def test_names_that_loading_changed_one_by_one(lora: Run, hub: HubServer, tmp_path: Path) -> None:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {
        f"bert.{next((name.replace(new, was) for new, was in old.items() if new in name), name)}": tensor
        for name, tensor in load_file(lora.base / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "old.safetensors", {"format": "pt"})
    trained.seed_base(hub, lora, **{"model.safetensors": (tmp_path / "old.safetensors").read_bytes()})
    assert go(lora.on_hub()).commit
    assert read_facts(snapshot_download(RUN)).base.verified


def test_a_base_of_another_dtype(lora: Run, hub: HubServer, tmp_path: Path) -> None:
    base = BertForSequenceClassification.from_pretrained(lora.base, num_labels=3).bert.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "half")
    recorded = dict(read_facts(lora.folder).base.tensors)
    from_half = BertForSequenceClassification.from_pretrained(tmp_path / "half", num_labels=3, dtype=torch.float32)
    found = fingerprint(from_half)
    assert found is not None
    assert found["tensors"] != recorded
    trained.change(lora.folder / "recipe.json", within="model", fingerprint=found)
    weights = (tmp_path / "half" / "model.safetensors").read_bytes()
    trained.seed_base(hub, lora, **{"model.safetensors": weights})
    go(lora.on_hub())
    assert read_facts(snapshot_download(RUN)).base.verified


def test_a_sharded_base(lora: Run, hub: HubServer, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(lora.base, num_labels=3)
    model.bert.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    hub.seed(BASE, files, user="alice")
    go(lora.on_hub())
    assert read_facts(snapshot_download(RUN)).base.verified


def test_a_local_base_that_is_on_the_hub(lora: Run, hub: HubServer) -> None:
    sha = trained.seed_base(hub, lora)
    other = (trained.base(seed=9) / "model.safetensors").read_bytes()
    hub.seed("acme/other", {"model.safetensors": other}, user="alice")
    refused(lora, hub, ValueError, "or the right base_model", base_model="acme/other")
    refused(lora, hub, ValueError, "cannot be read on the Hub", base_model="acme/none")
    refused(lora, hub, ValueError, "expected a model's id", base_model="./base")
    go(lora, base_model=BASE)
    config = json.loads(hub.files(RUN)["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, sha)


def test_another_base_than_the_recorded_one(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora)
    refused(lora.on_hub(), hub, ValueError, f"the run started from `{BASE}`", base_model="acme/other")


def test_a_random_part_of_the_base(hub: HubServer, tmp_path: Path) -> None:
    run = trained.train("lora without pooler").copy(tmp_path / "run")
    missing = r"`bert\.pooler\.dense\.weight` of the base was random"
    refused(run, hub, ValueError, rf"{missing} .* modules_to_save=\['bert\.pooler\.dense'\]")
    trained.seed_base(hub, run)
    refused(run.on_hub(), hub, ValueError, "was random")


def test_an_adapter_of_random_weights(lora: Run, hub: HubServer) -> None:
    trained.change(lora.folder / "recipe.json", within="model", name_or_path=None, local=False, fingerprint=None)
    trained.change(lora.folder / "adapter_config.json", base_model_name_or_path=None)
    refused(lora, hub, ValueError, "base had random weights")


def test_an_adapter_of_a_local_base_without_fingerprint(lora: Run, hub: HubServer) -> None:
    trained.change(lora.folder / "recipe.json", within="model", fingerprint=None)
    refused(lora, hub, ValueError, "neither a name on the Hub nor a fingerprint")


def test_the_local_base_has_changed(lora: Run, hub: HubServer) -> None:
    other = str(trained.base(seed=9))
    trained.change(lora.folder / "recipe.json", within="model", name_or_path=other)
    trained.change(lora.folder / "adapter_config.json", base_model_name_or_path=other)
    refused(lora, hub, ValueError, "no longer holds the base")


def test_two_runs_in_one_folder(lora: Run, hub: HubServer) -> None:
    lora.on_hub()
    trained.change(lora.folder / "adapter_config.json", base_model_name_or_path="acme/other")
    refused(lora, hub, ValueError, "names the base `acme/other`")


# -- licences ---------------------------------------------------------------------------------------------------------


def test_licences_that_contradict_each_other(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora, card="---\nlicense: cc-by-nc-4.0\n---\n")
    refused(lora.on_hub(), hub, LicenceError, "permits commercial use")
    assert go(lora, license="cc-by-nc-4.0").commit


def test_the_licence_of_the_data_counts(full: Run, hub: HubServer) -> None:
    hub.seed("acme/news", {"README.md": "---\nlicense: cc-by-nc-4.0\n---\n"}, repo_type="dataset", user="alice")
    trained.change(full.folder / "recipe.json", data={"name": "acme/news", "local": False})
    refused(full, hub, LicenceError, "acme/news")
    go(full, license="cc-by-nc-4.0")
    assert json.loads(hub.files(RUN)["recipe.json"])["data"]["license"] == "cc-by-nc-4.0"


def test_data_that_are_not_on_the_hub(full: Run, hub: HubServer) -> None:
    trained.change(full.folder / "recipe.json", data={"name": "acme/none", "local": False})
    refused(full, hub, ValueError, "the data set `acme/none` cannot be read")


def test_no_licence_stated_is_no_guess(lora: Run, hub: HubServer) -> None:
    trained.seed_base(hub, lora)
    assert "license: other" in go(lora.on_hub(), license=None).card
    assert "license: other" in go(lora, license=None).card
    assert "license: mit" in go(lora).card
    assert "license: mit" in go(lora, license=None).card


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(full: Run, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(full.folder)]) == 0
    assert (full.folder / "README.md").is_file()
    assert main(["publish", str(full.folder), RUN, "--dry_run", "--license", "mit"]) == 0
    assert "would be published (dry run)" in capsys.readouterr().out
    assert RUN not in hub.repos
    assert main(["publish", str(full.folder), RUN, "--public", "--license", "mit", "--commit_message", "First"]) == 0
    assert not hub.repos[RUN].private
    assert hub.commits(RUN)[0].title == "First"
    assert main(["publish", str(full.folder), RUN]) == 1
    told = capsys.readouterr().err
    assert "is public" in told
    assert "Traceback" not in told


def test_every_option_reaches_publish(lora: Run, hub: HubServer) -> None:
    sha = trained.seed_base(hub, lora)
    options = ["--base_model", BASE, "--base_revision", sha, "--merge", "--license", "mit", "--allow", "a", "b"]
    assert main(["publish", str(lora.folder), RUN, *options]) == 0
    assert "model.safetensors" in hub.files(RUN)
    assert main(["publish", str(lora.folder), "alice/other", "--require_positive_transfer"]) == 1
    assert main(["publish", str(lora.folder), "alice/other", "--min_retention", "0.9"]) == 1


def test_an_organisation_and_a_stranger(full: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish(full.folder, "acme/run", license="mit").commit
    with pytest.raises(PublishError, match=r"creating `eve/run` failed: .* No file was sent"):
        publish(full.folder, "eve/run", license="mit")


def test_offline_is_told(full: Run) -> None:
    with pytest.raises(PublishError, match=r"the client is offline\. Nothing was sent"):
        go(full)


def test_an_adapter_above_statistics_that_moved_is_refused(hub: HubServer, tmp_path: Path) -> None:
    run = trained.train("lora").copy(tmp_path)
    file = run.folder / "recipe.json"
    recipe = json.loads(file.read_text())
    recipe["model"]["fingerprint"]["tensors"]["bert.norm.running_mean"] = "0" * 16
    file.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"`bert.norm.running_mean` of the base moved in training"):
        trained.go(run)
    assert trained.RUN not in hub.repos
