"""Which commit of the Hub a name stands for now, so that all parts of a run are loaded from one and the same."""

from pathlib import Path

import huggingface_hub


def resolved(name: str, revision: str | None = None, *, repo_type: str = "model") -> str | None:
    """Return the sha of a revision on the Hub, None for a local folder.

    Without a network, or with HF_HUB_OFFLINE=1, it is the one that the local cache knows the revision by.

    Args:
        name: Hub id or local folder.
        revision: branch, tag or commit; None: the default branch.
        repo_type: `model` or `dataset`.

    Raises:
        huggingface_hub.errors.RevisionResolutionError: the Hub cannot be reached and the cache does not know it.
        huggingface_hub.errors.RepositoryNotFoundError: there is none of this name, or it is private.

    Example:
        >>> resolved("x/y", "0123456789" * 4)
        '0123456789012345678901234567890123456789'
    """
    if Path(name).is_dir():
        return None
    return huggingface_hub.resolve_revision(name, revision=revision, repo_type=repo_type).resolved
