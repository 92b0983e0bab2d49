"""The base below a PEFT model: what it computes with its adapters off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tl_callbacks.frozen.state import requires_grad_kept
from tl_callbacks.parameters import is_peft


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let a PEFT model compute what its base computes; what trains is what trained before.

    Args:
        model: a model, with adapters or without.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> frozen = model.base_model.model[0].lora_A.default.weight.requires_grad_(False)
        >>> with without_adapters(model):
        ...     model.base_model.model[0].disable_adapters
        True
        >>> frozen.requires_grad
        False
    """
    if not is_peft(model):
        yield
        return
    off = _below_the_prompt if has_prompt(model) else _switched_off
    # PEFT opens every adapter that it switches on again, those too that were frozen or waited for their turn.
    with requires_grad_kept(model), off(model):
        yield


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()  # of transformers' own `add_adapter`, without PEFT's wrapper
    try:
        yield
    finally:
        model.enable_adapters()


@contextmanager
def _below_the_prompt(model: Any) -> Iterator[None]:
    """Let a model compute without its prompt; PEFT's own way (0.21) fails for models that do not generate."""
    before = vars(model).get("forward")
    model.forward = model.base_model.forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def has_prompt(model: nn.Module) -> bool:
    """Return whether what PEFT adds to a model stands before its inputs (prompt tuning, prefixes and the like).

    Example:
        >>> has_prompt(nn.Linear(2, 2))
        False
    """
    return any(config.is_prompt_learning for config in (getattr(model, "peft_config", None) or {}).values())
