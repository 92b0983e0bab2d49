"""The repository on the Hub: what it holds, and one commit on top of exactly that."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from hub_cards.card import read_card
from hub_cards.facts import RECIPE
from hub_cards.fingerprints import file_sha256
from hub_cards.publishing.staging import ADAPTER, MODEL, is_allowed

CARD = "README.md"
_GIT = ".gitattributes"  # which the Hub itself puts into every repository
_FAILURES = (HfHubHTTPError, httpx.HTTPError, LocalTokenNotFoundError, ConnectionError)
_OTHER_FORMATS = ("pytorch_model*.bin", "adapter_model.bin", "tf_model.h5", "flax_model.msgpack")  # of one's weights
_MODEL_FILES = {*ADAPTER, *MODEL} - {"generation_config.json"}


class PublishError(RuntimeError):
    """Raised when the Hub does not do what publishing needs; the message says what state the repository is in.

    Example:
        >>> issubclass(PublishError, RuntimeError)
        True
    """


class ConcurrentPushError(PublishError):
    """Raised when somebody else pushed while this run was being published; nothing was overwritten.

    Example:
        >>> issubclass(ConcurrentPushError, PublishError)
        True
    """


@dataclass(frozen=True)
class Remote:
    """A repository at its head: the commit, whether it is private, each file's hash, the card, and our own files."""

    head: str
    private: bool
    hashes: Mapping[str, str] = field(default_factory=dict)  # file to SHA-256 (LFS) or git's hash
    card: str | None = None
    ours: frozenset[str] = frozenset()  # what an earlier publication put there

    def stale(self, files: Mapping[str, Path]) -> tuple[str, ...]:
        """Return the files of an earlier publication that this one no longer has; nobody else's."""
        return tuple(sorted(n for n in self.ours if n in self.hashes and n not in files and is_allowed(n)))

    def differing(self, files: Mapping[str, Path]) -> tuple[str, ...]:
        """Return the files that are not there, or with other contents."""
        return tuple(name for name, path in files.items() if not self._is_same(name, path))

    def strangers(self, files: Mapping[str, Path]) -> tuple[str, ...]:
        """Return weights and configurations of another model, which would be loaded beside or instead of ours."""
        left = set(self.hashes) - set(files) - set(self.stale(files))
        return tuple(
            sorted(name for name in left if _is_other_format(name) or (is_allowed(name) and _is_model_file(name)))
        )

    def _is_same(self, name: str, path: Path) -> bool:
        there = self.hashes.get(name)
        if there is None:
            return False
        return there == (file_sha256(path) if len(there) == 64 else git_hash(path.read_bytes()))


@contextmanager
def told(doing: str, state: str, *, refused: str | None = None) -> Iterator[None]:
    """Turn what the client raises in a block into a `PublishError` that says what was being done and what holds now.

    Args:
        doing: what the block does, such as `reading the repository`.
        state: what is true of the repository when it fails.
        refused: what is true when the Hub itself said no, if that is more.
    """
    try:
        yield
    except HFValidationError as error:
        raise PublishError(f"{doing}: {error} {state}") from error
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{doing}: the client is offline. {state} Unset HF_HUB_OFFLINE.") from error
    except _FAILURES as error:
        raise _failure(doing, state, refused, error) from error
    except (RuntimeError, ValueError) as error:  # what the client makes of a failed thread, and of a card refused
        if not isinstance(error.__cause__, _FAILURES):
            raise
        raise _failure(doing, state, refused, error.__cause__, _first(error)) from error.__cause__


def _failure(doing: str, state: str, refused: str | None, error: BaseException, where: str = "") -> PublishError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if refused is not None and status is not None and status < 500:
        state = refused
    remedy = {
        401: "Log in again with a token that is valid (`hf auth login`), and publish again.",
        403: "Use a token that may write there, and publish again.",
        404: "Check the name and the token, and publish again.",
    }.get(status or 0, "Publish again; what is there already is not sent twice.")
    return PublishError(f"{doing} failed: {where + ' ' if where else ''}{_first(error)} {state} {remedy}")


def read(api: HfApi, repo_id: str) -> Remote | None:
    """Return the repository at its head; None if there is none.

    Args:
        api: the client.
        repo_id: on the Hub.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return None
    assert info.sha is not None
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    hashes = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in tree if isinstance(entry, RepoFile)
    }
    card, recipe = (
        Path(api.hf_hub_download(repo_id, name, revision=info.sha)) if name in hashes else None
        for name in (CARD, RECIPE)
    )
    text, ours = read_card(card) if card else None, _ours(recipe.read_bytes() if recipe else None)
    return Remote(info.sha, bool(info.private), hashes, text, ours)


def check_visibility(remote: Remote, repo_id: str, private: bool) -> None:
    """Refuse a repository whose visibility is not the one asked for.

    Args:
        remote: as it is.
        repo_id: on the Hub.
        private: what was asked for.

    Raises:
        ValueError: it is public and should be private, or the other way round.
    """
    if remote.private == private:
        return
    if private:
        raise ValueError(
            f"`{repo_id}` is public, and private=True was asked for (it is the default). Pass private=False (--public) "
            "to publish there, make it private in its settings, or choose another name. Nothing was sent."
        )
    raise ValueError(
        f"`{repo_id}` is private, and private=False was asked for; publishing does not open it. Make it public in its "
        "settings first, or leave private=False (--public) out. Nothing was sent."
    )


def ensure(api: HfApi, repo_id: str, remote: Remote | None, private: bool) -> Remote:
    """Return the repository, made if there was none.

    Args:
        api: the client.
        repo_id: on the Hub.
        remote: as it was read; None: there was none.
        private: whether a new one is private.

    Raises:
        ConcurrentPushError: somebody else made it, and pushed, since it was read.
    """
    if remote is not None:
        return remote
    with told(f"creating `{repo_id}`", "No file was sent."):
        api.create_repo(repo_id, private=private, exist_ok=True)
        made = read(api, repo_id)
    if made is None:
        raise PublishError(f"`{repo_id}` was created and cannot be read. No file was sent. Check the token's rights.")
    check_visibility(made, repo_id, private)
    if set(made.hashes) - {_GIT}:
        raise ConcurrentPushError(
            f"somebody created `{repo_id}` and pushed to it while this run was being published. Nothing was sent. "
            "Look at what is there, and publish again."
        )
    return made


def commit(
    api: HfApi, repo_id: str, remote: Remote, files: Mapping[str, Path], message: str, hashes: Mapping[str, str]
) -> str:
    """Send what differs in one commit on top of the head that was read; return the commit.

    Args:
        api: the client.
        repo_id: on the Hub.
        remote: the repository as it was read.
        files: all files of the publication.
        message: of the commit.
        hashes: the files' SHA-256 as the manifest has them.

    Raises:
        ConcurrentPushError: the head has moved.
        PublishError: the client failed, or a file changed since it was scanned; the repository is as before.
    """
    empty = set(remote.hashes) <= {_GIT}
    unchanged = f"`{repo_id}` is there, and empty." if empty else f"`{repo_id}` is as it was before."
    with told(f"uploading to `{repo_id}`", unchanged):
        additions = [CommitOperationAdd(name, files[name]) for name in remote.differing(files)]
        for addition in additions:
            name = addition.path_in_repo
            if hashes.get(name, addition.upload_info.sha256.hex()) != addition.upload_info.sha256.hex():
                raise PublishError(f"`{name}` changed while it was being published. {unchanged} Publish again.")
        # An empty list of ignored files, for the repository's own .gitignore could hold one of ours back.
        api.preupload_lfs_files(repo_id, additions, free_memory=False, gitignore_content="")
    deletions = [CommitOperationDelete(name) for name in remote.stale(files)]
    try:
        with told(f"the commit to `{repo_id}`", f"It is in `{repo_id}` as a whole, or not at all.", refused=unchanged):
            made = api.create_commit(
                repo_id, [*additions, *deletions], commit_message=message, parent_commit=remote.head
            )
    except PublishError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (409, 412):
            raise ConcurrentPushError(
                f"somebody pushed to `{repo_id}` while this run was being published. Nothing was overwritten, and "
                "nothing of this run is there. Look at the new commit, and run again."
            ) from error
        raise
    return made.oid


def verify(api: HfApi, repo_id: str, sha: str, folder: Path) -> None:
    """Compare every file of a folder with its hash in a commit.

    Args:
        api: the client.
        repo_id: on the Hub.
        sha: the commit.
        folder: with all files of the publication.

    Raises:
        PublishError: one is missing or differs, or the Hub could not be asked.
    """
    with told(f"checking commit {sha} of `{repo_id}`", "The commit is there as a whole, and was not checked."):
        found = api.verify_repo_checksums(repo_id, revision=sha, local_dir=folder)
    if wrong := [*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths]:
        raise PublishError(
            f"`{wrong[0]}` in commit {sha} of `{repo_id}` is not what was sent ({len(wrong)} such files). Publish "
            "again; if it happens twice, delete the file there first."
        )


def _ours(recipe: bytes | None) -> frozenset[str]:
    try:
        files = json.loads(recipe or b"{}")["published"]["files"]
        return frozenset(str(name) for name in files)
    except (ValueError, RecursionError, KeyError, TypeError):
        return frozenset()


def _is_model_file(name: str) -> bool:
    return name in _MODEL_FILES or name.endswith(".safetensors")


def _is_other_format(name: str) -> bool:
    return any(fnmatchcase(name, kind) for kind in _OTHER_FORMATS)


def _first(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
