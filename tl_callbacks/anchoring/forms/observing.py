"""What a model computes in a forward: the features of groups, its output, and what it was called with."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.reading.calls import Call, CallReader
from tl_callbacks.reading.points import ReadPoint, watch
from tl_callbacks.reading.pooling import features_in


@dataclass
class Observed:
    """One forward.

    Args:
        args: what the model was called with by position.
        kwargs: what it was called with by name.
        call: the same by name, with its masks; None where it holds no tensor with rows.
        features: what each read point saw, by group name, with its graph.
        output: what the model returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Call | None
    features: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None


class Observer:
    """Keeps what a model's forwards compute, with their graphs, while it listens.

    Hooks stand on the read points and on the model. The recomputation of activation checkpointing happens in the
    backward pass, when nobody listens.

    Args:
        model: the model without wrappers.
        points: where groups are read, by name.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> observer = Observer(model, {"0": ReadPoint(model[0], takes_input=False, first=False, stream="main")})
        >>> observer.listen()
        >>> _ = model(torch.ones(5, 3))
        >>> [(seen.features["0"].shape, seen.output.shape) for seen in observer.heard()]
        [(torch.Size([5, 4]), torch.Size([5, 2]))]
        >>> observer.close()
    """

    def __init__(self, model: nn.Module, points: Mapping[str, ReadPoint]) -> None:
        self._reader = CallReader(model)
        self._graphs: bool | None = None  # of which forwards: those that are recorded, those that are not; None: none
        self._current: Observed | None = None
        self._seen: list[Observed] = []
        self._handles: list[RemovableHandle] = [
            *(watch(point, lambda value, n=name, p=point: self._take(n, p, value)) for name, point in points.items()),  # type: ignore[misc]
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]

    def listen(self, *, graphs: bool = True) -> None:
        """Forget what was heard, and keep the forwards that come: those that record a graph, or those that do not."""
        self._graphs, self._current, self._seen = graphs, None, []

    def heard(self) -> list[Observed]:
        """Return the forwards since `listen`, in their order, and stop to listen."""
        seen, self._seen, self._graphs, self._current = self._seen, [], None, None
        return seen

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.heard()

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        if self._graphs is torch.is_grad_enabled():
            args = tuple(copy.copy(value) if isinstance(value, dict) else value for value in args)  # some write into it
            named = args[0] if len(args) == 1 and isinstance(args[0], dict) else {}
            call = self._reader.read(() if named else args, {**named, **kwargs})
            self._current = Observed(args, kwargs, call)

    def _take(self, name: str, point: ReadPoint, value: Any) -> None:
        if self._current is None or (point.first and name in self._current.features):
            return
        if (features := features_in(value)) is not None:
            self._current.features[name] = features

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        if self._current is not None:
            self._current.output = output
            self._seen.append(self._current)
            self._current = None
