"""Listing the adapters of a base: ours and other people's, whole and broken; and comparing what they state."""

import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
from huggingface_hub import list_models

from hub_cards import publish
from hub_cards.__main__ import main
from hub_cards.registry.adapter_set import load_adapters
from hub_cards.registry.listing import AdapterInfo, compare_adapters, list_adapters
from tests import tiny
from tests.hub_cards.adapter_repos import BASE, publish_adapter, seed_base
from tests.hub_server import HubServer

CARD = "---\nlibrary_name: peft\nbase_model: acme/base\nbase_model_relation: adapter\n{}---\n# x\n"
CONFIG = {"peft_type": "LORA", "r": 8, "revision": "c" * 40}


def small(hub: HubServer, repo_id: str, card: str = "", config: Any = CONFIG, size: int = 10, **seed: Any) -> str:
    """A repository with the files of an adapter, and no weights that anybody could read."""
    files: dict[str, Any] = {"README.md": CARD.format(card), "adapter_model.safetensors": bytes(size)}
    if config is not None:
        files["adapter_config.json"] = config if isinstance(config, str | bytes) else json.dumps(config)
    return hub.seed(repo_id, files, **seed)


def index(*results: tuple[str, str | None, str, Any]) -> str:
    """`model-index` of (data set, split, metric, value)."""
    entries = [
        {"task": {"type": "text-classification"}, "dataset": {"name": data, "type": data, "split": split},
         "metrics": [{"type": metric, "value": value}]}
        for data, split, metric, value in results
    ]  # fmt: skip
    return f"model-index: {json.dumps([{'name': 'x', 'results': entries}])}\n"


def test_ours_are_found_with_what_they_state(hub: HubServer, tmp_path: Path) -> None:
    base_sha = seed_base(hub, tmp_path / "base")
    data = {"name": "jo/news", "local": False, "labels": ["bad", "good"], "splits": {"test": {"rows": 9}}}
    recipe = {"results": {"test": {"accuracy": 0.75, "loss": 0.5}}, "data": data, "task": "text-classification"}
    made = publish_adapter(hub, tmp_path / "run", "acme/news", ("bad", "good"), recipe=recipe, card=None, r=3)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    files = {"adapter_config.json": json.dumps({**config, "revision": base_sha})}
    sha = hub.seed("acme/news", files, user="alice")
    [info] = list_adapters(BASE)
    assert info == AdapterInfo(
        "acme/news",
        revision=sha,
        base_revision=base_sha,
        kind="LORA",
        rank=3,
        size_bytes=(made.folder / "adapter_model.safetensors").stat().st_size,
        metrics={"test/accuracy": 0.75, "test/loss": 0.5},
        data=("jo/news",),
        license="mit",
        last_modified=info.last_modified,
        private=False,
        gated=False,
    )
    assert info.last_modified == huggingface_hub.model_info("acme/news").last_modified
    assert list_adapters("acme/other") == [], "the control"


def test_only_those_of_this_base_and_only_what_the_token_may_see(hub: HubServer) -> None:
    hub.add_user("bob")
    small(hub, "acme/one")
    small(hub, "alice/mine", private=True)
    small(hub, "bob/his", private=True)
    hub.seed("jo/elsewhere", {"README.md": CARD.format("").replace("acme/base", "acme/base-2")})
    hub.seed("jo/finetune", {"README.md": CARD.format("").replace("adapter", "finetune").replace("peft", "x")})
    assert [info.repo_id for info in list_adapters(BASE)] == ["acme/one", "alice/mine"]
    assert [info.private for info in list_adapters(BASE)] == [False, True]
    assert [info.repo_id for info in list_adapters(BASE, token=hub.token("bob"))] == ["acme/one", "bob/his"]
    assert [info.repo_id for info in list_adapters(BASE, author="alice")] == ["alice/mine"]
    assert len(list_adapters(BASE, limit=1)) == 1
    with pytest.raises(ValueError, match="limit is 0, expected a positive number"):
        list_adapters(BASE, limit=0)


def test_all_pages_and_few_requests(hub: HubServer) -> None:
    hub.page_size = 2
    for number in range(5):
        small(hub, f"jo/a{number}", size=100 + number)
    hub.requests.clear()
    infos = list_adapters(BASE)
    assert [info.size_bytes for info in infos] == [100, 101, 102, 103, 104]
    asked = [(request.method, request.path.partition("jo/")[0]) for request in hub.requests]
    assert asked.count(("GET", "/api/models")) == 3, "pages"
    assert len(asked) == 3 + 5 * 3
    hub.requests.clear()
    assert list_adapters(BASE) == infos
    assert len(hub.requests) == 3 + 5, "the configurations come from the cache"


def test_a_foreign_adapter_with_pefts_own_card(hub: HubServer, tmp_path: Path) -> None:
    seed_base(hub, tmp_path / "base")
    model = tiny.bert().from_pretrained(BASE)
    foreign = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=5))
    foreign.save_pretrained(tmp_path / "foreign")
    hub.seed("jo/foreign", {path.name: path for path in (tmp_path / "foreign").iterdir()})
    [info] = list_adapters(BASE)
    assert (info.kind, info.rank, info.base_revision, info.license, dict(info.metrics)) == ("LORA", 5, None, None, {})
    assert info.size_bytes == (tmp_path / "foreign" / "adapter_model.safetensors").stat().st_size
    with pytest.raises(ValueError, match="was not published by hub_cards"):
        load_adapters(["jo/foreign"])


BROKEN: dict[str, dict[str, Any]] = {
    "jo/config-is-no-json": {"config": "{"},
    "jo/config-is-no-text": {"config": b"\xff\xfe"},
    "jo/config-is-a-list": {"config": [1]},
    "jo/config-is-missing": {"config": None},
    "jo/config-is-deep": {"config": "[" * 100_000},
    "jo/config-is-huge": {"config": json.dumps({**CONFIG, "note": "x" * (2 << 20)})},
    "jo/values-of-other-types": {"config": {"peft_type": 3, "r": "8", "revision": ["x"]}},
    "jo/a-rank-that-is-true": {"config": {"peft_type": None, "r": True}},
}
CARDS = {
    "jo/index-is-text": "model-index: none\n",
    "jo/index-is-empty": "model-index: [{}]\n",
    "jo/index-has-no-results": "model-index: [{name: x, results: null}]\n",
    "jo/index-of-texts": "model-index: [a, b]\n",
    "jo/not-numbers": index(("d", "test", "a", "0.9 ± 0.1"), ("d", "test", "b", True), ("d", "test", "c", None)),
    "jo/keys-of-the-client": "ignore_metadata_errors: true\nself: 1\nmodel_name: 7\n",
    "jo/tags-of-other-types": "tags: {a: b}\nlicense: [mit]\nlanguage: 3\n",
}


def test_a_broken_adapter_does_not_break_the_list(hub: HubServer) -> None:
    for repo_id, options in BROKEN.items():
        small(hub, repo_id, **options)
    for repo_id, card in CARDS.items():
        small(hub, repo_id, card)
    infos = {info.repo_id: info for info in list_adapters(BASE)}
    assert infos.keys() == BROKEN.keys() | CARDS.keys()
    for repo_id in BROKEN:
        info = infos[repo_id]
        assert (info.kind, info.rank, info.base_revision, info.size_bytes) == (None, None, None, 10), repo_id
    for repo_id in CARDS:
        assert (infos[repo_id].rank, dict(infos[repo_id].metrics)) == (8, {}), repo_id
    asked = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert not any("config-is-huge" in path for path in asked)
    assert any("config-is-deep" in path for path in asked), "the control"
    with pytest.raises(TypeError, match="ignore_metadata_errors"):
        list(list_models(filter=f"base_model:adapter:{BASE}", cardData=True))  # why the cards are not asked for


def test_results_on_several_data_sets_are_kept_apart(hub: HubServer) -> None:
    small(hub, "jo/one", index(("news", "test", "f1", 0.5), ("news", None, "acc", 1)))
    small(hub, "jo/two", index(("news", "test", "f1", 0.5), ("mail", "test", "f1", 0.25)) + "datasets: jo/mail\n")
    small(hub, "jo/three", "datasets: [jo/mail]\n")
    one, three, two = list_adapters(BASE)
    assert (dict(one.metrics), one.data) == ({"test/f1": 0.5, "acc": 1.0}, ("news",))
    assert (dict(two.metrics), two.data) == ({"news/test/f1": 0.5, "mail/test/f1": 0.25}, ("news", "mail"))
    assert three.data == ("jo/mail",)


def test_a_gated_adapter_is_listed_with_what_may_be_read(hub: HubServer) -> None:
    hub.add_user("bob")
    small(hub, "jo/gated", gated="manual")
    [info] = list_adapters(BASE, token=hub.token("bob"))
    assert (info.gated, info.rank, info.license) == ("manual", None, None)
    assert "| gated |" in compare_adapters([info])


def test_what_fails_is_told_and_not_taken_for_a_short_list(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits 23 seconds between its attempts
    small(hub, "jo/one")
    hub.fail(status=500, path="paths-info")
    with pytest.raises(OSError, match=r"(?s)the Hub failed to list the adapters of `acme/base`: .* Call again"):
        list_adapters(BASE)
    hub.fail(status=500, path="/resolve/", times=None)
    with pytest.raises(OSError, match=r"(?s)`adapter_config.json` of `jo/one` .* call again"):
        list_adapters(BASE)
    hub.faults.clear()
    assert [info.rank for info in list_adapters(BASE)] == [8], "the repeated call succeeds"
    hub.cut(path="/api/models$", times=None)
    with pytest.raises(ConnectionError, match="the Hub did not list the adapters of `acme/base`"):
        list_adapters(BASE)
    hub.faults.clear()
    expired = hub.token("alice")
    hub.expire_token(expired)
    with pytest.raises(PermissionError, match="the Hub refuses to list the adapters"):
        list_adapters(BASE, token=expired)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot be listed: offline mode is on"):
        list_adapters(BASE)


@pytest.mark.parametrize("base", ["./base", "/models/base", "~/base", "a/b/c", ""])
def test_a_base_is_an_id_and_no_path(base: str) -> None:
    with pytest.raises(ValueError, match="cannot be an id on the Hub; expected `owner/name`"):
        list_adapters(base)


def test_a_folder_that_looks_like_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    with pytest.raises(ValueError, match="base `models/base` is a folder here"):
        list_adapters("models/base")


# -- comparing ---------------------------------------------------------------------------------------------------------

ROWS = [
    AdapterInfo("jo/low", metrics={"test/accuracy": 0.5, "test/loss": 0.1}, data=("a|b",), license="mit"),
    AdapterInfo("jo/none"),
    AdapterInfo("jo/high", metrics={"test/accuracy": 0.875}, rank=4, size_bytes=1_400_000, base_revision="d" * 40),
]


def order(table: str) -> list[str]:
    return [line.split("|")[1].strip(" `").removeprefix("jo/") for line in table.splitlines()[2:]]


def test_the_best_comes_first_and_the_unstated_last() -> None:
    assert order(compare_adapters(ROWS)) == ["high", "low", "none"]
    assert order(compare_adapters(reversed(ROWS), metric="test/accuracy")) == ["high", "low", "none"]
    more = [*ROWS, AdapterInfo("jo/worse", metrics={"test/loss": 0.2})]
    assert order(compare_adapters(more, metric="test/loss")) == ["low", "worse", "high", "none"]
    assert "| `jo/high` | 0.875 | not stated | not stated | 4 | 1.4 MB | not stated | `dddddddddddd` |" in (
        compare_adapters(ROWS)
    )
    with pytest.raises(ValueError, match="no adapter states `f1`, expected one of: test/accuracy, test/loss"):
        compare_adapters(ROWS, metric="f1")
    assert order(compare_adapters([ROWS[1]])) == ["none"]
    assert compare_adapters(ROWS, metric="accuracy") == compare_adapters(ROWS, metric="test/accuracy")
    other = AdapterInfo("jo/dev", metrics={"dev/accuracy": 0.5})
    with pytest.raises(
        ValueError, match="2 metrics are called `accuracy`, expected one of: dev/accuracy, test/accuracy"
    ):
        compare_adapters([*ROWS, other], metric="accuracy")


def test_hostile_text_stays_in_its_cell() -> None:
    name = "x | <img src=x> [a](b) \n| y"
    table = compare_adapters([AdapterInfo("jo/x", metrics={name: 1.0}, data=(name,), license=name, kind=name)])
    lines = table.splitlines()
    assert len(lines) == 3
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    assert "<img" not in table


def test_the_command(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", BASE]) == 0
    assert "No adapter that this token may see names `acme/base` as its base." in capsys.readouterr().out
    small(hub, "jo/one", index(("news", "test", "f1", 0.5)))
    small(hub, "jo/two", index(("news", "test", "f1", 0.75)))
    assert main(["adapters", BASE, "--metric", "test/f1"]) == 0
    assert order(capsys.readouterr().out.strip()) == ["two", "one"]
    assert main(["adapters", BASE, "--metric", "bleu"]) == 1
    assert "no adapter states `bleu`" in capsys.readouterr().err


def test_published_listed_and_loaded(hub: HubServer, tmp_path: Path) -> None:
    """From two runs to one model, by the project's own publishing."""
    seed_base(hub, tmp_path / "base")
    hub.seed(BASE, {"README.md": "---\nlicense: mit\n---\n"}, user="alice")
    made = []
    for number, labels in enumerate([("bad", "good"), ("x", "y", "z")]):
        one = publish_adapter(hub, tmp_path / f"run{number}", f"jo/unused{number}", labels, seed=number)
        (one.folder / "README.md").unlink(missing_ok=True)
        publish(one.folder, f"alice/run{number}", private=False)
        made.append(one)
    infos = [info for info in list_adapters(BASE) if info.repo_id.startswith("alice/")]
    assert [(info.repo_id, info.rank, info.license) for info in infos] == [
        ("alice/run0", 2, "mit"),
        ("alice/run1", 2, "mit"),
    ]
    adapters = load_adapters([info.repo_id for info in infos])
    adapters.use("run1")
    assert adapters.labels == ("x", "y", "z")
