"""Under every fault: nothing is lost, nothing is half published, the error says so, and the repeated call succeeds."""

import importlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hub_cards import ConcurrentPushError, PublishError
from hub_cards.publishing import remote
from hub_cards.publishing.own_files import write_manifest
from hub_cards.publishing.ranks import on_first_rank
from hub_cards.publishing.remote import commit
from tests.hub_cards import trained
from tests.hub_cards.trained import RUN, Run, go
from tests.hub_server import HubServer
from tests.launching import ROOT, launch

Fault = Callable[[HubServer], None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return trained.train("full").copy(tmp_path / "run")


@pytest.fixture(params=["a new repository", "one that is published"])
def before(request: pytest.FixtureRequest, run: Run, hub: HubServer) -> dict[str, bytes]:
    """The state before the call that fails: none, or an earlier publication of something else."""
    if request.param == "a new repository":
        return {}
    go(run)
    trained.change(run.folder / "recipe.json", task="summarization")
    weights = run.folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return hub.files(RUN)


def now(hub: HubServer) -> dict[str, bytes]:
    return {name: data for name, data in hub.files(RUN).items()} if RUN in hub.repos else {}


def unchanged(hub: HubServer, before: dict[str, bytes]) -> bool:
    """The repository is as before; a new one may be there, empty."""
    there = now(hub)
    return there == before if before else set(there) <= {".gitattributes"}


def whole(hub: HubServer, run: Run) -> bool:
    return now(hub)["model.safetensors"] == (run.folder / "model.safetensors").read_bytes()


COMMIT = "/commit/"
STATE = "is (as it was before|there, and empty)"
REFUSALS: dict[str, tuple[Fault, str]] = {
    "500 on the commit": (lambda hub: hub.fail(status=500, path=COMMIT), "the commit to .* failed"),
    "503 on the commit": (lambda hub: hub.fail(status=503, path=COMMIT), "as a whole, or not at all"),
    "403 on the commit": (lambda hub: hub.forbid_commits(), rf"{STATE}\. Use a token that may"),
    "401 on the commit": (lambda hub: hub.fail(status=401, path=COMMIT), rf"{STATE}\. Log in again"),
    "429 on the commit": (lambda hub: hub.fail(status=429, path=COMMIT), "the commit to .* failed"),
    "cut in the commit": (lambda hub: hub.cut(path=COMMIT, after_bytes=100), "as a whole, or not at all"),
    "403 before the upload": (lambda hub: hub.fail(status=403, path="/preupload/", times=None), STATE),
    "500 on looking": (lambda hub: hub.fail(status=500, path=f"/api/models/{RUN}$", times=None), "Nothing was sent"),
    "400 of the card": (lambda hub: hub.fail(status=400, path="/validate-yaml"), f"Invalid metadata .* {STATE}"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_fault_leaves_everything_as_it_was(run: Run, hub: HubServer, before: dict[str, bytes], fault: str) -> None:
    cause, match = REFUSALS[fault]
    cause(hub)
    with pytest.raises(PublishError, match=match):
        go(run)
    assert unchanged(hub, before)
    assert not list(run.folder.glob(".publishing-*"))
    hub.faults.clear()
    assert go(run).changed
    assert whole(hub, run)
    assert not go(run).changed


RETRIED: dict[str, Fault] = {
    "cut in mid-upload": lambda hub: hub.cut(path="/storage/", after_bytes=1000, method="PUT"),
    "503 on the upload": lambda hub: hub.fail(status=503, path="/storage/", method="PUT"),
    "503 on the batch": lambda hub: hub.fail(status=503, path="/info/lfs/objects/batch"),
    "slow answers": lambda hub: hub.slow(seconds=0.05),
}


@pytest.mark.parametrize("fault", RETRIED)
def test_what_the_client_retries_is_published_once(run: Run, hub: HubServer, fault: str) -> None:
    RETRIED[fault](hub)
    assert go(run).commit == hub.commits(RUN)[0].sha
    assert len(hub.commits(RUN)) == 2  # the Hub's own first one, and ours
    assert whole(hub, run)


def test_an_upload_that_is_never_let_through(run: Run, hub: HubServer, before: dict[str, bytes]) -> None:
    hub.fail(status=403, path="/storage/", method="PUT", times=None)
    with pytest.raises(PublishError, match=rf"uploading to .* failed: .*model\.safetensors.* {STATE}"):
        go(run)
    assert unchanged(hub, before)
    hub.faults.clear()
    assert go(run).changed
    assert whole(hub, run)


def test_the_answer_to_the_commit_is_lost(run: Run, hub: HubServer, before: dict[str, bytes]) -> None:
    hub.lose_answer(path=COMMIT)
    with pytest.raises(PublishError, match=r"as a whole, or not at all.* Publish again"):
        go(run)
    assert whole(hub, run)
    commits = [commit.sha for commit in hub.commits(RUN)]
    again = go(run)
    assert not again.changed
    assert [commit.sha for commit in hub.commits(RUN)] == commits
    assert again.commit == commits[0]


def test_the_answer_to_the_creation_is_lost(run: Run, hub: HubServer) -> None:
    hub.lose_answer(path="/api/repos/create")
    with pytest.raises(PublishError, match="No file was sent"):
        go(run)
    assert go(run).changed
    assert hub.repos[RUN].private
    assert whole(hub, run)


def test_somebody_pushes_meanwhile(run: Run, hub: HubServer) -> None:
    go(run)
    trained.change(run.folder / "recipe.json", task="summarization")
    hub.race(RUN, {"README.md": b"---\nlicense: mit\n---\n# Theirs\n\nSeen by them.\n"})
    with pytest.raises(ConcurrentPushError, match=r"somebody pushed .* Nothing was overwritten"):
        go(run)
    assert b"Seen by them." in now(hub)["README.md"]
    assert b"summarization" not in now(hub)["recipe.json"]
    assert "Seen by them." in go(run).card
    assert b"summarization" in now(hub)["recipe.json"]


def test_somebody_pushes_into_a_repository_that_is_being_made(run: Run, hub: HubServer) -> None:
    hub.race(RUN, {"notes.txt": b"theirs"})
    with pytest.raises(ConcurrentPushError, match="somebody pushed"):
        go(run)
    assert set(now(hub)) == {".gitattributes", "notes.txt"}


def test_a_token_that_expires(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go(run)
    before = now(hub)
    trained.change(run.folder / "recipe.json", task="summarization")
    hub.expire_token(os.environ["HF_TOKEN"])
    with pytest.raises(PublishError, match=r"reading .* failed: .* Nothing was sent\. Log in again"):
        go(run)
    assert unchanged(hub, before)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
    assert go(run).changed


def test_a_token_that_may_only_read(run: Run, hub: HubServer) -> None:
    token = hub.add_user("alice", role="read")
    with pytest.raises(PublishError, match=r"creating .* No file was sent.* a token that may write"):
        go(run, token=token)
    assert RUN not in hub.repos
    go(run)
    trained.change(run.folder / "recipe.json", task="summarization")
    before = now(hub)
    with pytest.raises(PublishError, match="is as it was before"):
        go(run, token=token)
    assert unchanged(hub, before)


def test_a_private_repository_of_somebody_else(run: Run, hub: HubServer) -> None:
    hub.add_user("eve")
    hub.seed("eve/run", {"notes.txt": b"theirs"}, private=True, user="eve")
    with pytest.raises(PublishError, match="creating `eve/run` failed"):
        trained.publish(run.folder, "eve/run", license="mit")
    assert set(hub.files("eve/run")) == {".gitattributes", "notes.txt"}


def test_the_check_after_the_commit_cannot_be_made(run: Run, hub: HubServer) -> None:
    go(run)
    trained.change(run.folder / "recipe.json", task="summarization")
    head = hub.commits(RUN)[0].sha
    # The tree of the head that was read is answered, that of the new commit is not.
    hub.fail(status=403, path=f"/api/models/{RUN}/tree/(?!{head})", times=None)
    with pytest.raises(PublishError, match="The commit is there as a whole, and was not checked"):
        go(run)
    hub.faults.clear()
    assert not go(run).changed


def test_weights_that_change_while_they_are_published(
    run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(folder: Path, *rest: object) -> dict[str, str]:
        found = write_manifest(folder, *rest)  # type: ignore[arg-type]
        with (run.folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("hub_cards.publishing.publish"), "write_manifest", swap)
        with pytest.raises(PublishError, match=r"`model\.safetensors` changed while it was being published"):
            go(run)
    assert unchanged(hub, {})
    assert go(run).changed


@pytest.mark.parametrize("files", [{"model.safetensors": b"other"}, {"config.json": b"{}"}])
def test_something_else_arrived(
    run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    def tampered(*given: Any) -> str:
        commit(*given)
        return hub.seed(RUN, files, user="alice")

    monkeypatch.setattr(remote, "commit", tampered)
    with pytest.raises(PublishError, match=rf"`{next(iter(files))}` in commit \w+ of .* is not what was sent"):
        go(run)


def test_something_did_not_arrive(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "commit", lambda api, repo_id, there, *rest: there.head)
    with pytest.raises(PublishError, match=r"is not what was sent \(\d+ such files\)"):
        go(run)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No larger file can be written: a real error of the system's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1500, 3000])
def test_files_that_do_not_fit_on_the_disk(run: Run, hub: HubServer, size: int) -> None:
    with small_files(size), pytest.raises(OSError, match="do not fit on the disk"):
        go(run)
    assert RUN not in hub.repos
    assert not list(run.folder.glob(".publishing-*"))
    assert go(run).changed


# -- several processes ------------------------------------------------------------------------------------------------


def test_processes_without_a_group_are_refused(run: Run, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"one of 2 processes .* no process group"):
        go(run)
    assert hub.requests == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert on_first_rank(lambda: 3) == 3


@pytest.mark.distributed
def test_two_ranks_publish_once_and_fail_together(run: Run, hub: HubServer, tmp_path: Path) -> None:
    worker = str(ROOT / "tests" / "hub_cards" / "publish_worker.py")
    environment = hub.environment(tmp_path / "home", os.environ["HF_TOKEN"])
    log = tmp_path / "log"
    hub.forbid_commits(times=1)
    assert launch(worker, str(run.folder), RUN, ranks=2, log=log, environment=environment) == 0, log.read_text()
    told = log.read_text()
    assert "rank 0 failed: PublishError" in told
    assert "rank 1 failed: RuntimeError the first process failed, so this one stops too. There: PublishError" in told
    sha = hub.commits(RUN)[0].sha
    assert f"rank 0 published {sha}" in told
    assert f"rank 1 published {sha}" in told
    assert len([call for call in hub.requests if COMMIT in call.path]) == 2
