"""The JSON files of a staging folder that are written anew: no local path, the base's identity, the head's names."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hub_cards.facts import RECIPE, STATE, RunFacts
from hub_cards.fingerprints import file_sha256
from hub_cards.paths import is_repo_id, without_paths

ARGUMENTS, ADAPTER_CONFIG = "training_args.json", "adapter_config.json"
_NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_SHA = re.compile("[0-9a-f]{40}")


def write_own(run_dir: str | Path, target: str | Path, facts: RunFacts) -> None:
    """Write `recipe.json`, `trainer_state.json`, `training_args.json` and the configurations into a staging folder.

    Can be called again when more is known of the base or the licence.

    Args:
        run_dir: the run's folder, read only.
        target: the staging folder.
        facts: of the run, with `repo_id`, `licence`, `merged`, and the base as far as they are known.

    Raises:
        ValueError: `adapter_config.json` names another base than the run.
    """
    run, folder = Path(run_dir), Path(target)
    recipe = _read(run / RECIPE)
    model = recipe["model"]
    path = model["name_or_path"] if facts.base.folder or model.get("local") else None
    model |= _model(facts)
    for config in (model["adapters"] or {}).values():
        config |= {"base_model_name_or_path": facts.base.name, "revision": _sha(facts)}
    if recipe.get("data") and facts.data is not None:
        recipe["data"] |= {"local": facts.data.local, "license": facts.data.license}
    if recipe.get("results"):  # the schema has numbers there, and JSON has none that are not finite
        recipe["results"] = {
            split: {key: value for key, value in found.items() if math.isfinite(value)}
            for split, found in recipe["results"].items()
        }
    recipe["published"] = _published(facts, {})
    _write(folder / RECIPE, without_paths(recipe))
    _write(folder / STATE, without_paths(_read(run / STATE)))
    _write(folder / ARGUMENTS, without_paths(recipe["training_arguments"]))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = _read(folder / name)
            if (mended := _without_base(found, path, facts.base.name)) != found:
                _write(folder / name, mended)
    if (folder / ADAPTER_CONFIG).is_file():
        _write(folder / ADAPTER_CONFIG, _adapter_config(_read(run / ADAPTER_CONFIG), path, facts))


def write_manifest(target: str | Path, facts: RunFacts) -> dict[str, str]:
    """Write the sizes and hashes of all other files of a staging folder into its `recipe.json`; return the hashes.

    Args:
        target: the staging folder, complete.
        facts: of the run.
    """
    folder = Path(target)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in (RECIPE, "README.md")
    }
    _write(folder / RECIPE, {**_read(folder / RECIPE), "published": _published(facts, files)})
    return {name: str(entry["sha256"]) for name, entry in files.items()}


def _model(facts: RunFacts) -> dict[str, Any]:
    base = facts.base
    return {
        "name_or_path": base.name or base.folder,
        "local": base.name is None and base.folder is not None,
        "revision": _sha(facts),
        "license": base.license,
    }


def _sha(facts: RunFacts) -> str | None:
    revision = facts.base.revision
    return revision if facts.base.name and revision and _SHA.fullmatch(revision) else None


def _published(facts: RunFacts, files: Mapping[str, Any]) -> dict[str, Any]:
    licence = asdict(facts.licence) if facts.licence else None
    return {
        "repo_id": facts.repo_id,
        "merged": facts.merged,
        "licence": {**licence, "notes": list(licence["notes"])} if licence else None,
        "base_verified": facts.base.verified,
        "files": dict(files),
    }


def _adapter_config(found: dict[str, Any], path: str | None, facts: RunFacts) -> dict[str, Any]:
    """Return PEFT's configuration with the base's identity, pinned, and what the head needs to be built again.

    The head's description lies inside `auto_mapping`, which PEFT reads only where `task_type` is null, and then two of
    its keys. At the top level PEFT warns of keys that it does not know, and asks for an upgrade.
    """
    named = found.get("base_model_name_or_path")
    if _is_same(named, path) or named is None:
        named = facts.base.name
    elif named != facts.base.name and is_repo_id(named) and facts.base.name:
        raise ValueError(
            f"{ADAPTER_CONFIG} names the base `{named}`, {RECIPE} `{facts.base.name}`; expected the same. The folder "
            "holds files of two runs: save the model again, or publish another folder."
        )
    head = {
        "base_model_class": facts.base_class or facts.model_class,
        "parent_library": "transformers",
        **(found.get("auto_mapping") or {}),
        "num_labels": facts.num_labels,
        "id2label": dict(facts.id2label) or None,
        "label2id": {label: int(number) for number, label in facts.id2label.items()} or None,
        "problem_type": facts.problem_type,
    }
    return {
        **found,
        "base_model_name_or_path": named,
        "revision": _sha(facts),
        "inference_mode": True,
        "auto_mapping": {key: value for key, value in head.items() if value is not None},
    }


def _without_base(value: Any, path: str | None, name: str | None) -> Any:
    """Return a configuration in which the base's local path is its Hub id, or gone."""
    if isinstance(value, list):
        return [_without_base(item, path, name) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if key not in _NAMES or not _is_same(item, path):
            found[key] = _without_base(item, path, name)
        elif name is not None:
            found[key] = name
    return found


def _is_same(value: object, path: str | None) -> bool:
    return isinstance(value, str) and path is not None and os.path.normpath(value) == os.path.normpath(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"`{path.name}` is no JSON ({error}); save the model again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"`{path.name}` is a JSON {type(found).__name__}, expected an object; save the model again.")
    return found


def _write(path: Path, value: Any) -> None:
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Return a JSON value with null for numbers that are none, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
