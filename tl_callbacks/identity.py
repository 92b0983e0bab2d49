"""Which model a run started from and which data it saw, as `recipe.json` says it. Nothing here asks the network."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers import Trainer

from tl_callbacks.callbacks import as_json
from tl_callbacks.fingerprints import base_model, fingerprint
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name, true_size

_SHA = re.compile("[0-9a-f]{40}")
_HAS_LABELS = re.compile("Classification|Detection|Segmentation")  # every other config has two labels that mean nothing
_WEIGHTS = {".safetensors", ".bin"}


def pin(model: nn.Module, revision: str) -> None:
    """Write the commit of the base into the adapters of a model that name none, so that they are loaded onto it again.

    Args:
        model: a model with adapters; another is left as it is.
        revision: the commit of the base on the Hub.

    Raises:
        ValueError: `revision` is no full sha, or an adapter names another one.

    Example:
        >>> pin(nn.Linear(2, 2), "0123456789" * 4)
    """
    if not _SHA.fullmatch(revision):
        raise ValueError(
            f"`base_revision` is `{revision}`; expected the sha of a commit on the Hub, 40 hexadecimal digits, as a "
            "branch moves on. huggingface_hub.resolve_revision(name, revision=...).resolved gives it."
        )
    for name, config in _adapters(model).items():
        if _SHA.fullmatch(config.revision or "") and config.revision != revision:
            raise ValueError(
                f"adapter `{name}` names revision {config.revision} of its base, `base_revision` is {revision}; "
                "expected the same. Give the one that the base was loaded from."
            )
        config.revision = revision


def origin(model: nn.Module, groups: LayerGroups | None, revision: str | None, *, hashed: bool) -> dict[str, Any]:
    """Return what training starts from: class, name, revision, dtype and fingerprint of the base.

    Call it before anything trains or is sharded.

    Args:
        model: the model as the Trainer has it.
        groups: its layer groups; the head is left out of the fingerprint's digest.
        revision: the commit of the base, where the script knows it.
        hashed: whether to compute the fingerprint, which one rank needs to do.
    """
    base = base_model(model)
    name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
    local = name is not None and os.path.isdir(name)
    head = frozenset(groups[groups.head].parameters) if groups is not None and groups.head is not None else frozenset()
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), None)
    return {
        "class": type(model).__name__,
        "base_class": type(base).__name__,
        "name_or_path": name,
        "local": local,
        "revision": None if name is None else revision or (None if local else _known_revision(model, name)),
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        "fingerprint": fingerprint(model, head) if hashed and name is not None else None,
    }


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return what the model is: its sizes, its labels where its task has them, its adapters."""
    base, adapters = base_model(model), _adapters(model)
    config = getattr(base, "config", None)
    facts: dict[str, Any] = {}
    if _HAS_LABELS.search(type(base).__name__) and getattr(config, "id2label", None):
        facts["num_labels"] = int(config.num_labels)  # type: ignore[union-attr]
        facts["id2label"] = {str(key): str(label) for key, label in config.id2label.items()}  # type: ignore[union-attr]
        facts["problem_type"] = getattr(config, "problem_type", None)
    return {
        **facts,
        "num_parameters": sum(true_size(parameter) for parameter in parameters_by_name(model).values()),
        "trainable_parameters": sum(parameter.numel() for parameter in openable(model).values()),
        "adapters": {name: as_json(one.to_dict()) for name, one in adapters.items()} if adapters else None,
    }


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """Return rows and fingerprint of the Trainer's data sets: `train`, and `eval` or `eval_<name>` for each of several.

    The fingerprint is that of the `datasets` package, which depends on how the data were made besides their content.
    """
    held = trainer.eval_dataset
    several = isinstance(held, Mapping) and not hasattr(held, "column_names")
    evaluated = {f"eval_{name}": rows for name, rows in held.items()} if several else {"eval": held}  # type: ignore[union-attr]
    sets = {"train": trainer.train_dataset, **evaluated}
    return {name: _rows(rows) for name, rows in sets.items() if rows is not None}


def _rows(rows: Any) -> dict[str, Any]:
    try:
        count = len(rows)
    except (TypeError, NotImplementedError):  # a stream
        count = None
    found = getattr(rows, "_fingerprint", None)
    return {"rows": count, "fingerprint": found if isinstance(found, str) else None}


def _adapters(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def _known_revision(model: nn.Module, name: str) -> str | None:
    """Return the commit of a model on the Hub, None unless it is certain: what an adapter names, or all that is here.

    transformers does not keep the commit that it loaded (5.23). Where the cache holds one whole snapshot of the
    repository, it came from that one.
    """
    for config in _adapters(model).values():
        if config.base_model_name_or_path == name and _SHA.fullmatch(config.revision or ""):
            return str(config.revision)
    try:
        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    except ValueError:  # no name of a repository
        return None
    snapshots = list(folder.iterdir()) if folder.is_dir() else []
    if len(snapshots) != 1 or not _SHA.fullmatch(snapshots[0].name):
        return None
    whole = any(file.suffix in _WEIGHTS and file.exists() for file in snapshots[0].rglob("*"))
    return snapshots[0].name if whole else None
