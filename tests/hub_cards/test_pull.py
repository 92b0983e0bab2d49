"""Pulling: the same model as in training, from the Hub, from the cache, and never a wrong one."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hub_cards.pulling import loading
from hub_cards.pulling.pull import Pulled, pull
from tests.hub_cards import pullable
from tests.hub_server import HubServer


def logits(pulled: Pulled, run: pullable.Run) -> torch.Tensor:
    return pullable.logits(pulled.model, run.inputs)


def cached(name: str, repo_id: str = "acme/run") -> Path:
    folder = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    (path,) = folder.glob(f"*/{name}")
    return path


def changed(files: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    """Files with other values in a JSON file, and a manifest that fits."""
    recipe = json.loads(files["recipe.json"])
    inner = json.loads(files[name]) | values
    rest = {key: data for key, data in files.items() if key not in ("recipe.json", "README.md")}
    return pullable.with_manifest(rest | {name: json.dumps(inner).encode()}, recipe, "acme/run")


@pytest.mark.parametrize("kind", pullable.KINDS)
def test_the_pulled_model_says_the_same_bit_for_bit(hub: HubServer, kind: str) -> None:
    made = pullable.on_hub(hub, kind)
    pulled = pull(made.repo_id)
    assert not any(module.training for module in pulled.model.modules())
    assert torch.equal(logits(pulled, made.run), made.run.logits)
    assert pulled.labels == ("bad", "fair", "good")
    assert (pulled.repo_id, pulled.revision) == (made.repo_id, made.sha)
    assert pulled.base_revision == (made.base_sha if kind in pullable.ADAPTERS else None)
    assert (pulled.processor is None) is (pullable.KINDS[kind].inputs == "pixel_values")
    inner: Any = pulled.model.get_base_model() if kind in pullable.ADAPTERS else pulled.model  # type: ignore[operator]
    assert inner.config.id2label == pullable.LABELS
    if kind in pullable.ADAPTERS:
        stored = load_file(made.run.folder / "adapter_model.safetensors")
        found = get_peft_model_state_dict(pulled.model, save_embedding_layers=False)
        assert all(found[name].dtype == stored[name].dtype and found[name].equal(stored[name]) for name in found)
    for weight in inner.parameters():
        weight.data.add_(0.5)
    assert not torch.equal(logits(pulled, made.run), made.run.logits), "the control"


def test_a_run_on_this_machine_needs_no_hub() -> None:
    run = pullable.trained("bert-lora")
    pulled = pull(run.folder)
    assert torch.equal(logits(pulled, run), run.logits)
    assert (pulled.repo_id, pulled.revision, pulled.base_revision) == (None, None, None)
    with pytest.raises(ValueError, match=r"is a local folder and has no revision `main`"):
        pull(run.folder, revision="main")
    with pytest.raises(FileNotFoundError, match=r"is no folder here, and cannot be a repository"):
        pull("./nowhere/run")


def test_dtype_device_revision_and_random_state(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    hub.seed("acme/run", {"README.md": "later"}, user="alice")
    before, level = torch.get_rng_state(), logging.get_verbosity()
    pulled = pull(made.repo_id, revision=made.sha[:40], dtype=torch.bfloat16, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.get_verbosity() == level
    assert {weight.dtype for weight in pulled.model.parameters()} == {torch.bfloat16}
    assert pull(made.repo_id).revision != made.sha
    with pytest.raises(ValueError, match=r"has no revision `v9`; expected a branch, a tag or a commit"):
        pull(made.repo_id, revision="v9")


# -- the base ---------------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: Any) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    other = pullable.save_base("bert-lora", tmp_path / "other", seed=1)
    hub.seed("acme/other", pullable.contents(other), user="alice")
    for base in (other, "acme/other"):
        with pytest.raises(
            ValueError, match=r"is not the base .* 55 of 55 tensors differ \(`bert.embeddings.LayerNorm"
        ):
            pull(made.repo_id, base=base)
    assert torch.equal(logits(pull(made.repo_id, base=made.run.base), made.run), made.run.logits)
    monkeypatch.setattr(loading, "_check_fingerprint", lambda *_: None)
    silent = pull(made.repo_id, base=other)
    assert not torch.equal(logits(silent, made.run), made.run.logits), "the control: PEFT takes it without a word"


def test_one_changed_bit_in_the_base_is_found(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    weights = load_file(made.run.base / "model.safetensors")
    name = "encoder.layer.1.output.dense.bias"
    weights[name].view(torch.uint8)[0] ^= 1
    shutil.copytree(made.run.base, tmp_path / "base")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 of 55 tensors differ \(`bert.{name}`\)"):
        pull(made.repo_id, base=tmp_path / "base")


def test_a_base_that_moved_on_stays_at_its_commit(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    later = hub.seed(
        "acme/base", pullable.contents(pullable.save_base("bert-lora", tmp_path / "later", seed=1)), user="alice"
    )
    pulled = pull(made.repo_id)
    assert pulled.base_revision == made.base_sha != later
    assert torch.equal(logits(pulled, made.run), made.run.logits)
    recipe = json.loads(pullable.published(made.run, "acme/run", "acme/base", None)["recipe.json"])
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(OSError, match=r"`adapter_config.json` of `acme/run` .* changed"):
        pull(made.repo_id)


def test_without_a_recorded_commit_the_fingerprint_decides(hub: HubServer, tmp_path: Path) -> None:
    run = pullable.trained("bert-lora")
    sha = hub.seed("acme/base", pullable.contents(run.base), user="alice")
    hub.seed("acme/run", pullable.published(run, "acme/run", "acme/base", None), user="alice")
    pulled = pull("acme/run")
    assert (pulled.base_revision, torch.equal(logits(pulled, run), run.logits)) == (sha, True)
    hub.seed("acme/base", pullable.contents(pullable.save_base("bert-lora", tmp_path / "later", seed=1)), user="alice")
    with pytest.raises(
        ValueError, match=r"`acme/base` at [0-9a-f]{40} is not the base that the adapter was trained on"
    ):
        pull("acme/run")


def test_without_a_fingerprint_the_commit_decides(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")

    def without(revision: str | None) -> dict[str, bytes]:
        files = pullable.published(made.run, "acme/run", "acme/base", revision)
        recipe = json.loads(files["recipe.json"])
        recipe["model"]["fingerprint"] = None
        return {**files, "recipe.json": json.dumps(recipe).encode()}

    hub.seed("acme/run", without(made.base_sha), user="alice")
    assert torch.equal(logits(pull("acme/run"), made.run), made.run.logits)
    with pytest.raises(ValueError, match=r"recorded no fingerprint of its base, so whether .* cannot be told"):
        pull("acme/run", base=made.run.base)
    hub.seed("acme/run", without(None), user="alice")
    with pytest.raises(ValueError, match=r"recorded no fingerprint of its base"):
        pull("acme/run")


def test_a_base_from_a_local_folder_is_asked_for(hub: HubServer) -> None:
    run = pullable.trained("bert-lora")
    hub.seed("acme/run", pullable.published(run, "acme/run", None, None), user="alice")
    digest = json.loads((run.folder / "recipe.json").read_text())["model"]["fingerprint"]["digest"]
    with pytest.raises(ValueError, match=rf"a local folder \(`base`\).* pass base= .* the fingerprint {digest[:16]}"):
        pull("acme/run")
    assert torch.equal(logits(pull("acme/run", base=run.base), run), run.logits)


def test_a_base_with_a_head_of_another_size(tmp_path: Path) -> None:
    base = pullable.save_base("bert-lora", tmp_path / "base", whole=True)
    weights = load_file(base / "model.safetensors")
    weights |= {"classifier.weight": torch.randn(5, 16), "classifier.bias": torch.randn(5)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    labels = {"id2label": {str(n): f"class {n}" for n in range(5)}, "label2id": {f"class {n}": n for n in range(5)}}
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | labels))
    run = pullable.train("bert-lora", base, tmp_path / "run")
    pulled = pull(run.folder)
    assert torch.equal(logits(pulled, run), run.logits)
    assert pulled.labels == ("bad", "fair", "good")


def test_an_adapter_with_a_name_of_its_own(tmp_path: Path) -> None:
    base = pullable.trained("bert-lora").base
    run = pullable.train("bert-lora", base, tmp_path / "run", adapter_name="reviews")
    assert (run.folder / "reviews" / "adapter_config.json").is_file()
    assert torch.equal(logits(pull(run.folder), run), run.logits)
    (run.folder / "reviews" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no `adapter_model.safetensors`; call trainer.save_model"):
        pull(run.folder)


def test_statistics_that_moved_and_were_not_saved_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = pullable.KINDS["resnet-lora"]
    adapter = pullable.lora("convolution", task_type=None, modules_to_save=["classifier"])
    monkeypatch.setitem(pullable.KINDS, "resnet-lora", dataclasses.replace(kept, adapter=adapter))
    base = pullable.save_base("resnet-lora", tmp_path / "base")
    run = pullable.train("resnet-lora", base, tmp_path / "run")
    with pytest.raises(ValueError, match=r"normalization.running_mean`.* and \d more moved in training, as running"):
        pull(run.folder)
    monkeypatch.setattr(loading, "_statistics", lambda _: set())
    assert (logits(pull(run.folder), run) - run.logits).abs().max() > 0.01, "the control: it would say something else"


def test_a_folder_named_like_the_base_is_not_taken_for_it(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pullable.save_base("bert-lora", tmp_path / "acme" / "base", seed=1)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits)
    with pytest.raises(ValueError, match=r"`acme/base` is not the base that the adapter was trained on"):
        pull(made.repo_id, base="acme/base")


@pytest.mark.parametrize("fingerprint", [True, False])
def test_a_head_that_nobody_saved_is_named(hub: HubServer, tmp_path: Path, fingerprint: bool) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    files = pullable.contents(made.run.folder)
    weights = load_file(made.run.folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "classifier" not in name}
    save_file(kept, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    recipe = json.loads(files.pop("recipe.json"))
    recipe["model"] |= {"name_or_path": "acme/base", "local": False, "revision": made.base_sha}
    if not fingerprint:
        recipe["model"]["fingerprint"] = None
    rest = {name: data for name, data in files.items() if name not in pullable.NOT_PUBLISHED}
    rest["adapter_model.safetensors"] = (tmp_path / "adapter_model.safetensors").read_bytes()
    hub.seed("acme/run", pullable.with_manifest(rest, recipe, "acme/run"), user="alice")
    with pytest.raises(ValueError, match=r"`classifier.weight` is neither in .* random in training"):
        pull("acme/run")


def test_an_adapter_file_that_does_not_fit_is_refused(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    weights = load_file(made.run.folder / "adapter_model.safetensors")
    weights["base_model.model.bert.encoder.layer.9.lora_A.weight"] = torch.zeros(2, 16)
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    files = pullable.published(made.run, "acme/run", "acme/base", made.base_sha)
    recipe = json.loads(files["recipe.json"])
    rest = {name: data for name, data in files.items() if name not in pullable.NOT_PUBLISHED}
    rest["adapter_model.safetensors"] = (tmp_path / "adapter_model.safetensors").read_bytes()
    hub.seed("acme/run", pullable.with_manifest(rest, recipe, "acme/run"), user="alice")
    with pytest.raises(ValueError, match=r"does not fit its adapter_config.json: `.*layer.9.lora_A.weight` is in one"):
        pull("acme/run")


def test_shards_are_found_by_their_index(hub: HubServer, tmp_path: Path) -> None:
    run = pullable.trained("bert-lora")
    whole = pullable.KINDS["bert-lora"].make().bert
    whole.load_state_dict(load_file(run.base / "model.safetensors"))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    files = pullable.contents(tmp_path / "shards")
    names = [name for name in files if name.endswith(".safetensors")]
    assert len(names) > 2
    assert "model.safetensors" not in names
    sha = hub.seed("acme/base", {**files, "model-99999-of-99999.safetensors": b"not in the index"}, user="alice")
    hub.seed("acme/run", pullable.published(run, "acme/run", "acme/base", sha), user="alice")
    assert torch.equal(logits(pull("acme/run"), run), run.logits)
    assert not any("99999" in request.path for request in hub.requests)
    cached(names[1], "acme/base").unlink()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with pytest.raises(FileNotFoundError, match=rf"`{names[1]}` of `acme/base` at {sha} is not in the cache"):
        pull("acme/run")


# -- caches and connections -------------------------------------------------------------------------------------------


def offline(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Cuts the network off: by the switch, or by a Hub that refuses connections."""
    if how == "switch":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        huggingface_hub.close_session()

        def refuse(*_: object) -> None:
            raise ConnectionRefusedError("nobody listens")

        monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("how", ["switch", "refused"])
@pytest.mark.parametrize("kind", ["bert-lora", "bert-full"])
def test_a_warm_cache_needs_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch, how: str, kind: str) -> None:
    made = pullable.on_hub(hub, kind)
    pull(made.repo_id)
    offline(monkeypatch, how)
    hub.requests.clear()
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits)
    assert torch.equal(logits(pull(made.repo_id, revision=made.sha), made.run), made.run.logits)
    assert not hub.requests
    with pytest.raises(ConnectionError, match=r"the commit of `acme/else` at main is not in the cache"):
        pull("acme/else")


def test_a_warm_cache_asks_one_thing(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pull(made.repo_id)
    hub.requests.clear()
    pull(made.repo_id)
    assert [request.path for request in hub.requests] == ["/api/models/acme/run"]


def test_a_missing_file_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pull(made.repo_id)
    offline(monkeypatch, "switch")
    files = [(path.name, "acme/run", made.sha) for path in cached("recipe.json").parent.iterdir()]
    files += [(path.name, "acme/base", made.base_sha) for path in cached("config.json", "acme/base").parent.iterdir()]
    assert len(files) == 9
    for name, repo_id, sha in files:
        path = cached(name, repo_id)
        blob = path.resolve().rename(path.resolve().with_suffix(".away"))
        with pytest.raises(FileNotFoundError) as caught:
            pull(made.repo_id)
        assert str(caught.value).startswith(f"`{name}` of `{repo_id}` at {sha} is not in the cache, and offline mode")
        blob.rename(blob.with_suffix(""))
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits), "the control"


def test_a_refused_connection_names_the_file_too(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pull(made.repo_id)
    cached("model.safetensors", "acme/base").unlink()
    monkeypatch.setattr("time.sleep", lambda _: None)  # between retries
    offline(monkeypatch, "refused")
    with pytest.raises(
        FileNotFoundError, match=r"`model.safetensors` of `acme/base` .* did not answer: .*nobody listens"
    ):
        pull(made.repo_id)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["short", "changed"])
def test_a_damaged_file_in_the_cache_is_replaced(hub: HubServer, name: str, how: str) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pull(made.repo_id)
    path = cached(name).resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data[:-10] if how == "short" else data)
    what = "has .* bytes, expected" if how == "short" else "has not the SHA-256"
    with pytest.raises(OSError, match=rf"`{name}` of `acme/run` at {made.sha} {what}"):
        pull(made.repo_id)
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits)


@pytest.mark.parametrize(
    ("repo_id", "name"),
    [("acme/base", "model.safetensors"), ("acme/base", "config.json"), ("acme/run", "recipe.json")],
)
def test_a_file_of_the_base_cut_short_is_replaced(hub: HubServer, repo_id: str, name: str) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    pull(made.repo_id)
    path = cached(name, repo_id).resolve()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(OSError, match=rf"{name}.*(cut short|is no JSON)"):
        pull(made.repo_id)
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits)


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "base/resolve/.*/model.safetensors", "recipe.json"])
def test_a_download_that_breaks_off_leaves_nothing_behind(hub: HubServer, monkeypatch: Any, path: str) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut(path=path, after_bytes=100, times=None, method="GET")
    with pytest.raises(OSError, match=r"could not be downloaded"):
        pull(made.repo_id)
    hub.faults.clear()
    assert torch.equal(logits(pull(made.repo_id), made.run), made.run.logits)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_fails_twice(hub: HubServer, monkeypatch: Any, method: str) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail(times=2, status=503, path="/resolve/", method=method)
    hub.slow(path="adapter_config", seconds=0.2, times=1)
    pulled = None
    for _ in range(3):
        with contextlib.suppress(OSError):
            pulled = pull(made.repo_id)
    assert pulled is not None
    assert torch.equal(logits(pulled, made.run), made.run.logits)


def test_a_file_that_was_changed_on_the_hub_is_refused_each_time(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    data = bytearray(hub.files(made.repo_id)["adapter_model.safetensors"])
    data[-1] ^= 1
    hub.seed(made.repo_id, {"adapter_model.safetensors": bytes(data)}, user="alice")
    for _ in range(2):
        with pytest.raises(OSError, match=r"has not the SHA-256 .* it was changed on the Hub"):
            pull(made.repo_id)


@pytest.mark.parametrize("private", ["run", "base"])
@pytest.mark.parametrize("how", ["private", "gated"])
def test_a_token_that_is_missing(hub: HubServer, monkeypatch: pytest.MonkeyPatch, private: str, how: str) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    token = hub.token("alice")
    if how == "private":
        hub.repos[f"acme/{private}"].private = True
    else:
        hub.repos[f"acme/{private}"].gated = "manual"
        monkeypatch.setattr(hub.repos[f"acme/{private}"], "accepted", {"alice"}, raising=False)
    monkeypatch.delenv("HF_TOKEN")
    why = "is not on the Hub, or is private" if how == "private" else "is gated, and this token has no access"
    with pytest.raises(PermissionError, match=rf"`acme/{private}` {why}.* pass token="):
        pull(made.repo_id)
    assert torch.equal(logits(pull(made.repo_id, token=token), made.run), made.run.logits)
    hub.expire_token(token)
    with pytest.raises(PermissionError, match=r"the Hub refuses `acme/other`: .* Pass another token="):
        pull("acme/other", token=token)


# -- what is never read -----------------------------------------------------------------------------------------------


def test_a_repository_of_others_is_refused(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    files = {k: v for k, v in hub.files("acme/run").items() if k not in ("recipe.json", ".gitattributes")}
    hub.seed("acme/foreign", files, user="alice")
    with pytest.raises(ValueError, match=r"not published by hub_cards: it has no recipe.json.*peft.AutoPeftModel"):
        pull("acme/foreign")
    hub.seed("acme/pickled", {"pytorch_model.bin": b"x", "config.json": b"{}"}, user="alice")
    with pytest.raises(ValueError, match=r"Its weights are pickles only.*transformers.AutoModel"):
        pull("acme/pickled")
    plain = (made.run.folder / "recipe.json").read_bytes()
    hub.seed("acme/foreign", {"recipe.json": plain}, user="alice")
    with pytest.raises(ValueError, match=r"its recipe.json lists no published files"):
        pull("acme/foreign")
    assert not any(request.path.endswith(".bin") for request in hub.requests)


def test_pickles_are_never_read(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    files = hub.files("acme/run")
    recipe = json.loads(files["recipe.json"])
    bad = {"adapter_model.bin": b"x", "adapter_config.json": files["adapter_config.json"]}
    hub.seed("acme/bad", pullable.with_manifest(bad, recipe, "acme/bad"), user="alice")
    with pytest.raises(
        ValueError, match=r"`acme/bad` .* lists `adapter_model.bin` and has no safetensors weights; pickles"
    ):
        pull("acme/bad")
    torch.save({}, tmp_path / "pytorch_model.bin")
    base = {"config.json": made.run.base / "config.json", "pytorch_model.bin": tmp_path / "pytorch_model.bin"}
    sha = hub.seed("acme/pickles", base, user="alice")
    hub.seed("acme/run", pullable.published(made.run, "acme/run", "acme/pickles", sha), user="alice")
    with pytest.raises(ValueError, match=r"`acme/pickles` .* lists `pytorch_model.bin` and has no safetensors"):
        pull("acme/run")
    shutil.copy(made.run.base / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"lists `pytorch_model.bin` and has no safetensors"):
        pull("acme/run", base=tmp_path)
    hub.seed("acme/empty", {"config.json": made.run.base / "config.json"}, user="alice")
    with pytest.raises(FileNotFoundError, match=r"has no weights: neither model.safetensors nor"):
        pull("acme/run", base="acme/empty")
    assert not any(request.path.endswith(".bin") for request in hub.requests)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("adapter_config.json", {"auto_map": {"AutoModel": "modeling_evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Evil", None]}}),
    ],
)
def test_code_of_a_repository_is_never_run(hub: HubServer, name: str, values: dict[str, Any]) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    files = {k: v for k, v in hub.files("acme/run").items() if k != ".gitattributes"}
    hub.seed("acme/run", changed(files, name, **values), user="alice")
    with pytest.raises(ValueError, match=rf"`{name}` of `acme/run` .* has `auto_map`, by which code"):
        pull(made.repo_id)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": "x.Y"}}}, "auto_map"),
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation: evil/kernel"),
    ],
)
def test_code_of_a_base_is_never_run(hub: HubServer, values: dict[str, Any], what: str) -> None:
    run = pullable.trained("bert-lora")
    config = json.loads((run.base / "config.json").read_text()) | values
    files = {**pullable.contents(run.base), "config.json": json.dumps(config), "evil.py": "raise SystemExit"}
    sha = hub.seed("acme/base", files, user="alice")
    hub.seed("acme/run", pullable.published(run, "acme/run", "acme/base", sha), user="alice")
    with pytest.raises(ValueError, match=rf"`config.json` of `acme/base` .* has `{what}`"):
        pull("acme/run")


@pytest.mark.parametrize("name", ["Evil", "BertConfig", "AutoModel", "pipeline", "os"])
def test_only_models_of_transformers_are_made(hub: HubServer, name: str) -> None:
    made = pullable.on_hub(hub, "bert-full")
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["model"]["base_class"] = name
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(
        ValueError, match=rf"the run's model is a `{name}`, which transformers .* does not have as a model"
    ):
        pull(made.repo_id)


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_manifest_cannot_reach_out_of_the_cache(hub: HubServer, tmp_path: Path, name: str) -> None:
    made = pullable.on_hub(hub, "bert-full")
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["published"]["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(ValueError, match=r"evil\.json"):
        pull(made.repo_id)


def seed_changed(hub: HubServer, name: str, **values: Any) -> None:
    """The run on the Hub with other values in a JSON file of it, and a manifest that fits."""
    files = {key: data for key, data in hub.files("acme/run").items() if key != ".gitattributes"}
    hub.seed("acme/run", changed({name: b"{}"} | files, name, **values), user="alice")


@pytest.mark.parametrize("shard", ["outside", "README.md", "pieces.model", 3])
def test_an_index_lists_nothing_but_safetensors_beside_it(hub: HubServer, tmp_path: Path, shard: Any) -> None:
    made = pullable.on_hub(hub, "bert-full")
    weights = load_file(made.run.folder / "model.safetensors")
    save_file(weights, tmp_path / "secret.safetensors", {"format": "pt"})
    torch.save(weights, tmp_path / "weights")
    name = str(tmp_path / "secret.safetensors") if shard == "outside" else shard
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    files = hub.files("acme/run")
    rest = {k: v for k, v in files.items() if k not in ("README.md", "recipe.json", "model.safetensors")}
    rest |= {"model.safetensors.index.json": json.dumps(index).encode()}
    if shard == "pieces.model":
        rest[shard] = (tmp_path / "weights").read_bytes()
    evil = pullable.with_manifest(rest, json.loads(files["recipe.json"]), "acme/evil")
    if shard == "README.md":
        evil[shard] = (tmp_path / "weights").read_bytes()
    hub.seed("acme/evil", evil, user="alice")
    with pytest.raises(ValueError, match=rf"`model.safetensors.index.json` of `acme/evil` .* lists `{name}`; expected"):
        pull("acme/evil")


@pytest.mark.parametrize(
    ("kind", "name", "values", "what"),
    [
        ("bert-full", "tokenizer_config.json", {"gguf_file": "/etc/passwd"}, "gguf_file: /etc/passwd"),
        ("bert-full", "tokenizer_config.json", {"vocab_file": ".env"}, "vocab_file: .env"),
        ("bert-full", "config.json", {"transformers_weights": "a.safetensors"}, "transformers_weights: a.safetensors"),
        (
            "bert-full",
            "processor_config.json",
            {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/etc"}},
            "audio_tokenizer_name_or_path: /etc",
        ),
        ("bert-lora", "adapter_config.json", {"peft_type": "SHADOW", "shadow_model": "a/b"}, "shadow_model: a/b"),
        ("bert-lora", "adapter_config.json", {"peft_type": "XLORA", "adapters": {"0": "a/b"}}, "peft_type: XLORA"),
        (
            "bert-lora",
            "adapter_config.json",
            {"prompt_tuning_init_state_dict_path": "/x.bin"},
            "prompt_tuning_init_state_dict_path: /x.bin",
        ),
        ("bert-lora", "adapter_config.json", {"megatron_config": {"a": 1}}, "megatron_config: {'a': 1}"),
    ],
)
def test_nothing_outside_of_the_run_is_read(
    hub: HubServer, kind: str, name: str, values: dict[str, Any], what: str
) -> None:
    made = pullable.on_hub(hub, kind)
    seed_changed(hub, name, **values)
    with pytest.raises(ValueError, match=rf"`{name}` of `acme/run` .* has `{what}`: loading it would read"):
        pull(made.repo_id)
    assert not any("a/b" in request.path for request in hub.requests)


def test_a_whole_model_is_not_changed_by_an_adapter_beside_it(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-full")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(made.run.base), "r": 2}
    seed_changed(hub, "adapter_config.json", **config)
    with pytest.raises(ValueError, match=r"`acme/run` .* holds an `adapter_config.json`, but its run is of a whole"):
        pull(made.repo_id)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("bert-full", {"dtype": "load"}, "weights are of the dtype `load`; expected float32"),
        ("bert-full", {"dtype": "nothing"}, "weights are of the dtype `nothing`; expected float32"),
        ("bert-full", {"dtype": "float8_e4m3fn"}, "weights are of the dtype `float8_e4m3fn`; expected float32"),
        ("bert-full", {"id2label": {"a": "b"}}, "names the classes `a`; expected the numbers 0 to 0"),
        ("bert-full", {"id2label": {"1": "a", "7": "b", "-3": "c"}}, "names the classes `-3`, `7`; expected the"),
        (
            "bert-lora",
            {"base_class": "PreTrainedModel"},
            "model is a `PreTrainedModel`, which transformers .* not have",
        ),
        ("bert-lora", {"adapters": {"../../x": {}}}, "adapter is called `../../x`; expected a name"),
    ],
)
def test_values_of_a_recipe_that_mean_nothing(hub: HubServer, kind: str, values: dict[str, Any], message: str) -> None:
    made = pullable.on_hub(hub, kind)
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["model"] |= values
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(ValueError, match=message):
        pull(made.repo_id)


def test_a_kind_of_adapter_that_peft_does_not_know(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-lora")
    seed_changed(hub, "adapter_config.json", peft_type="FUTURE")
    with pytest.raises(ValueError, match=r"of `acme/run` .* has the peft_type 'FUTURE', which PEFT .* does not know"):
        pull(made.repo_id)


def test_a_file_of_brackets_without_end(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-full")
    hub.seed("acme/run", {"recipe.json": "[" * 200_000}, user="alice")
    with pytest.raises(OSError, match=r"`recipe.json` in .* is no JSON \(maximum recursion depth exceeded"):
        pull(made.repo_id)


def test_a_damaged_picture_in_the_cache_is_replaced(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-full")
    files = {k: v for k, v in hub.files("acme/run").items() if k not in ("README.md", ".gitattributes")}
    recipe = json.loads(files.pop("recipe.json"))
    files["figures/a.png"] = b"a picture"
    hub.seed("acme/run", pullable.with_manifest(files, recipe, "acme/run"), user="alice")
    pull(made.repo_id)
    next(Path(constants.HF_HUB_CACHE).rglob("a.png")).resolve().write_bytes(b"b picture")
    with pytest.raises(OSError, match=r"`figures/a.png` .* has not the SHA-256"):
        pull(made.repo_id)
    pull(made.repo_id)


def test_a_users_own_file_is_never_removed(tmp_path: Path) -> None:
    run = tmp_path / "snapshots" / "today"
    shutil.copytree(pullable.trained("bert-full").folder, run)
    (run / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"`config.json` in .* is no JSON"):
        pull(run)
    assert (run / "config.json").is_file()


def test_weights_that_are_not_those_of_the_class(hub: HubServer, tmp_path: Path) -> None:
    made = pullable.on_hub(hub, "bert-full")
    files = hub.files("acme/run")
    weights = load_file(made.run.folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    rest = {k: v for k, v in files.items() if k not in (*pullable.NOT_PUBLISHED, ".gitattributes")}
    rest["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    hub.seed("acme/run", pullable.with_manifest(rest, json.loads(files["recipe.json"]), "acme/run"), user="alice")
    with pytest.raises(
        ValueError, match=r"are not those of a BertForSequenceClassification: missing keys: `classifier.bias`"
    ):
        pull(made.repo_id)


def test_several_adapters_and_a_base_for_a_whole_model_are_refused(hub: HubServer) -> None:
    made = pullable.on_hub(hub, "bert-full")
    with pytest.raises(ValueError, match=r"holds a whole model, which needs none; leave base= out"):
        pull(made.repo_id, base="acme/base")
    made = pullable.on_hub(hub, "bert-lora")
    recipe = json.loads(hub.files("acme/run")["recipe.json"])
    recipe["model"]["adapters"]["second"] = recipe["model"]["adapters"]["default"]
    hub.seed("acme/run", {"recipe.json": json.dumps(recipe)}, user="alice")
    with pytest.raises(ValueError, match=r"the run has 2 adapters \(default, second\), expected one"):
        pull(made.repo_id)
