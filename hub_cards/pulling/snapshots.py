"""The files of a published run and of its base, from the Hub or its cache: pinned, checked, no pickles, no code."""

from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    hf_hub_download,
    list_repo_files,
    resolve_revision,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the HTTP client it uses, under its stable name

from hub_cards.facts import RECIPE
from hub_cards.fingerprints import file_sha256, read_header
from hub_cards.pulling.refusals import (
    INDEX,
    PICKLES,
    Snapshot,
    forget,
    read_json,
    refuse_code,
    refuse_pickles,
    shards_of,
)
from hub_cards.tokens import check_token

CARD = "README.md"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def resolve(repo_id: str, revision: str | None, token: str | None) -> str:
    """Return the commit that a branch or tag stands for now; without a connection, the last one known to the cache.

    Raises:
        PermissionError: the repository does not exist for this token.
        ValueError: it has no such revision, or the token cannot be one.
        ConnectionError: the Hub cannot be reached, and the cache does not know.
    """
    check_token(token)
    try:
        return resolve_revision(repo_id, revision=revision, token=token).resolved
    except (RevisionResolutionError, httpx.HTTPError) as error:
        if denied := _denied(error, repo_id, revision or "main"):
            raise denied from error
        raise ConnectionError(
            f"the commit of `{repo_id}` at {revision or 'main'} is not in the cache, and the Hub did not say: "
            f"{_line(error)} Connect, or pass as revision= a commit that was pulled before."
        ) from error


def fetch(repo_id: str, revision: str, name: str, token: str | None, *, optional: bool = False) -> Path | None:
    """Return the path of a file at a commit, from the cache or downloaded; None if it is optional and not there.

    Raises:
        FileNotFoundError: it is not in the cache and the Hub cannot be reached, or the commit has no such file.
        PermissionError: the repository is gated or private.
        OSError: the download failed.
    """
    cached = try_to_load_from_cache(repo_id, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        if cached is not _CACHED_NO_EXIST:
            return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        reason = error.__cause__ or error
        why = (
            "offline mode is on."
            if isinstance(reason, OfflineModeIsEnabled)
            else f"the Hub did not answer: {_line(reason)}"
        )
        raise FileNotFoundError(
            f"`{name}` of `{repo_id}` at {revision} is not in the cache, and {why} Connect, and call again."
        ) from error
    except RemoteEntryNotFoundError:
        pass
    except (httpx.HTTPError, OSError) as error:
        if denied := _denied(error, repo_id, revision):
            raise denied from error
        raise OSError(
            f"`{name}` of `{repo_id}` at {revision} could not be downloaded: {_line(error)} The cache has "
            "no part of it; call again."
        ) from error
    if optional:
        return None
    raise FileNotFoundError(f"`{repo_id}` at {revision} has no `{name}`, which is needed; choose another revision.")


def fetch_run(repo_id: str, revision: str | None, token: str | None) -> Snapshot:
    """Return the snapshot of a published run, with the files of its manifest and nothing else asked for.

    Raises:
        ValueError: the repository was not published by `hub_cards`, or holds pickles or code.
        OSError: a file is not what the manifest says; what is wrong is taken out of the cache. Also all of `fetch`.
    """
    sha = resolve(repo_id, revision, token)
    recipe = fetch(repo_id, sha, RECIPE, token, optional=True)
    if recipe is None:
        raise ValueError(_foreign(repo_id, sha, f"it has no {RECIPE}", token))
    manifest = _manifest(read_json(recipe))
    if manifest is None:
        raise ValueError(_foreign(repo_id, sha, f"its {RECIPE} lists no published files", token))
    snapshot = Snapshot(recipe.parent, repo_id, sha)
    refuse_pickles(snapshot, list(manifest))
    for name, (size, sha256) in manifest.items():
        path = fetch(repo_id, sha, name, token)
        assert path is not None
        found = path.stat().st_size
        if found != size or file_sha256(path) != sha256:
            forget(path)
            what = f"has {found} bytes, expected {size}" if found != size else f"has not the SHA-256 {sha256}"
            raise OSError(
                f"`{name}` of {snapshot} {what}, as {RECIPE} says: it was cut short or changed. It is out of the cache "
                "now; call again. If that does not help, it was changed on the Hub."
            )
    fetch(repo_id, sha, CARD, token, optional=True)
    refuse_code(snapshot)
    return snapshot


def fetch_base(repo_id: str, revision: str, token: str | None) -> Snapshot:
    """Return the snapshot of a base: its configuration, and its weights where they are safetensors.

    Raises:
        ValueError: the weights are there as pickles only, or the configuration names code of its own.
        OSError: a file is cut short; it is taken out of the cache. Also all of `fetch`.
    """
    config = fetch(repo_id, revision, CONFIG, token)
    assert config is not None
    snapshot = Snapshot(config.parent, repo_id, revision)
    refuse_code(snapshot)
    fetch(repo_id, revision, "generation_config.json", token, optional=True)
    if weights := fetch(repo_id, revision, WEIGHTS, token, optional=True):
        shards = [weights]
    elif fetch(repo_id, revision, INDEX, token, optional=True):
        shards = [path for name in shards_of(snapshot) if (path := fetch(repo_id, revision, name, token))]
    else:
        refuse_pickles(snapshot, _listing(repo_id, revision, token))
        raise FileNotFoundError(f"{snapshot} has no weights: neither {WEIGHTS} nor {INDEX}; choose another base.")
    for shard in shards:
        _check_header(shard, snapshot)
    return snapshot


def local_snapshot(folder: Path) -> Snapshot:
    """Return the snapshot that a local folder is, if its weights are no pickles and its files name no code."""
    snapshot = Snapshot(folder)
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "training_args.bin"]
    if not any(name.endswith(".safetensors") for name in names):
        refuse_pickles(snapshot, [name for name in names if name.endswith(PICKLES)])
    refuse_code(snapshot)
    return snapshot


def _manifest(recipe: Any) -> dict[str, tuple[int, str]] | None:
    """Return file to size and SHA-256; None if the recipe was not published."""
    try:
        files = recipe["published"]["files"]
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _check_header(path: Path, snapshot: Snapshot) -> None:
    try:
        read_header(path)
    except ValueError as error:
        forget(path)
        raise OSError(f"{error} It belongs to {snapshot} and is out of the cache; call again.") from None


def _listing(repo_id: str, revision: str, token: str | None) -> list[str]:
    """Return the names of all files, for the words of an error; none if the Hub does not say."""
    try:
        return list(list_repo_files(repo_id, revision=revision, token=token))
    except (httpx.HTTPError, OSError):
        return []


def _foreign(repo_id: str, sha: str, why: str, token: str | None) -> str:
    names = _listing(repo_id, sha, token)
    adapter = "adapter_config.json" in names
    pickled = any(name.endswith(PICKLES) for name in names) and not any(n.endswith(".safetensors") for n in names)
    return (
        f"`{repo_id}` at {sha} was not published by hub_cards: {why}, so neither its base nor its files can be checked."
        f"{' Its weights are pickles only, which run what others wrote when they are read.' if pickled else ''} "
        f"If you trust it, load it with {'peft.AutoPeftModel' if adapter else 'transformers.AutoModel'} yourself."
    )


def _denied(error: Exception, repo_id: str, revision: str) -> Exception | None:
    """Return what to raise where the Hub answered that it will not give this; None for all other failures."""
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"`{repo_id}` has no revision `{revision}`; expected a branch, a tag or a commit of it.")
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"`{repo_id}` is gated, and this token has no access; ask for it on its page, and pass token= or log in."
        )
    if isinstance(error, RepositoryNotFoundError):
        return PermissionError(
            f"`{repo_id}` is not on the Hub, or is private; check its name, and pass token= or log in with "
            "`hf auth login`."
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return PermissionError(
            f"the Hub refuses `{repo_id}`: {_line(error)} Pass another token=, or log in (`hf auth login`)."
        )
    return None


def _line(error: object) -> str:
    """Return the words of a client's error on one line, with its end."""
    return f"{' '.join(str(error).split()).rstrip('.')}."
