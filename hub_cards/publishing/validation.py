"""What can be checked of a staging folder without a network, so that the Hub has nothing left to refuse."""

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCardData, parse_eval_result_entries

from hub_cards.facts import read_facts
from hub_cards.fingerprints import read_header
from hub_cards.paths import is_repo_id
from hub_cards.publishing.staging import ADAPTER, INDEX
from hub_cards.pulling.refusals import leads_elsewhere, names_code
from hub_cards.sections import front_and_body

_FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1[`~]*\s*$", re.DOTALL | re.MULTILINE)
_PICTURES = (
    re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)"),
    re.compile(r"<(?:img|source)\b[^>]*?\b(?:src|srcset)=[\"']([^\"'\s]+)"),
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})*|code|multilingual")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_PICKLE = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")


def validate(folder: str | Path, files: Mapping[str, Path], *, elsewhere: Collection[str] = ()) -> None:
    """Check a staging folder: card, facts, weights, JSON, pictures. Changes nothing.

    Args:
        folder: the staging folder.
        files: its files by name.
        elsewhere: other files of the repository, which the card may show.

    Raises:
        ValueError: the first thing that is wrong, with the file.
    """
    check_weights(files)
    for name, path in files.items():
        if name.endswith(".json"):
            _check_json(name, path)
    _check_shards(files)
    read_facts(folder)
    for name, path in files.items():
        if name.startswith(".eval_results/"):
            _check_results(name, path)
    card = files["README.md"].read_text(encoding="utf-8")
    check_metadata(card)
    for picture in _pictures(card):
        if picture not in files and picture not in elsewhere:
            raise ValueError(
                f"README.md shows `{picture}`, which is not published; put a PNG into the run's `figures` folder, or "
                "remove it from the card."
            )


def check_metadata(card: str) -> None:
    r"""Check a card's metadata by the Hub's rules, as far as they are known.

    Args:
        card: the text of a `README.md`.

    Raises:
        ValueError: a key has a value that the Hub refuses; both are named.

    Example:
        >>> check_metadata("---\nlicense: mit\nbase_model: org/name\n---\n")
    """
    front, _ = front_and_body(card)
    if front is None:
        raise ValueError("README.md has no metadata; expected YAML between two lines of `---` at its beginning.")
    try:
        data = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of README.md are no YAML: {error}. Mend what was added by hand.") from None
    if not isinstance(data, dict):
        raise ValueError(f"the metadata of README.md are a {type(data).__name__}; expected keys and values.")
    for key, value, expected in _misfits(data):
        raise ValueError(f"`{key}` in the metadata of README.md is {value!r}; expected {expected}.")
    try:
        ModelCardData(**{key.replace("-", "_"): value for key, value in data.items()}, ignore_metadata_errors=False)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the metadata of README.md are refused by huggingface_hub: {error}") from None


def _misfits(data: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for key, what in (("base_model", "a model's"), ("datasets", "a data set's")):
        for value in _listed(data.get(key)):
            if not isinstance(value, str) or not is_repo_id(value):
                yield key, value, f"{what} id on the Hub, such as `org/name`"
    for value in _listed(data.get("language")):
        if not isinstance(value, str) or not _LANGUAGE.fullmatch(value):
            yield "language", value, "an ISO 639 code, such as `en`"
    for key in ("tags", "metrics"):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            yield key, values, "a list of strings"
    for key in ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_revision"):
        if key in data and not isinstance(data[key], str):
            yield key, data[key], "a string"
    if data.get("base_model_relation", _RELATIONS[0]) not in _RELATIONS:
        yield "base_model_relation", data["base_model_relation"], f"one of {', '.join(_RELATIONS)}"
    for key in ("model-index", "widget"):
        if key in data and not isinstance(data[key], list):
            yield key, data[key], "a list"
    for value in _numbers(data):
        if not math.isfinite(value):
            yield "model-index", value, "finite numbers"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def _check_json(name: str, path: Path) -> None:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"`{name}` is no JSON ({error}); save the model again.") from None
    if name.endswith("config.json") and (place := names_code(found)):
        raise ValueError(
            f"`{name}` has `{place}`: whoever loads the model would run code from the repository, which is not "
            "published. Use a model whose code is part of transformers, and save it again."
        )
    if name.endswith("config.json") and (place := leads_elsewhere(found)):
        raise ValueError(
            f"`{name}` has `{place}`, which is none of the files that are published, so nobody could load this; "
            "expected names of files of the run only. Save the model and its tokenizer again, or remove the key."
        )


def check_weights(files: Mapping[str, Path]) -> None:
    """Check that all safetensors files are whole, and that no file is a pickle.

    Args:
        files: by name.

    Raises:
        ValueError: one is cut short, damaged, empty, or a pickle.
    """
    for name, path in files.items():
        if _is_pickle(path):
            raise ValueError(
                f"`{name}` is a pickle, which runs code when it is loaded; expected another format. Save weights with "
                "save_pretrained, which writes safetensors, or remove the file."
            )
        if name.endswith(".safetensors"):
            _check_stored(name, path)


def _check_stored(name: str, path: Path) -> None:
    stored = sorted(read_header(path).items(), key=lambda item: (item[1].start, item[1].end))
    if not stored:
        raise ValueError(f"`{name}` holds no tensors; save the model again.")
    for (before, first), (after, second) in itertools.pairwise(stored):
        if first.end != second.start:
            raise ValueError(f"`{name}` is damaged between `{before}` and `{after}`; save the model again.")


def _check_shards(files: Mapping[str, Path]) -> None:
    if ADAPTER[1] in files or INDEX not in files:
        return
    places = json.loads(files[INDEX].read_text(encoding="utf-8"))["weight_map"]
    if "model.safetensors" in files:
        raise ValueError(f"there are `model.safetensors` and `{INDEX}`; remove the one that is of an earlier save.")
    shards = {name: read_header(path) for name, path in files.items() if name.endswith(".safetensors")}
    for tensor, shard in places.items():
        if tensor not in shards.get(shard, {}):
            raise ValueError(
                f"`{INDEX}` expects `{tensor}` in `{shard}`, which does not hold it; save the model again."
            )
    if unused := sorted(set(shards) - set(places.values())):
        raise ValueError(f"`{unused[0]}` is not in `{INDEX}`; remove it if it is of an earlier save.")


def _check_results(name: str, path: Path) -> None:
    try:
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert all(isinstance(entry, EvalResultEntry) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"`{name}` holds no evaluation results as the Hub reads them ({error}); remove it.") from None


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return _PICKLE.match(file.read(4)) is not None


def _pictures(card: str) -> Iterator[str]:
    """Return the pictures of the card that lie in the repository."""
    text = _FENCED.sub("", card)
    for pattern in _PICTURES:
        for found in pattern.findall(text):
            if not re.match(r"[a-z][a-z0-9+.-]*:|//|#", found, re.IGNORECASE):
                yield found.removeprefix("./")
