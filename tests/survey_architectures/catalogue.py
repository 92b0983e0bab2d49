"""Every model type and task class of the installed transformers, made on the meta device."""

import contextlib
import functools
import importlib
import io
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.survey_architectures.configs import default

DECODERS = {"musicgen", "musicgen_melody"}  # MODEL_MAPPING names only the decoder of these


def model_types() -> list[str]:
    """Return the model types that have a model class, in the order of CONFIG_MAPPING."""
    return [model_type for model_type in CONFIG_MAPPING if base_class(model_type)]


def without_class() -> list[str]:
    """Return the model types that only have a configuration."""
    return [model_type for model_type in CONFIG_MAPPING if not base_class(model_type)]


@functools.cache
def base_class(model_type: str) -> type[PreTrainedModel] | None:
    """Return the class of MODEL_MAPPING, or else the best one of the modeling module made for this configuration."""
    config_class = CONFIG_MAPPING[model_type]
    with contextlib.suppress(ValueError):  # a name in the mapping that transformers does not export
        if config_class in MODEL_MAPPING and model_type not in DECODERS:
            mapped = MODEL_MAPPING[config_class]
            return mapped[0] if isinstance(mapped, tuple | list) else mapped
    candidates = [cls for cls in _classes_beside(config_class) if cls.config_class is config_class]
    stem = config_class.__name__.removesuffix("Config")
    return min(candidates, key=lambda cls: _rank(cls.__name__, stem), default=None)


def _classes_beside(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    try:
        module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and "PreTrainedModel" not in value.__name__:
            yield value


def _rank(name: str, stem: str) -> int:
    endings = (name == f"{stem}Model", name.endswith("Model"), "For" in name, name.endswith("Backbone"))
    return endings.index(True) if True in endings else len(endings)


def build_backbone(model_type: str) -> nn.Module:
    """Make the base model of a model type on the meta device."""
    cls = base_class(model_type)
    if cls is None:
        raise ValueError(f"the model type {model_type!r} has no model class")
    return build_head(model_type, cls)


def build_head(model_type: str, cls: type[PreTrainedModel]) -> nn.Module:
    """Make a class of a model type on the meta device."""
    return make(cls, configuration(model_type, cls))


def configuration(model_type: str, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return a valid configuration for a class: the one of its model type, or the part of it that the class wants."""
    config = default(model_type, cls.__name__)
    wanted = cls.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    if parts:
        return parts[0]
    return default(wanted.model_type) if wanted.model_type in CONFIG_MAPPING else config


def make(cls: type[PreTrainedModel], config: PreTrainedConfig, device: str = "meta") -> nn.Module:
    """Make a model on a device, in evaluation mode, without warnings or prints."""
    with warnings.catch_warnings(), torch.device(device), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return cls(config).to(device).eval()


def head_classes() -> list[tuple[str, str, type[PreTrainedModel]]]:
    """Return (model type, auto mapping, class) of every class of the other auto mappings, each once, no base models."""
    backbones = {base_class(model_type) for model_type in CONFIG_MAPPING}
    found: dict[type[PreTrainedModel], tuple[str, str]] = {}
    for mapping in sorted(vars(modeling_auto)):
        if not (mapping.startswith("MODEL_") and mapping.endswith("_MAPPING")) or mapping == "MODEL_MAPPING":
            continue
        for model_type in CONFIG_MAPPING:
            with contextlib.suppress(KeyError, ValueError, ImportError):
                mapped = getattr(modeling_auto, mapping)[CONFIG_MAPPING[model_type]]
                for cls in mapped if isinstance(mapped, tuple | list) else (mapped,):
                    if cls not in backbones:
                        found.setdefault(cls, (model_type, mapping))
    return [(model_type, mapping, cls) for cls, (model_type, mapping) in found.items()]


def not_instantiated(model_types: list[str]) -> dict[str, str]:
    """Return why base models cannot be made, by model type."""
    reasons = {}
    for model_type in model_types:
        try:
            build_backbone(model_type)
        except Exception as error:  # whatever a model raises is the reason
            reasons[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return reasons
