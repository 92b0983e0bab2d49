"""What a Hub reads out of a card: whether its metadata is valid, and the tags by which the repository is found."""

import json
import re
from collections.abc import Callable

import yaml

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"(?!.*(--|\.\.))([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII)
RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m"
    " afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0"
    " cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0"
    " cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0"
    " cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0"
    " gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl"
    " apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl"
    " lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3"
    " llama4 grok2-community gemma unknown other"
)
LICENCES = frozenset(_LICENCES.split())


def metadata(readme: str) -> object:
    """The parsed front matter of a card, None without one. Raises yaml.YAMLError where it is no YAML."""
    match = FRONT_MATTER.match(readme)
    return yaml.safe_load(match[1]) if match else None


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def validate(readme: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) in the Hub's words, as far as they are known."""
    try:
        data = metadata(readme)
    except yaml.YAMLError as error:
        return [f"Invalid YAML metadata: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping of keys to values"], []
    errors: list[str] = []

    def each(key: str, valid: Callable[[object], bool], complaint: str) -> None:
        for value in _list(data.get(key)):
            if not valid(value):
                errors.append(f'"{key}" with value "{value}" is not valid. {complaint}')

    each("base_model", is_repo_id, "Use a model id from https://hf.co/models.")
    each("datasets", is_repo_id, "Use a dataset id from https://hf.co/datasets.")
    each("license", lambda value: value in LICENCES, "Use a license identifier of https://hf.co/docs/hub/licenses.")
    each("language", _is_language, "It must be an ISO 639-1, 639-2 or 639-3 code, or a special value.")
    arrays, strings = ("widget", "tags", "model-index"), ("library_name", "pipeline_tag", "license_name")
    errors += [f'"{key}" must be an array' for key in arrays if key in data and not isinstance(data[key], list)]
    errors += [f'"{key}" must be a string' for key in strings if key in data and not isinstance(data[key], str)]
    for key in ("tags", "metrics"):
        values = enumerate(_list(data.get(key)))
        errors += [f'"{key}[{n}]" must be a string' for n, value in values if not isinstance(value, str)]
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    errors += [error for n, entry in enumerate(_list(data.get("model-index"))) for error in _index_errors(n, entry)]
    try:
        json.dumps(data, allow_nan=False, default=str)
    except ValueError:
        errors.append("metadata holds a number that is not finite")
    return errors, []


def _is_language(value: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[a-z]{2,3}(-[a-zA-Z]{2,8})*|code|multilingual", value))


def is_repo_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 96 and REPO_ID.fullmatch(value) is not None


def _index_errors(n: int, entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return [f'"model-index[{n}]" must be an object']
    missing = [] if isinstance(entry.get("name"), str) else [f'"model-index[{n}].name" is required']
    if not isinstance(entry.get("results"), list):
        return [*missing, f'"model-index[{n}].results" must be an array']
    for k, result in enumerate(entry["results"]):
        at = f"model-index[{n}].results[{k}]"
        if not isinstance(result, dict):
            missing.append(f'"{at}" must be an object')
            continue
        missing += [
            f'"{at}.{part}.{key}" is required'
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name"))
            if not isinstance((result.get(part) or {}).get(key), str)
        ]
        for j, metric in enumerate(_list(result.get("metrics"))):
            if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or "value" not in metric:
                missing.append(f'"{at}.metrics[{j}]" needs a type and a value')
    return missing


def relation(data: dict[str, object], paths: set[str]) -> str:
    """How a model relates to its base: as its card says, or as the Hub infers it."""
    if isinstance(said := data.get("base_model_relation"), str):
        return said
    if data.get("library_name") == "peft" or "adapter_config.json" in paths:
        return "adapter"
    return "merge" if len(_list(data.get("base_model"))) > 1 else "finetune"


def tags(data: dict[str, object], paths: set[str], config: dict[str, object]) -> list[str]:
    """The tags of a model in the Hub's order: library, format, architecture, task, its own, `key:value`."""
    found = [data.get("library_name")]
    found += ["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []
    found += [config.get("model_type"), data.get("pipeline_tag")]
    found += ["model-index"] if "model-index" in data else []
    found += [*_list(data.get("tags")), *_list(data.get("language"))]
    found += [f"dataset:{value}" for value in _list(data.get("datasets"))]
    for base in _list(data.get("base_model")):
        found += [f"base_model:{base}", f"base_model:{relation(data, paths)}:{base}"]
    found += [f"license:{value}" for value in _list(data.get("license"))] + ["region:us"]
    return list(dict.fromkeys(str(tag) for tag in found if tag))


def dataset_tags(data: dict[str, object]) -> list[str]:
    """The tags of a dataset: most keys of its card as `key:value`."""
    keys = ("task_categories", "task_ids", "language", "license", "size_categories")
    found = [f"{key}:{value}" for key in keys for value in _list(data.get(key))]
    return list(dict.fromkeys([*found, *(str(tag) for tag in _list(data.get("tags"))), "region:us"]))
