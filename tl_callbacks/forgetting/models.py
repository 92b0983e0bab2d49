"""Where in a model the measures read: its logits, its last hidden states, the place of its head."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from tl_callbacks.fingerprints import base_model
from tl_callbacks.groups import LayerGroups
from tl_callbacks.reading.points import ReadPoint, head_modules, read_points, watch
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
def last_hidden_states(model: nn.Module, groups: LayerGroups, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `take` with the last hidden states of each forward: what the model below its head gives.

    Of a model that is no class of transformers, that is what its head group is given; without one, what it returns.

    Args:
        model: the model, with adapters or without.
        groups: its layer groups, which tell its head.
        take: called with (rows, length, d) of a transformer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tl_callbacks import group_layers
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> with last_hidden_states(model, group_layers(model), lambda hidden: print(tuple(hidden.shape))):
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        (1, 3, 8)
    """

    def hear(value: Any) -> None:
        hidden = features_in(value)
        if hidden is not None:
            take(hidden)

    base = base_model(model)
    below = base.base_model if isinstance(base, PreTrainedModel) else base
    point = ReadPoint(below, takes_input=False, first=False, stream="main")
    if below is base and groups.head is not None:
        point = read_points(model, groups).get(groups.head, point)
    handle = watch(point, hear)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_replaced(model: nn.Module, groups: LayerGroups, head: nn.Module | None) -> Iterator[None]:
    """Let another head answer where the model's own one stands; None: the own one does.

    Where the own head is several modules, the other one stands for all of them: it is given what the first is given,
    and answers in place of the last.

    Args:
        model: the model.
        groups: its layer groups, which tell its head.
        head: takes what the model's own head takes. It is set to eval mode, and on the model's device.

    Raises:
        ValueError: the model has no head, or one of several modules while `head` is one Linear; or, in its forward, one
            of several modules that stand side by side.

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
    modules = head_modules(model, groups)
    if not modules:
        raise ValueError(
            "the model has no head group that `head` could stand in for. Leave `head` out where the model is trained "
            "with its old head, or give ForgettingMonitor groups whose last one is the head."
        )
    if len(modules) > 1 and isinstance(head, nn.Linear):
        names = [f"`{path}`" for path in modules]
        raise ValueError(
            f"the model's head is {', '.join(names)}, one upon the other, and `head` is one Linear, as if {names[-1]} "
            f"were all of it. Give all that stood there, with what is between, as Sequential({', '.join(modules)}); "
            "where the old head was no more than this, Sequential(head)."
        )
    other = head.to(next((p.device for p in model.parameters()), torch.device("cpu"))).eval()
    own = [*modules.values()]
    first, last = own[0], own[-1]
    given: list[tuple[Any, Any]] = []

    def hear(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given[:] = [(args, kwargs)]
        if first is last or not isinstance(output, Tensor):
            return output
        return torch.full_like(output, torch.nan)  # so that the last one shows whether it is given what this one made

    def answer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        made = features_in(args if args else kwargs)
        if not given or (first is not last and (made is None or not bool(made.isnan().all()))):
            raise ValueError(
                f"the head group is {', '.join(f'`{path}`' for path in modules)}, which do not follow one upon the "
                "other, so `head` can stand in for no one of them. Give ForgettingMonitor groups with a head of one."
            )
        inputs, named = given.pop()
        return answered(other, *inputs, **named)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in ((first, hear), (last, answer))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answered(head: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what a head gives for what it is given, in the head's own dtype, which need not be the model's.

    Example:
        >>> answered(nn.Linear(2, 3), torch.zeros(1, 2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), None)

    def cast(value: Any) -> Any:
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    return head(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})


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


def _named(output: Any) -> str:
    keys = ", ".join(f"`{key}`" for key in output) if isinstance(output, Mapping) else type(output).__name__
    return keys or "nothing"
