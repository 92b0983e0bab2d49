"""Where in a model the measures read: its logits, its last hidden states, the place of its head."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from tl_callbacks.fingerprints import base_model
from tl_callbacks.groups import LayerGroups
from tl_callbacks.reading.points import read_points
from tl_callbacks.reading.pooling import features_in


def logits_in(output: Any) -> Tensor:
    """Return the logits in what a model gives.

    Raises:
        ValueError: there are none.

    Example:
        >>> logits_in({"loss": torch.zeros(()), "logits": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
    """
    found = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(found, tuple | list):
        found = next((value for value in found if isinstance(value, Tensor) and value.ndim > 1), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model gives no `logits` but {_named(output)}. Give the head that it had, as `head=`, or leave the "
            "measure out."
        )
    return found


@contextmanager
def last_hidden_states(model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `take` with the last hidden states of each forward: what the model below its head gives.

    Args:
        model: the model, with adapters or without.
        take: called with (rows, length, d) of a transformer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> with last_hidden_states(model, lambda hidden: print(tuple(hidden.shape))):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        (1, 3, 8)
    """

    def hear(module: nn.Module, args: Any, output: Any) -> None:
        hidden = features_in(output)
        if hidden is not None:
            take(hidden)

    handle = _below_head(model).register_forward_hook(hear)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_replaced(model: nn.Module, groups: LayerGroups, head: nn.Module | None) -> Iterator[None]:
    """Let another head answer where the model's own one stands; None: the own one does.

    Args:
        model: the model.
        groups: its layer groups, which tell its head.
        head: takes what the model's own head takes. It is set to eval mode, and on the model's device.

    Raises:
        ValueError: the model has no head.

    Example:
        >>> from tl_callbacks import group_layers
        >>> model, old = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 5)), nn.Linear(2, 3)
        >>> with head_replaced(model, group_layers(model), old):
        ...     print(tuple(model(torch.zeros(1, 2)).shape))
        (1, 3)
    """
    if head is None:
        yield
        return
    point = read_points(model, groups).get(groups.head or "")
    if point is None:
        raise ValueError(
            "the model has no head group that `head` could stand in for. Leave `head` out where the model is trained "
            "with its old head, or give ForgettingMonitor groups whose last one is the head."
        )
    other = head.to(next((p.device for p in model.parameters()), torch.device("cpu"))).eval()

    def answer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return other(*args, **kwargs)

    handle = point.module.register_forward_hook(answer, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def own_head_finding(trainer: Trainer, head: nn.Module | None, name: str) -> list[str]:
    """Return a finding if the head that should stay as it was is one that trains."""
    own = {id(parameter) for parameter in trainer.model.parameters()} if trainer.model is not None else set()
    if head is None or not any(id(parameter) in own for parameter in head.parameters()):
        return []
    finding = (
        f"{name}: `head` shares parameters with the model, so it would train with it. Give a copy of it as it was, "
        "copy.deepcopy(head), or leave `head` out to measure the model's own."
    )
    return [finding]


def _below_head(model: nn.Module) -> nn.Module:
    base = base_model(model)
    inner = base.base_model if isinstance(base, PreTrainedModel) else base
    return inner if isinstance(inner, nn.Module) else base


def _named(output: Any) -> str:
    keys = ", ".join(f"`{key}`" for key in output) if isinstance(output, Mapping) else type(output).__name__
    return keys or "nothing"
