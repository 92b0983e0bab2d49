"""What is never read of a repository: pickles, code, and whatever its files name outside of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll")
# Configurations that transformers or PEFT read; any of them could name code to run.
_CONFIGS = (
    "config.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "generation_config.json",
)  # fmt: skip
# What a configuration can name besides files of its own folder: PEFT and transformers would open or fetch it.
_ELSEWHERE = (
    "transformers_weights", "audio_tokenizer_name_or_path", "prompt_tuning_init_state_dict_path", "shadow_model",
    "cache_file", "covariance_file", "megatron_config", "gguf_file", "vocab_file", "tokenizer_file",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A folder with the files of one commit; of a local folder repository and revision are None."""

    folder: Path
    repo_id: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"`{self.repo_id}` at {self.revision}" if self.repo_id else f"`{self.folder}`"


def refuse_pickles(snapshot: Snapshot, names: list[str]) -> None:
    """Raise if a name is a pickle's or code's: reading either runs what somebody else wrote.

    Raises:
        ValueError: there is such a name.
    """
    wrong = sorted(name for name in names if name.lower().endswith((*PICKLES, *_CODE)))
    if wrong:
        only = "" if any(name.endswith(".safetensors") for name in names) else " and has no safetensors weights"
        raise ValueError(
            f"{snapshot} lists {', '.join(f'`{name}`' for name in wrong[:5])}{only}; pickles and code run what others "
            "wrote when they are read, so they are never read. Save the weights as safetensors."
        )


def refuse_code(snapshot: Snapshot) -> None:
    """Raise if a configuration names code that lies in a repository.

    Raises:
        ValueError: a configuration has `auto_map`, or takes a kernel from the Hub.
        OSError: a configuration is no JSON; it is taken out of the cache.
    """
    for name, config in _configs(snapshot):
        if place := names_code(config):
            raise ValueError(
                f"`{name}` of {snapshot} has `{place}`, by which code of a repository would run; expected a class that "
                "transformers itself has. Code of others is never run."
            )


def refuse_strays(snapshot: Snapshot, *, adapter: bool) -> None:
    """Raise if a file of a run makes transformers or PEFT read something that is none of the run's own files.

    Args:
        snapshot: the run's files.
        adapter: whether the run is of an adapter; a whole model has no configuration of one.

    Raises:
        ValueError: the index of the weights, or a configuration, names a file elsewhere or another repository.
        OSError: one of them is no JSON; it is taken out of the cache.
    """
    if (snapshot.folder / INDEX).is_file():
        shards_of(snapshot)
    if (snapshot.folder / "adapter_config.json").is_file() and not adapter:
        raise ValueError(
            f"{snapshot} holds an `adapter_config.json`, but its run is of a whole model: transformers would change it "
            "by that adapter, or load the adapter's base instead. Remove the file, or choose another revision."
        )
    for name, config in _configs(snapshot):
        if place := leads_elsewhere(config):
            raise ValueError(
                f"`{name}` of {snapshot} has `{place}`: loading it would read files or a repository that do not belong "
                "to the run and that nobody has checked; expected a run whose files are all its own."
            )


def shards_of(snapshot: Snapshot) -> list[str]:
    """Return the names of the files that the index of a snapshot's weights lists.

    Raises:
        ValueError: one of them is not a safetensors file of the same folder.
        OSError: the index is no JSON; it is taken out of the cache.
    """
    index = read_json(snapshot.folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    names: list[Any] = list(places.values()) if isinstance(places, dict) else [places]
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"`{INDEX}` of {snapshot} lists `{name}`; expected the names of safetensors files that lie beside it: "
                "nothing else is read. Save the model again."
            )
    return sorted(set(names))


def read_json(path: Path) -> Any:
    """Return what a JSON file of a snapshot holds.

    Raises:
        OSError: it is no JSON; it is taken out of the cache.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError; brackets in brackets without end
        forget(path)
        raise OSError(f"`{path.name}` in `{path.parent}` is no JSON ({error}); call again, or restore it.") from None


def names_code(config: Any) -> str | None:
    """Return what of a configuration would make a repository's code run, None if there is nothing.

    Example:
        >>> names_code({"model_type": "bert", "auto_map": {"AutoModel": "modeling.Model"}})
        'auto_map'
    """
    if isinstance(config, list):
        return next((place for item in config if (place := names_code(item))), None)
    if not isinstance(config, dict):
        return None
    for key, value in config.items():
        if key == "auto_map" and value:
            return "auto_map"
        if key.endswith("_implementation") and "/" in str(value):
            return f"{key}: {value}"
    return names_code(list(config.values()))


def leads_elsewhere(config: Any) -> str | None:
    """Return what a configuration names outside of its own folder, as `key: value`; None if there is nothing.

    Example:
        >>> leads_elsewhere({"tokenizer_class": "BertTokenizer", "vocab_file": ".env"})
        'vocab_file: .env'
    """
    if isinstance(config, list):
        return next((place for item in config if (place := leads_elsewhere(item))), None)
    if not isinstance(config, dict):
        return None
    if config.get("peft_type") == "XLORA":
        return "peft_type: XLORA"  # its adapters lie in other repositories
    for key, value in config.items():
        if key in _ELSEWHERE and value and value != "mirror":  # SHADOW's word for the base itself
            return f"{key}: {value}"
    return leads_elsewhere(list(config.values()))


def _configs(snapshot: Snapshot) -> Iterator[tuple[str, Any]]:
    """Yield the names of the configurations that are there, also of adapters in folders, and what they hold."""
    paths = [snapshot.folder / name for name in _CONFIGS] + sorted(snapshot.folder.glob("*/adapter_config.json"))
    for path in paths:
        if path.is_file():
            yield path.relative_to(snapshot.folder).as_posix(), read_json(path)


def forget(path: Path) -> None:
    """Remove a file from the cache; one of the user's own folders is left."""
    if any(folder.name == "snapshots" and folder.parent.name.startswith("models--") for folder in path.parents):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
