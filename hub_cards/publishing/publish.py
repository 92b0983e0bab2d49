"""A run's folder to a repository on the Hub: staged, scanned, licensed, checked, then one guarded commit, verified."""

import errno
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi

from hub_cards.card import write_card
from hub_cards.facts import RECIPE, RunFacts, read_facts
from hub_cards.metadata import eval_results
from hub_cards.publishing import bases, remote
from hub_cards.publishing.gates import check_gates
from hub_cards.publishing.licensing import settle_licence
from hub_cards.publishing.own_files import write_manifest, write_own
from hub_cards.publishing.publication import Publication, compared
from hub_cards.publishing.ranks import on_first_rank
from hub_cards.publishing.remote import ConcurrentPushError, PublishError, Remote, told
from hub_cards.publishing.staging import STAGING, Staged, stage
from hub_cards.publishing.validation import check_weights, validate
from hub_cards.scanning.scan import check
from hub_cards.tokens import check_token

__all__ = ["ConcurrentPushError", "Publication", "PublishError", "publish"]

_NOTHING_SENT = "Nothing was sent."


def publish(
    run_dir: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    merge: bool = False,
    require_positive_transfer: bool = False,
    min_retention: float | None = None,
    allow: tuple[str, ...] = (),
    token: str | None = None,
    commit_message: str | None = None,
) -> Publication:
    """Publish a finished run, and return what is on the Hub now.

    Only files on a list of allowed names are published, never a pickle. They are scanned for tokens, keys, addresses
    and local paths; the licence and the card are made; all is checked on this machine; then one commit goes on top of
    the head that was read, and what arrived is compared with what was sent. Where anything fails before that commit,
    the repository is as it was. Publishing again what is there already makes no commit. Of several processes the first
    publishes, and the others wait.

    Args:
        run_dir: the run's `output_dir`, with `recipe.json`, `trainer_state.json` and the weights.
        repo_id: `owner/name`. It is made if it does not exist.
        private: whether a new repository is private. One that exists has to be so already, or not.
        dry_run: send nothing; the result holds the files, the card, and the differences to what is there.
        license: the Hub's identifier of the licence that you give; None: what the repository's card states already.
        base_model: the Hub id of the base, where the run loaded it from a folder.
        base_revision: the base's commit, where the run did not record it.
        merge: publish the adapter merged into its base, as a whole model.
        require_positive_transfer: refuse unless the run's comparison says that transfer was positive.
        min_retention: refuse unless what the base could do was retained at least so far, as `ForgettingMonitor`
            measured it at the end; what the run itself asked for holds in any case.
        allow: strings that the scan would refuse and that may be public.
        token: of the Hub; None: the one that is logged in.
        commit_message: the commit's title.

    Raises:
        FileNotFoundError: the run's folder lacks its facts or its weights.
        ValueError: the run is not finished or did not pass a gate, the licences contradict each other
            (`LicenceError`), the scan found something (`SecretFoundError`), a file is not what it should be, or the
            base is not known for certain.
        ConcurrentPushError: somebody else pushed meanwhile.
        PublishError: the Hub refused, could not be reached, or holds something else than what was sent.

    Example:
        >>> publish("no/such/run", "org/name")
        Traceback (most recent call last):
            ...
        FileNotFoundError: `no/such/run` holds no recipe.json; expected the output_dir of a run: ...
    """
    check_token(token)
    action = partial(
        _publish,
        Path(run_dir),
        repo_id,
        private=private,
        dry_run=dry_run,
        license=license,
        base=(base_model, base_revision),
        merge=merge,
        require_positive_transfer=require_positive_transfer,
        min_retention=min_retention,
        allow=allow,
        api=HfApi(token=token),
        message=commit_message,
    )
    return on_first_rank(action)


def _publish(
    run: Path,
    repo_id: str,
    *,
    private: bool,
    dry_run: bool,
    license: str | None,
    base: tuple[str | None, str | None],
    merge: bool,
    require_positive_transfer: bool,
    min_retention: float | None,
    allow: tuple[str, ...],
    api: HfApi,
    message: str | None,
) -> Publication:
    facts = replace(read_facts(run), repo_id=repo_id)
    check_gates(
        run, repo_id, facts, merge=merge, min_retention=min_retention,
        require_positive_transfer=require_positive_transfer,
    )  # fmt: skip
    # A hash below a tensor's name that ends in `cls_token` reads like the value of a secret.
    allow += tuple(facts.base.tensors.values())
    arguments = {"repository": repo_id, "message": message, "licence": license, "base": base[0], "revision": base[1]}
    check({f"({name})": value.encode() for name, value in arguments.items() if value is not None}, allow=allow)
    with _staging_folder(run) as folder:
        staged = stage(run, folder, facts)
        check_weights(staged.files)
        write_own(run, folder, facts)
        check(staged.files, allow=allow)  # before the Hub is asked for anything that these files name
        with told(f"reading `{repo_id}`", _NOTHING_SENT):
            there = remote.read(api, repo_id)
        if there is not None:
            remote.check_visibility(there, repo_id, private)
        with told("reading the base", _NOTHING_SENT):
            weights = {name: path for name, path in staged.files.items() if name.endswith(".safetensors")}
            facts = bases.settle(facts, api, weights, local=_local_base(run), base_model=base[0], base_revision=base[1])
        with told("reading the licences", _NOTHING_SENT):
            facts = settle_licence(facts, api, license, there)
        facts = replace(facts, merged=merge or facts.merged)
        staged = _stage_again(run, folder, facts, api, merge=merge)
        hashes = _complete(run, folder, facts, there)
        files = staged.files
        check(files, allow=allow)
        validate(folder, files, elsewhere=set(there.hashes) if there else ())
        if there and (strangers := there.strangers(files)):
            raise ValueError(
                f"`{repo_id}` holds `{strangers[0]}` of another model, which would be loaded beside or instead of this "
                "one; publish did not put it there, so it does not delete it. Delete it, or choose another name."
            )
        result = compared(repo_id, f"{api.endpoint}/{repo_id}", staged, there)
        if dry_run:
            return result
        if not result.changed and there is not None:
            return replace(result, commit=there.head)
        made = remote.ensure(api, repo_id, there, private)
        sha = remote.commit(api, repo_id, made, files, message or f"Publish {facts.repo_id}", hashes)
        remote.verify(api, repo_id, sha, folder)
        return replace(result, commit=sha)


@contextmanager
def _staging_folder(run: Path) -> Iterator[Path]:
    """A fresh folder on the run's own disk, where weights can be linked; removed in the end."""
    place = run if os.access(run, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=place))
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"the files to be published do not fit on the disk beside `{run}`; nothing was sent. Free some space, and "
            "publish again",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _local_base(run: Path) -> Path | None:
    name = json.loads((run / RECIPE).read_text(encoding="utf-8"))["model"]["name_or_path"]
    return Path(name) if name else None


def _stage_again(run: Path, folder: Path, facts: RunFacts, api: HfApi, *, merge: bool) -> Staged:
    """Fill the staging folder from the start, now that the base is known; with the whole model if that is asked for."""
    shutil.rmtree(folder)
    if not merge:
        return stage(run, folder, facts)
    with _staging_folder(run) as whole:
        merge_adapter = importlib.import_module("hub_cards.pulling.merge").merge_adapter  # torch is loaded here only
        pinned = facts.base.revision if facts.base.name else None
        merge_adapter(run, whole, base=facts.base.name, revision=pinned, token=api.token)
        return stage(run, folder, facts, merged=whole)


def _complete(run: Path, folder: Path, facts: RunFacts, there: Remote | None) -> dict[str, str]:
    """Write facts, card, pictures and results into the staging folder; return the hashes of its manifest."""
    write_own(run, folder, facts)
    published = read_facts(folder)  # the card says what the published files say
    write_card(published, folder, existing=there.card if there else None)
    for name, text in eval_results(published).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return write_manifest(folder, facts)
