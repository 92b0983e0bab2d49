"""Looks into a model while it evaluates: one pooled vector a group and sample, by forward hooks that go again."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import is_peft
from tl_callbacks.reading.calls import Call, CallReader
from tl_callbacks.reading.points import ReadPoint, read_points, watch
from tl_callbacks.reading.pooling import Pooling, features_in, pool


class Batch(NamedTuple):
    """What one forward gave: pooled features by group, (samples, d) each, and what the model was called with."""

    features: dict[str, Tensor]
    inputs: dict[str, Any]


class Capture:
    """Collects, while it is open, one pooled vector a group and sample of every forward without gradient.

    Hooks stand on the modules of the groups and on the model; they act only where no gradient is recorded and the model
    is in eval mode, so that training and the recomputation of activation checkpointing pass through. They are removed
    when it closes, by an exception too. Nothing but pooled features is kept, and no random number is drawn.

    Args:
        model: the model that is called, or that its wrapper (DDP, FSDP2) calls.
        groups: its layer groups.
        sink: called after each forward with its `Batch`.
        pooling: "mean", "first" or "last" of the places that the mask keeps.

    Example:
        >>> from tl_callbacks import group_layers
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
        >>> seen = []
        >>> with Capture(model, group_layers(model), seen.append), torch.no_grad():
        ...     _ = model(torch.ones(5, 3))
        >>> {name: tuple(features.shape) for name, features in seen[0].features.items()}
        {'0': (5, 4), 'head': (5, 4)}
        >>> len(model._forward_hooks) + len(model[0]._forward_hooks)
        0
    """

    def __init__(
        self, model: nn.Module, groups: LayerGroups, sink: Callable[[Batch], None], *, pooling: Pooling = "mean"
    ) -> None:
        if pooling not in ("mean", "first", "last"):
            raise ValueError(f'`pooling` is {pooling!r}; expected "mean", "first" or "last".')
        self.model = model
        self.groups = groups
        self.pooling = pooling
        self._sink = sink
        self._handles: list[RemovableHandle] = []
        self._call: Call | None = None
        self._found: dict[str, Tensor] = {}
        self._reader = CallReader(model)
        self._prompted = is_peft(model)

    def __repr__(self) -> str:
        return f"Capture(groups={len(self.groups)}, pooling={self.pooling!r}, open={bool(self._handles)})"

    def __enter__(self) -> "Capture":
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Register the hooks. Does nothing if it is open."""
        if self._handles:
            return
        for name, point in read_points(self.model, self.groups).items():
            self._handles.append(watch(point, lambda value, n=name, p=point: self._take(n, p, value)))  # type: ignore[misc]
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end, always_call=True))

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        if not torch.is_grad_enabled() and not root.training:
            self._call = self._reader.read(args, kwargs)

    def _take(self, name: str, point: ReadPoint, value: Any) -> None:
        if self._call is None or (point.first and name in self._found):
            return
        features = features_in(value)
        if features is None:
            return
        pooled = pool(
            features.detach(),
            self._call.rows,
            self._call.mask(point.stream, features),
            self._call.segments if point.stream in ("main", "decoder") else None,
            pooling=self.pooling,
            prompted=self._prompted,
        )
        if pooled is not None:
            self._found[name] = pooled

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        call, found = self._call, self._found
        self._forget()
        if call is not None and output is not None:  # None: the forward raised
            self._sink(Batch({name: found[name] for name in self.groups.names if name in found}, call.inputs))

    def _forget(self) -> None:
        self._call, self._found = None, {}
