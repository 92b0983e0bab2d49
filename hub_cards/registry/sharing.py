"""Whether adapters can share one base, and the modules that they bring whole, such as heads."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hub_cards.pulling.loading import shortened
from hub_cards.pulling.pull import Pulled

# Of a model's configuration: what belongs to the head and the tokenizer, not to the base.
OF_THE_HEAD = ("id2label", "label2id", "problem_type", "pad_token_id")
_NOT_COMPARED = {*OF_THE_HEAD, "_name_or_path", "architectures", "transformers_version", "finetuning_task"}
AVERAGE, UNION = "average", "union"  # policies for the heads of a merge
# Ways of LoRA to begin that leave the base's weights as they are; all others take a part out of them.
_GENTLE = (True, False, "gaussian", "eva", "orthogonal")


def configs(model: nn.Module) -> dict[str, Any]:
    """Return the configurations of a model's adapters by their names, as PEFT has them: changes are seen by the model.

    Example:
        >>> configs(nn.Linear(1, 1))
        {}
    """
    return cast(dict[str, Any], getattr(model, "peft_config", {}))  # PEFT's types know no fields of LoRA's own


def below(model: PeftModel) -> Any:
    """Return the model of transformers below the adapters, with their layers in it."""
    return cast(Any, model).get_base_model()


def wrappers(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    """Return the wrappers of the modules that some adapter brings whole, such as heads, by their path in the model.

    Example:
        >>> wrappers(nn.Linear(1, 1))
        {}
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def whole_modules(model: PeftModel, name: str) -> dict[str, nn.Module]:
    """Return the modules that an adapter brings whole, by their path in the model.

    Example:
        >>> whole_modules(nn.Linear(1, 1), "news")
        {}
    """
    found = wrappers(model).items()
    return {path: wrapper.modules_to_save[name] for path, wrapper in found if name in wrapper.modules_to_save}


def check_name(name: str, model: PeftModel | None = None) -> None:
    """Raise unless PEFT can have an adapter of this name.

    It puts the name into the paths of modules, and looks for parts of them.

    Args:
        name: of the adapter.
        model: that is to have it; None: only what holds for all.

    Raises:
        ValueError: it has a dot, or torch, PEFT or the model has a module or a method of this name.

    Example:
        >>> check_name("v1.0")
        Traceback (most recent call last):
        ValueError: no adapter can be called `v1.0`, because it has a dot; give it another ...
    """
    taken = set() if model is None else {part for path, _ in below(model).named_modules() for part in path.split(".")}
    taken -= set() if model is None else set(configs(model))
    if model is not None:
        taken |= {part for config in configs(model).values() for part in getattr(config, "modules_to_save", None) or ()}
    if not name or "." in name:
        why = "it has a dot" if name else "it is empty"
    elif name in (AVERAGE, UNION):
        why = "that is a policy for heads"
    elif hasattr(nn.ModuleDict(), name) or any(name in prefix for prefix in ("lora_", "ia3_")):
        why = "torch or PEFT has something of that name"
    elif name in taken:
        why = "the model has modules of that name"
    else:
        return
    raise ValueError(
        f'no adapter can be called `{name}`, because {why}; give it another name: {{"name": "owner/repository"}}.'
    )


def check_kind(name: str, model: PeftModel) -> None:
    """Raise unless an adapter changes weights, and leaves those of the base itself alone.

    Args:
        name: of the adapter, for the error.
        model: with this adapter only.

    Raises:
        ValueError: it adds inputs or layers, or changes weights of the base.
    """
    config = configs(model)[model.active_adapter]
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"the adapter `{name}` is of the kind {config.peft_type.value}, which adds inputs or layers; expected one "
            "that changes weights, such as LORA. Pull it alone."
        )
    start = getattr(config, "init_lora_weights", True)
    if start not in _GENTLE or getattr(config, "bias", "none") != "none":
        what = f"init_lora_weights={start!r}" if start not in _GENTLE else f"bias={config.bias!r}"
        raise ValueError(
            f"the adapter `{name}` has {what}, which changes weights of the base itself, so no other adapter can share "
            "it; expected one that leaves the base alone. Pull it alone."
        )


def check_apart(name: str, model: PeftModel) -> None:
    """Raise if one adapter changes layers within a module that another one brings whole: PEFT mixes the two up.

    Args:
        name: of the adapter that was added last.
        model: with all of them.

    Raises:
        ValueError: there is such a module.
    """
    mixed = {
        path.removeprefix("base_model.model.")
        for path, wrapper in wrappers(model).items()
        if any(isinstance(module, BaseTunerLayer) for module in wrapper.modules())
    }
    if mixed:
        raise ValueError(
            f"the adapter `{name}` does not fit beside the others: of {shortened(mixed)} one brings the whole, and "
            "another changes layers in it. Pull them apart."
        )


def check_same_base(first_name: str, first: Pulled, name: str, other: Pulled) -> None:
    """Raise unless two pulled adapters can share a base: its class, its configuration and every tensor are equal.

    What both bring whole, such as the head, is left out: the base has none that counts.

    Args:
        first_name: of the first adapter.
        first: the first one; its model may have other adapters too.
        name: of the other adapter.
        other: the other one.

    Raises:
        ValueError: something differs; it is named.
    """

    def refuse(what: str) -> None:
        homes = [f"{p.facts.base.name or p.facts.base.folder} at {p.base_revision}" for p in (first, other)]
        raise ValueError(
            f"the adapters `{first_name}` and `{name}` do not fit into one model: {what}. They were trained on "
            f"{homes[0]} and on {homes[1]}; expected one base. Pull them apart."
        )

    models = [cast(PeftModel, pulled.model) for pulled in (other, first)]
    kinds = [configs(model)[model.active_adapter].peft_type.value for model in models]
    if kinds[0] != kinds[1]:
        refuse(f"`{name}` is of the kind {kinds[0]}, the other of {kinds[1]}")
    bases = [below(model) for model in models]
    if type(bases[0]) is not type(bases[1]):
        refuse(f"`{name}` adapts a {type(bases[0]).__name__}, the other a {type(bases[1]).__name__}")
    dicts = [base.config.to_dict() for base in bases]
    keys = {key for config in dicts for key in config if key not in _NOT_COMPARED}
    differing = {key for key in keys if dicts[0].get(key) != dicts[1].get(key)}
    if differing:
        refuse(f"the configurations of their bases differ in {shortened(differing)}")
    (tensors, whole), (others, others_whole) = _base_tensors(bases[0]), _base_tensors(bases[1])
    brought = tuple(f"{path}." for path in whole & others_whole)
    names = {key for key in tensors.keys() | others.keys() if not key.startswith(brought)}
    unequal = {key for key in names if not equal(tensors.get(key), others.get(key))}
    if unequal:
        refuse(f"{len(unequal)} of {len(names)} tensors of their bases differ ({shortened(unequal)})")


def _base_tensors(base: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors of a model as they are without its adapters, and the paths of what adapters bring whole."""
    whole: set[str] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
        while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if isinstance(module, AuxiliaryTrainingWrapper):
                whole.add(path)
                module = module.original_module
            else:
                module = module.get_base_layer()
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from ((f"{path}.{name}".lstrip("."), tensor) for name, tensor in own)
        for name, child in module.named_children():
            yield from visit(child, f"{path}.{name}".lstrip("."))

    return dict(visit(base, "")), whole


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors are there and the same, dtype and all.

    Example:
        >>> equal(torch.ones(2), torch.ones(2)), equal(torch.ones(2), None), equal(torch.ones(2), torch.ones(2).half())
        (True, False, False)
    """
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)
