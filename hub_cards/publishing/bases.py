"""The identity of a run's base: its name and commit on the Hub, proven by the contents of its checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from hub_cards.facts import Base, RunFacts
from hub_cards.fingerprints import read_header
from hub_cards.paths import is_repo_id
from hub_cards.publishing.proof import Proof, prove

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PEFT = "base_model.model."


def settle(
    facts: RunFacts,
    api: HfApi,
    weights: Mapping[str, Path],
    *,
    local: Path | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
) -> RunFacts:
    """Return the facts with the base's commit, and whether the base was proven to be the one that was trained on.

    The hashes that the run recorded are compared with the safetensors files of that commit, from the cache or
    downloaded. A commit that the run itself recorded is believed where nothing can be compared.

    Args:
        facts: of the run.
        api: the client.
        weights: the run's own safetensors files by name.
        local: the folder that the base was loaded from, if it was one.
        base_model: the Hub id of a base that was loaded from a folder.
        base_revision: commit, branch or tag of the base, where the run did not record one.

    Raises:
        ValueError: the base has no commit for certain, its contents are others, or an adapter could not be used by
            anybody else: its base is random, or has random parts that the adapter does not bring along.
    """
    _check_statistics(facts, weights)
    base = facts.base
    name = _name(base, base_model)
    if name is None:
        return _settle_local(facts, weights, local)
    info = _info(api, name, base.revision or base_revision)
    if base.revision and base_revision and _info(api, name, base_revision).sha != info.sha:
        raise ValueError(
            f"base_revision is `{base_revision}`, but the run recorded commit {base.revision} of `{name}`; expected "
            "the same. Leave base_revision out."
        )
    found = _prove(facts, _download(api, name, info) if base.tensors else [], weights)
    claimed = "the commit that the run recorded" if base.revision else "base_revision" if base_revision else None
    if found is not None and found.different:
        raise ValueError(
            f"`{name}` at {info.sha} is not the base that was trained on: `{found.different[0]}` differs"
            + (f", and {len(found.different) - 1} more" if len(found.different) > 1 else "")
            + f". Expected the recorded contents at {claimed or 'main'}. Give base_revision, the commit that was loaded"
            + (", or the right base_model." if base_model else ".")
        )
    holds = found is not None and found.holds
    if not holds and claimed is None:
        raise ValueError(
            f"the commit of the base `{name}` is not known: the run did not record it, and its weights cannot be "
            "compared with those on the Hub (no fingerprint, no safetensors there, or tensors that loading converted). "
            "Give base_revision, the commit that was loaded; the card then says that nobody has verified it."
        )
    if holds:
        assert found is not None
        _check_complete(facts, found)
    verified = True if holds else None if base.revision else False
    return replace(facts, base=replace(base, name=name, folder=None, revision=info.sha, verified=verified))


def _name(base: Base, base_model: str | None) -> str | None:
    if base_model is None:
        return base.name
    if not is_repo_id(base_model):
        raise ValueError(f"base_model is {base_model!r}; expected a model's id on the Hub, such as `org/name`.")
    if base.name not in (None, base_model) or (base.name is None and base.folder is None):
        start = f"`{base.name}`" if base.name else "random weights"
        raise ValueError(
            f"base_model is `{base_model}`, but the run started from {start}; it is for a base that was loaded from a "
            "folder. Leave it out."
        )
    return base_model


def _info(api: HfApi, name: str, revision: str | None) -> ModelInfo:
    try:
        return api.model_info(name, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise ValueError(
            f"the base `{name}`{f' at `{revision}`' if revision else ''} cannot be read on the Hub "
            f"({type(error).__name__}); expected a repository and a commit that your token may read. Check the name, "
            "base_revision and the token."
        ) from None


def _download(api: HfApi, name: str, info: ModelInfo) -> list[Path]:
    """Return the checkpoint's safetensors files at a commit, in the cache; none where it has none."""
    there = {sibling.rfilename for sibling in info.siblings or ()}

    def fetch(file: str) -> Path:
        return Path(api.hf_hub_download(name, file, revision=info.sha))

    if _WHOLE in there:
        return [fetch(_WHOLE)]
    if _INDEX in there:
        return [fetch(shard) for shard in sorted(set(json.loads(fetch(_INDEX).read_text())["weight_map"].values()))]
    return []


def _settle_local(facts: RunFacts, weights: Mapping[str, Path], local: Path | None) -> RunFacts:
    base = facts.base
    if not facts.adapters:
        return facts
    if base.folder is None:
        raise ValueError(
            "the adapter's base had random weights, which nobody else has; expected a base from a folder or the Hub. "
            "Publish the whole model instead: merge=True."
        )
    if base.digest is None:
        raise ValueError(
            f"the adapter's base, the folder `{base.folder}`, has neither a name on the Hub nor a fingerprint; nobody "
            "could tell it from another. Give base_model and base_revision, or publish the whole model: merge=True."
        )
    files = sorted(local.glob("*.safetensors")) if local is not None and local.is_dir() else []
    found = _prove(facts, files, weights)
    if found is not None and found.different:
        raise ValueError(
            f"the folder `{base.folder}` no longer holds the base that was trained on: `{found.different[0]}` differs. "
            "Put the earlier weights back, or publish from where they are."
        )
    if found is not None and found.holds:
        _check_complete(facts, found)
    return facts


def _prove(facts: RunFacts, files: list[Path], weights: Mapping[str, Path]) -> Proof | None:
    if not files or not facts.base.tensors:
        return None
    own = {name: tensor.shape for path in weights.values() for name, tensor in read_header(path).items()}
    if facts.adapters:
        return prove(facts.base.tensors, files, brought={name.removeprefix(_PEFT) for name in own})
    return prove(facts.base.tensors, files, brought=facts.head_parameters, shapes=own)  # a head may have been made anew


def _check_statistics(facts: RunFacts, weights: Mapping[str, Path]) -> None:
    """Refuse an adapter of a base whose running statistics moved in training, frozen or not, and are in no file."""
    brought = {name.removeprefix(_PEFT) for path in weights.values() for name in read_header(path)}
    moved = sorted(name for name in facts.base.tensors if name.endswith(".running_mean") and name not in brought)
    if facts.adapters and moved:
        raise ValueError(
            f"`{moved[0]}`{f' and {len(moved) - 1} more' if len(moved) > 1 else ''} of the base moved in training, as "
            "running statistics do, and the adapter's file does not hold them: nobody could build this model again. "
            "Train with the normalisation layers in `modules_to_save` of the PEFT configuration."
        )


def _check_complete(facts: RunFacts, found: Proof) -> None:
    """Refuse an adapter whose base had random tensors that neither its checkpoint nor the adapter's file holds."""
    if facts.adapters and found.absent:
        names = ", ".join(f"`{name}`" for name in found.absent[:5]) + (", …" if len(found.absent) > 5 else "")
        modules = sorted({name.rpartition(".")[0] for name in found.absent})
        raise ValueError(
            f"{names} of the base {'was' if len(found.absent) == 1 else 'were'} random when training began, and not in "
            "the adapter's file: nobody could build this model again. Train with what is missing in the adapter: "
            f"modules_to_save={modules[:5]} in the PEFT configuration."
        )
