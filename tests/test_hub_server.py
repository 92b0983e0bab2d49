"""The real clients against our Hub, and what they do under each of its faults."""

import hashlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import httpx2
import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, Trainer, TrainingArguments

from tests import hub_session
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]
CARD = (
    "---\nlicense: mit\nlibrary_name: peft\nbase_model: acme/base\npipeline_tag: text-classification\n---\n# A card\n"
)
WEIGHTS = hashlib.sha256(b"weights").digest() * 375_000  # 12 MB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder: 12 MB of weights, a card, and a file in a folder."""
    made = tmp_path / "run"
    (made / "deeper" / "still").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(WEIGHTS)
    (made / "README.md").write_text(CARD)
    (made / "deeper" / "still" / "config.json").write_text("{}")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def calls(hub: HubServer, method: str, path: str) -> list[int]:
    """The statuses of the logged calls that match."""
    return [r.status for r in hub.requests if re.fullmatch(method, r.method) and re.search(path, r.path)]


def full_disk(limit: int) -> None:
    """For `preexec_fn`: in the new process no file can grow over `limit` bytes; writing further is an OSError (EFBIG).

    It stands for a full disk, whose OSError is ENOSPC: both come out of `write` in the midst of a file.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def python(hub: HubServer, home: Path, code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, logged in as alice, with a clean cache."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(home, hub.token("alice")),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )  # type: ignore[call-overload]


# -- repositories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [1 << 30, 5_000_000], ids=["basic", "multipart"])
def test_an_uploaded_folder_comes_back_byte_for_byte(
    hub: HubServer, folder: Path, part_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.part_size = part_size
    api = HfApi()
    assert api.create_repo("alice/x", private=True).repo_id == "alice/x"
    assert api.create_repo("alice/x", exist_ok=True).repo_id == "alice/x"
    pushed = api.upload_folder(repo_id="alice/x", folder_path=folder, commit_message="A run")

    assert calls(hub, "PUT", "^/storage/") == ([200] if part_size > len(WEIGHTS) else [200] * 3)
    assert [commit.title for commit in hub.commits("alice/x")] == ["A run", "initial commit"]
    assert hub.commits("alice/x")[0].sha == pushed.oid
    assert hub.repos["alice/x"].private
    expected = contents(folder) | {".gitattributes": hub.files("alice/x")[".gitattributes"]}
    assert hub.files("alice/x") == expected
    pulled = Path(snapshot_download("alice/x"))
    assert contents(pulled) == expected

    # From the warm cache, with a Hub that answers nothing any more.
    hub.fail(times=None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert contents(Path(snapshot_download("alice/x"))) == expected
    assert len(hub.requests) == before


def test_the_same_folder_again_is_no_commit(hub: HubServer, folder: Path) -> None:
    api = HfApi()
    api.create_repo("alice/x")
    first = api.upload_folder(repo_id="alice/x", folder_path=folder)
    again = api.upload_folder(repo_id="alice/x", folder_path=folder)
    assert again.oid == first.oid
    assert len(calls(hub, "POST", "/commit/")) == 1
    (folder / "README.md").write_text(CARD + "More.\n")
    assert api.upload_folder(repo_id="alice/x", folder_path=folder).oid != first.oid
    assert len(calls(hub, "PUT", "^/storage/")) == 1


def test_git_and_lfs_names_are_the_real_ones(hub: HubServer, folder: Path) -> None:
    hub.seed("alice/x", {"README.md": "hello\n", "model.safetensors": WEIGHTS, "small.bin": b"1"})
    small, large, missing = "README.md", "model.safetensors", "none"
    found = {info.path: info for info in HfApi().get_paths_info("alice/x", [small, large, missing], expand=True)}
    assert set(found) == {small, large}
    assert found[small].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object` of "hello\n"
    assert found[small].lfs is None
    assert found[large].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert found[large].last_commit.oid == hub.commits("alice/x")[0].sha
    assert hub.repos["alice/x"].at("main").files["small.bin"].lfs
    pulled = Path(snapshot_download("alice/x"))
    assert HfApi().verify_repo_checksums("alice/x").mismatches == []
    (pulled / small).resolve().write_text("changed")
    assert [one["path"] for one in HfApi().verify_repo_checksums("alice/x").mismatches] == [small]


def test_shas_and_dates_repeat(hub: HubServer) -> None:
    def build() -> list[object]:
        hub.reset()
        hub.add_user("alice", orgs=("acme",))
        HfApi().create_repo("alice/x")
        HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="alice/x")
        return [HfApi().list_repo_commits("alice/x"), HfApi().model_info("alice/x").last_modified]

    assert build() == build()
    assert HfApi().model_info("alice/x").created_at.isoformat() == "2026-01-01T00:00:00+00:00"


def test_a_dry_run_downloads_nothing(hub: HubServer) -> None:
    hub.seed("alice/x", {"model.safetensors": WEIGHTS, "a.txt": b"1"})
    planned = snapshot_download("alice/x", dry_run=True)
    assert {one.filename: one.file_size for one in planned if one.filename != ".gitattributes"} == {
        "model.safetensors": len(WEIGHTS),
        "a.txt": 1,
    }
    assert not calls(hub, "GET", "/resolve/")


def test_a_stale_parent_is_refused(hub: HubServer) -> None:
    api = HfApi()
    first = hub.seed("alice/x", {"a.txt": b"1"})
    operations = [CommitOperationAdd("b.txt", b"2")]
    second = api.create_commit("alice/x", operations, commit_message="right", parent_commit=first)
    with pytest.raises(HfHubHTTPError, match=r"412 Precondition(.|\n)*A commit has happened since"):
        api.create_commit("alice/x", [CommitOperationAdd("c.txt", b"3")], commit_message="late", parent_commit=first)
    assert hub.commits("alice/x")[0].sha == second.oid


def test_branches_tags_and_pull_requests(hub: HubServer) -> None:
    api = HfApi()
    first = hub.seed("alice/x", {"a.txt": b"1"})
    api.create_branch("alice/x", branch="exp/one")
    api.create_branch("alice/x", branch="exp/one", exist_ok=True)
    api.create_tag("alice/x", tag="v1", tag_message="first")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("alice/x", tag="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="alice/x", revision="exp/one")
    assert "b.txt" not in hub.files("alice/x")
    assert hub.files("alice/x", "exp/one")["b.txt"] == b"2"
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="alice/x", revision="none")

    pull = api.create_commit("alice/x", [CommitOperationAdd("c.txt", b"3")], commit_message="Please", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    api.upload_file(path_or_fileobj=b"4", path_in_repo="d.txt", repo_id="alice/x", revision="refs/pr/1")
    assert api.get_discussion_details("alice/x", 1).is_pull_request
    assert [one.status for one in api.get_repo_discussions("alice/x")] == ["open"]
    hub.seed("alice/x", {"e.txt": b"5"})
    assert set(hub.files("alice/x")) == {".gitattributes", "a.txt", "e.txt"}
    api.merge_pull_request("alice/x", 1)
    assert set(hub.files("alice/x")) == {".gitattributes", "a.txt", "c.txt", "d.txt", "e.txt"}
    assert api.get_discussion_details("alice/x", 1).status == "merged"

    refs = api.list_repo_refs("alice/x", include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "exp/one"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    api.delete_tag("alice/x", tag="v1")
    api.delete_branch("alice/x", branch="exp/one")
    api.super_squash_history("alice/x")
    assert len(api.list_repo_commits("alice/x")) == 1
    refs = api.list_repo_refs("alice/x")
    assert ([ref.name for ref in refs.branches], refs.tags) == (["main"], [])


def test_files_are_deleted_and_copied(hub: HubServer) -> None:
    api = HfApi()
    hub.seed("alice/x", {"a.txt": b"1", "old/b.txt": b"2", "old/c.bin": b"3"})
    api.copy_files("hf://alice/x/old/c.bin", "hf://alice/x/new.bin")
    operations = [CommitOperationDelete("old/"), CommitOperationDelete("a.txt")]
    api.create_commit("alice/x", operations, commit_message="Away")
    assert hub.files("alice/x").keys() - {".gitattributes"} == {"new.bin"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("a.txt", repo_id="alice/x")


def test_private_repositories_do_not_exist_for_others(hub: HubServer) -> None:
    hub.seed("acme/x", {"a.txt": b"1"}, private=True)
    mallory = hub.add_user("mallory")
    for token in (mallory, False):
        for call in (
            lambda token=token: HfApi(token=token).model_info("acme/x"),
            lambda token=token: snapshot_download("acme/x", token=token),
            lambda token=token: HfApi(token=token).upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="acme/x"),
        ):
            with pytest.raises(RepositoryNotFoundError):
                call()
        assert not list(HfApi(token=token).list_models())
    assert [info.id for info in HfApi().list_models()] == ["acme/x"]  # alice is of acme
    assert (Path(snapshot_download("acme/x")) / "a.txt").read_bytes() == b"1"
    HfApi().update_repo_settings("acme/x", private=False)
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=mallory).upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="acme/x")
    assert hub.files("acme/x")["a.txt"] == b"1"


def test_gated_repositories_ask_for_access(hub: HubServer) -> None:
    hub.seed("llamas/x", {"a.txt": b"1"}, gated="manual")
    assert HfApi().model_info("llamas/x").gated == "manual"
    with pytest.raises(GatedRepoError, match="not in the authorized list"):
        snapshot_download("llamas/x")
    with pytest.raises(GatedRepoError):
        HfApi().auth_check("llamas/x")
    hub.repos["llamas/x"].allowed.add("alice")
    assert (Path(snapshot_download("llamas/x")) / "a.txt").read_bytes() == b"1"


def test_who_may_write_where(hub: HubServer) -> None:
    assert HfApi().whoami()["name"] == "alice"
    assert [org["name"] for org in HfApi().whoami()["orgs"]] == ["acme"]
    HfApi().create_repo("acme/x")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("others/x")
    reader = hub.add_user("alice", role="read")
    for create_pr in (False, True):
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=reader).upload_file(
                path_or_fileobj=b"", path_in_repo="a", repo_id="acme/x", create_pr=create_pr
            )
    stranger = HfApi(token=hub.add_user("bob"))
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="acme/x")
    stranger.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="acme/x", create_pr=True)
    assert len(hub.repos["acme/x"].pulls) == 1
    assert len(hub.commits("acme/x")) == 1
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").model_info("acme/x")


def test_repositories_are_moved_and_deleted(hub: HubServer) -> None:
    api = HfApi()
    hub.seed("alice/x", {"a.txt": b"1"})
    api.move_repo("alice/x", "acme/y")
    assert set(hub.repos) == {"acme/y"}
    assert not api.repo_exists("alice/x")
    api.delete_repo("acme/y")
    assert not hub.repos
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("acme/y")
    api.delete_repo("acme/y", missing_ok=True)


# -- cards and listings -----------------------------------------------------------------------------------------------


def test_adapters_are_found_by_their_base(hub: HubServer) -> None:
    api = HfApi()
    card = "---\nbase_model: acme/base\n{}\n---\n"
    hub.seed("alice/a", {"README.md": CARD, "adapter_model.safetensors": b"1", "adapter_config.json": b"{}"})
    hub.seed("alice/b", {"README.md": card.format("base_model_relation: adapter\ndatasets: [acme/data]")})
    hub.seed("acme/c", {"README.md": card.format("library_name: transformers\nlanguage: en\ntags: [tl]")})
    hub.seed("acme/base", {"config.json": b'{"model_type": "bert"}'})

    def names(**query: object) -> list[str]:
        return [info.id for info in api.list_models(**query)]

    assert names(filter="base_model:adapter:acme/base") == ["alice/a", "alice/b"]
    assert names(filter="base_model:acme/base") == ["acme/c", "alice/a", "alice/b"]
    assert names(filter="base_model:finetune:acme/base") == ["acme/c"]
    assert names(filter=["base_model:adapter:acme/base", "license:mit"]) == ["alice/a"]
    assert names(filter="bert") == ["acme/base"]
    assert names(trained_dataset="acme/data") == ["alice/b"]
    assert names(author="acme") == ["acme/base", "acme/c"]
    assert names(search="ASE") == ["acme/base"]
    assert names(pipeline_tag="text-classification") == ["alice/a"]
    assert names(sort="created_at", limit=2) == ["acme/base", "acme/c"]
    assert api.model_info("alice/a").tags == [
        *("peft", "safetensors", "text-classification", "base_model:acme/base", "base_model:adapter:acme/base"),
        *("license:mit", "region:us"),
    ]

    hub.page_size = 1  # every listing now goes on at its Link
    assert names() == ["acme/base", "acme/c", "alice/a", "alice/b"]
    assert calls(hub, "GET", "^/api/models$")[-4:] == [200] * 4
    assert len(api.list_repo_files("alice/a")) == 4
    (plain,), (full,) = (
        list(api.list_models(author="alice", search="/a")),
        list(api.list_models(author="alice", search="/a", full=True, cardData=True)),
    )
    assert (plain.card_data, plain.siblings, plain.sha) == (None, None, None)
    assert full.card_data.license == "mit"
    assert {file.rfilename for file in full.siblings} == set(hub.files("alice/a"))
    (part,) = api.list_models(search="alice/a", expand=["baseModels", "lastModified"])
    assert part.base_models == {"relation": "adapter", "models": [{"id": "acme/base"}]}
    assert (part.tags, part.last_modified is not None) == (None, True)


def test_evaluation_results_are_read(hub: HubServer) -> None:
    entry = "- dataset: {id: acme/data, task_id: default}\n  value: 0.5\n  date: 2026-01-02\n"
    hub.seed("alice/x", {".eval_results/a.yaml": entry, ".eval_results/b.yaml": "- value: 1"})
    (read,) = HfApi().model_info("alice/x", expand=["evalResults"]).eval_results
    assert (read.dataset_id, read.task_id, read.value) == ("acme/data", "default", 0.5)


@pytest.mark.parametrize(
    ("front", "complaint"),
    [
        ("base_model: /home/me/runs/base", '"base_model" with value "/home/me/runs/base" is not valid'),
        ("base_model: [acme/base, a/b/c]", '"base_model" with value "a/b/c" is not valid'),
        ("datasets: ./data.csv", '"datasets" with value "./data.csv" is not valid'),
        ("license: apache2", '"license" with value "apache2" is not valid'),
        ("language: English", '"language" with value "English" is not valid'),
        ("widget: text", '"widget" must be an array'),
        ("tags: one", '"tags" must be an array'),
        ("pipeline_tag: [a]", '"pipeline_tag" must be a string'),
        ("base_model_relation: cousin", '"base_model_relation" must be one of'),
        ("model-index:\n- results: []", r'"model-index\[0\].name" is required'),
        (
            "model-index:\n- name: a\n  results:\n  - metrics: []",
            r'"model-index\[0\].results\[0\].task.type" is required',
        ),
        ("co2_eq_emissions: .nan", "not finite"),
        ("- a\n- b", "must be a mapping"),
        ("a: [b", "Invalid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "Invalid YAML"),
    ],
)
def test_cards_are_validated(hub: HubServer, front: str, complaint: str) -> None:
    HfApi().create_repo("alice/x")
    card = f"---\n{front}\n---\n# A card\n".encode()
    with pytest.raises(ValueError, match=complaint):
        HfApi().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="alice/x")
    assert "README.md" not in hub.files("alice/x")


def test_a_valid_card_makes_the_round(hub: HubServer) -> None:
    HfApi().create_repo("alice/x")
    ModelCard(CARD).push_to_hub("alice/x")
    loaded = ModelCard.load("alice/x")
    assert (loaded.data.base_model, loaded.text.strip()) == ("acme/base", "# A card")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="alice/x")


# -- other clients ----------------------------------------------------------------------------------------------------


def tiny_model(labels: int = 3) -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def test_transformers_pushes_and_pulls(hub: HubServer, tmp_path: Path) -> None:
    model, tokens = tiny_model(), torch.arange(8)[None]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    first = model.push_to_hub("alice/model")
    tokenizer.push_to_hub("alice/model")
    expected = model(tokens).logits
    pulled = BertForSequenceClassification.from_pretrained("alice/model")
    assert all(torch.equal(value, pulled.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.allclose(pulled(tokens).logits, expected, atol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained("alice/model")("a b").input_ids == tokenizer("a b").input_ids

    torch.nn.init.ones_(model.classifier.bias)
    model.push_to_hub("alice/model")
    pinned = BertForSequenceClassification.from_pretrained("alice/model", revision=first.oid)
    assert torch.equal(pinned(tokens).logits, pulled(tokens).logits)
    newest = BertForSequenceClassification.from_pretrained("alice/model")
    assert torch.allclose(newest(tokens).logits, expected + 1, atol=1e-6)


def test_peft_pushes_and_pulls(hub: HubServer) -> None:
    tokens = torch.arange(8)[None]
    base = tiny_model()
    base.push_to_hub("alice/base")
    base = BertForSequenceClassification.from_pretrained("alice/base")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.push_to_hub("alice/adapter")
    assert "adapter_model.safetensors" in hub.files("alice/adapter")
    pulled = peft.PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained("alice/base"), "alice/adapter"
    ).eval()
    assert torch.equal(pulled(tokens).logits, adapted(tokens).logits)


def test_the_trainer_pushes_an_adapter(hub: HubServer, tmp_path: Path) -> None:
    tiny_model().push_to_hub("alice/base")
    base = BertForSequenceClassification.from_pretrained("alice/base")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    args = TrainingArguments(
        str(tmp_path / "run"), push_to_hub=True, hub_model_id="alice/run", max_steps=2, report_to="none", use_cpu=True
    )
    rows = [{"input_ids": [1, 2], "labels": 0}] * 4
    trainer = Trainer(peft.get_peft_model(base, lora), args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    pushed = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin"}
    assert hub.files("alice/run").keys() >= pushed
    assert [info.id for info in HfApi().list_models(filter="base_model:adapter:alice/base")] == ["alice/run"]


def test_datasets_pushes_loads_and_streams(hub: HubServer) -> None:
    rows = {"text": [f"row {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    datasets.Dataset.from_dict(rows).push_to_hub("alice/data")
    assert "datasets/alice/data" in hub.repos
    loaded = datasets.load_dataset("alice/data", split="train")
    assert loaded.to_dict() == rows
    streamed = datasets.load_dataset("alice/data", split="train", streaming=True)
    assert [row["text"] for row in streamed] == rows["text"]
    assert 206 in calls(hub, "GET", "parquet$")


def test_the_hf_command(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hf = str(Path(sys.executable).with_name("hf"))
    environment = hub.environment(tmp_path / "clean", hub.token("alice"))

    def run(*arguments: str) -> str:
        command = [hf, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "alice" in run("auth", "whoami")
    run("repos", "create", "alice/cli", "--private")
    run("upload", "alice/cli", str(folder))
    run("download", "alice/cli", "--local-dir", str(tmp_path / "back"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.repos["alice/cli"].private


def test_xet_carries_large_files(folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
HfApi().create_repo("alice/x")
HfApi().upload_folder(repo_id="alice/x", folder_path=sys.stdin.read())
print((Path(snapshot_download("alice/x")) / "model.safetensors").stat().st_size)
"""
    with HubServer(xet=True) as hub:
        hub.add_user("alice")
        done = python(hub, tmp_path / "clean", code, input=str(folder))
        assert done.stdout.split() == [str(len(WEIGHTS))], done.stderr
        assert not calls(hub, "POST", "lfs/objects")
        assert calls(hub, "GET", "xet-read-token") == [200]
        file = hub.repos["alice/x"].at("main").files["model.safetensors"]
        assert (file.sha256, len(file.xet)) == (hashlib.sha256(WEIGHTS).hexdigest(), 64)
        assert hub.files("alice/x")["model.safetensors"] == WEIGHTS
        assert hub.ever_saw(WEIGHTS)  # more than the first bytes, which the call before the upload carries


def test_it_runs_by_hand() -> None:
    command = [sys.executable, "-m", "tests.hub_server", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            told = re.fullmatch(r"export HF_ENDPOINT=(\S+) HF_TOKEN=(\S+)\n", process.stdout.readline())
            assert HfApi(endpoint=told[1], token=told[2])
            answer = httpx2.get(told[1] + "/api/whoami-v2", headers={"Authorization": f"Bearer {told[2]}"})
            assert answer.json()["name"] == "alice"
        finally:
            process.terminate()


# -- faults -----------------------------------------------------------------------------------------------------------


def push(folder: Path) -> huggingface_hub.CommitInfo:
    HfApi().create_repo("alice/x", exist_ok=True)
    return HfApi().upload_folder(repo_id="alice/x", folder_path=folder)


def assert_whole(hub: HubServer, folder: Path) -> None:
    assert {path: data for path, data in hub.files("alice/x").items() if path != ".gitattributes"} == contents(folder)


def assert_nothing(hub: HubServer) -> None:
    assert set(hub.files("alice/x")) == {".gitattributes"}


@pytest.mark.parametrize("path", ["/preupload/", "/lfs/objects/batch$", "^/storage/", "/lfs/objects/verify$"])
def test_the_client_retries_after_503(hub: HubServer, folder: Path, path: str) -> None:
    hub.fail(times=1, status=503, path=path)
    push(folder)
    assert calls(hub, "POST|PUT", path) == [503, 200]
    assert_whole(hub, folder)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_commit_is_not_retried(hub: HubServer, folder: Path, status: int) -> None:
    hub.fail(times=1, status=status, method="POST", path="/commit/main$")
    with pytest.raises(HfHubHTTPError, match=f"{status}"):
        push(folder)
    assert_nothing(hub)
    push(folder)
    assert_whole(hub, folder)
    assert len(calls(hub, "PUT", "^/storage/")) == 1  # the weights were there already


def test_a_forbidden_commit(hub: HubServer, folder: Path) -> None:
    hub.forbid_commits()
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: You may not commit here"):
        push(folder)
    assert_nothing(hub)
    hub.faults.clear()
    push(folder)
    assert_whole(hub, folder)


def test_an_upload_that_is_cut_is_sent_again(hub: HubServer, folder: Path) -> None:
    hub.cut(path="^/storage/", after_bytes=1_000_000)
    push(folder)
    assert calls(hub, "PUT", "^/storage/") == [0, 200]
    first, second = (len(request.body) for request in hub.requests if request.method == "PUT")
    assert 1_000_000 <= first < 2_000_000 < second == len(WEIGHTS)
    assert_whole(hub, folder)


def test_a_commit_that_is_cut_has_not_happened(hub: HubServer, folder: Path) -> None:
    hub.cut(path="/commit/", after_bytes=10)
    with pytest.raises(httpx2.TransportError):
        push(folder)
    assert_nothing(hub)
    push(folder)
    assert_whole(hub, folder)


def test_a_lost_answer_hides_a_commit_that_happened(hub: HubServer, folder: Path) -> None:
    hub.lose_answer(path="/commit/")
    with pytest.raises(httpx2.TransportError):
        push(folder)
    assert_whole(hub, folder)
    push(folder)
    assert len(hub.commits("alice/x")) == 2  # the first one of every repository, and ours once


def test_a_truncated_download_goes_on_where_it_stopped(hub: HubServer) -> None:
    hub.seed("alice/x", {"model.safetensors": WEIGHTS})
    hub.cut(path="/resolve/.*safetensors$", after_bytes=11_000_000, method="GET")  # the client writes 10 MiB at a time
    pulled = Path(snapshot_download("alice/x"))
    assert (pulled / "model.safetensors").read_bytes() == WEIGHTS
    assert calls(hub, "GET", "safetensors$") == [200, 206]


def test_a_download_that_never_ends_well_leaves_no_file(hub: HubServer) -> None:
    hub.seed("alice/x", {"model.safetensors": WEIGHTS})
    hub.cut(path="/resolve/.*safetensors$", after_bytes=0, times=None, method="GET")
    with pytest.raises((httpx2.TransportError, OSError)):
        huggingface_hub.hf_hub_download("alice/x", "model.safetensors")
    hub.faults.clear()
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("alice/x", "model.safetensors", local_files_only=True)


def test_slow_answers_are_waited_for_or_given_up(hub: HubServer) -> None:
    hub.seed("alice/x", {"a.txt": b"1"})
    hub.slow(path="/api/models/alice/x", seconds=0.5)
    begin = time.monotonic()
    assert HfApi().model_info("alice/x").id == "alice/x"
    assert time.monotonic() - begin >= 0.5
    with pytest.raises(httpx2.TimeoutException):
        HfApi().model_info("alice/x", timeout=0.1)


def test_an_expired_token(hub: HubServer, folder: Path) -> None:
    push(folder)
    hub.expire_token(hub.token("alice"))
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/x")
    assert_whole(hub, folder)
    HfApi(token=hub.add_user("alice")).upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/x")
    assert hub.files("alice/x")["a"] == b"1"


def test_a_race_makes_the_parent_stale(hub: HubServer, folder: Path) -> None:
    HfApi().create_repo("alice/x")
    parent = hub.commits("alice/x")[0].sha
    hub.race("alice/x", {"theirs.txt": b"1"})
    with pytest.raises(HfHubHTTPError, match="412"):
        HfApi().upload_folder(repo_id="alice/x", folder_path=folder, parent_commit=parent)
    assert hub.files("alice/x").keys() - {".gitattributes"} == {"theirs.txt"}
    hub.race("alice/x", {"theirs.txt": b"2"})
    HfApi().upload_folder(repo_id="alice/x", folder_path=folder)  # without the guard both are there
    assert hub.files("alice/x")["theirs.txt"] == b"2"
    assert hub.files("alice/x")["model.safetensors"] == WEIGHTS


def test_a_full_disk_stops_a_download(hub: HubServer, tmp_path: Path) -> None:
    hub.seed("alice/x", {"model.safetensors": WEIGHTS})
    code = "import huggingface_hub; print(huggingface_hub.hf_hub_download('alice/x', 'model.safetensors'))"
    done = python(hub, tmp_path / "small", code, preexec_fn=lambda: full_disk(5_000_000))
    assert done.returncode == 1
    assert "File too large" in done.stderr
    done = python(hub, tmp_path / "small", code)
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS


def test_all_that_was_ever_sent_is_remembered(hub: HubServer, tmp_path: Path) -> None:
    HfApi().create_repo("alice/x")
    for n, path in enumerate(["a.txt", "b.safetensors", "sub/c.json"]):
        assert not hub.ever_saw(f"secret-{n}")
        HfApi().upload_file(path_or_fileobj=f"the secret-{n}".encode(), path_in_repo=path, repo_id="alice/x")
        assert hub.ever_saw(f"secret-{n}")
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="secret-name", repo_id="alice/x")
    assert hub.ever_saw("secret-name")
    hub.forbid_commits()
    with pytest.raises(HfHubHTTPError):
        HfApi().upload_file(path_or_fileobj=b"the refused secret", path_in_repo="d.txt", repo_id="alice/x")
    assert hub.ever_saw("the refused secret")
    assert not hub.ever_saw(hub.token("alice"))  # that every call carries in a header


# -- the suite's own arrangement --------------------------------------------------------------------------------------


def test_the_suite_is_offline() -> None:
    assert huggingface_hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_ENDPOINT"] == huggingface_hub.constants.ENDPOINT == hub_session.HUB.url
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        HfApi().model_info("alice/x")


def test_the_fixture_is_online(hub: HubServer, tmp_path: Path) -> None:
    assert not huggingface_hub.is_offline_mode()
    assert not hub.repos
    assert str(tmp_path / "hf-home" / "hub") == huggingface_hub.constants.HF_HUB_CACHE


@pytest.mark.parametrize("host", ["192.0.2.1", "example.org"])
def test_no_test_leaves_the_machine(host: str) -> None:
    with pytest.raises(ConnectionRefusedError, match="only the loopback interface"):
        socket.create_connection((host, 80), timeout=1)
    assert [host] == hub_session.ESCAPES
    hub_session.ESCAPES.clear()
