"""Looks into a model while it evaluates: one pooled vector a group and sample, by forward hooks that go again."""

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import is_peft
from tl_callbacks.probing.points import ReadPoint, Stream, read_points
from tl_callbacks.probing.pooling import Pooling, features_in, packed_segments, pool, resized

_AUDIO_MASKS = ("feature_attention_mask", "input_features_mask", "padding_mask")
_SPEECH = ("input_values", "input_features")


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
        self._inputs: dict[str, Any] | None = None
        self._masks: dict[Stream, Tensor | None] = {}
        self._segments: Tensor | None = None
        self._rows = 0
        self._found: dict[str, Tensor] = {}
        self._names = _forward_names(model)
        self._prompted = is_peft(model)
        own = (getattr(module, "_get_feature_vector_attention_mask", None) for module in model.modules())
        self._frames = next((found for found in own if found is not None), None)

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
            self._handles.append(_watch(point, lambda value, n=name, p=point: self._take(n, p, value)))  # type: ignore[misc]
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
        if torch.is_grad_enabled() or root.training:
            return
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rows = _count_rows(inputs)
        if rows is None:
            return
        self._rows, self._inputs = rows, inputs
        self._masks = _masks(inputs, getattr(root, "config", None))
        packed = inputs.get("attention_mask") is None
        self._segments = packed_segments(inputs.get("position_ids"), inputs.get("cu_seq_lens_q")) if packed else None

    def _take(self, name: str, point: ReadPoint, value: Any) -> None:
        if self._inputs is None or (point.first and name in self._found):
            return
        features = features_in(value)
        if features is None:
            return
        pooled = pool(
            features.detach(),
            self._rows,
            self._mask(point.stream, features),
            self._segments if point.stream in ("main", "decoder") else None,
            pooling=self.pooling,
            prompted=self._prompted,
        )
        if pooled is not None:
            self._found[name] = pooled

    def _mask(self, stream: Stream, features: Tensor) -> Tensor | None:
        """Return the mask of a stream; that of speech at the resolution of the features."""
        assert self._inputs is not None
        mask = self._masks.get(stream)
        speech = stream == "audio" or (stream == "main" and _hears(self._inputs))
        if mask is None or not speech or features.ndim != 3 or mask.ndim != 2 or mask.shape[1] == features.shape[1]:
            return mask
        if self._frames is not None:
            found: Tensor = self._frames(features.shape[1], mask)
            return found
        return resized(mask, features.shape[1])

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        inputs, found = self._inputs, self._found
        self._forget()
        if inputs is not None and output is not None:  # None: the forward raised
            self._sink(Batch({name: found[name] for name in self.groups.names if name in found}, inputs))

    def _forget(self) -> None:
        self._inputs, self._masks, self._segments, self._found, self._rows = None, {}, None, {}, 0


def _watch(point: ReadPoint, take: Callable[[Any], None]) -> RemovableHandle:
    """Call `take` with what a read point sees, each time that its module is called."""
    if not point.takes_input:
        return point.module.register_forward_hook(lambda module, args, output: take(output))

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args if args else kwargs)

    return point.module.register_forward_pre_hook(given, with_kwargs=True)


def _forward_names(model: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds)


def _count_rows(inputs: Mapping[str, Any]) -> int | None:
    """Return the rows of a batch: those of its main input, else of its first tensor."""
    names = ("input_ids", "inputs_embeds", *_SPEECH, "pixel_values")
    ordered = [*(inputs.get(name) for name in names), *inputs.values()]
    return next((len(value) for value in ordered if isinstance(value, Tensor) and value.ndim > 1 and len(value)), None)


def _hears(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in _SPEECH) and inputs.get("input_ids") is None


def _masks(inputs: Mapping[str, Any], config: Any) -> dict[Stream, Tensor | None]:
    """Return the mask of each stream, as far as the batch says: the main one, the decoder's, the audio's."""
    main = _tensor(inputs, "attention_mask")
    audio = next((mask for name in _AUDIO_MASKS if (mask := _tensor(inputs, name)) is not None), None)
    masks: dict[Stream, Tensor | None] = {"main": main, "audio": audio if audio is not None else main}
    if not getattr(config, "is_encoder_decoder", False):
        return {**masks, "decoder": main}  # a decoder alone reads the main sequence
    return {**masks, "decoder": _decoder_mask(inputs, getattr(config, "pad_token_id", None))}


def _decoder_mask(inputs: Mapping[str, Any], pad: int | None) -> Tensor | None:
    """Return which places of the decoder's sequence count: as given, else those that predict a label, else no padding.

    A model that is given labels alone shifts them to the right for its decoder, so a place counts whose label does. Of
    one that is given token numbers alone all places count up to the last that is no padding: the first one may be the
    padding token, which starts the sequence of many models.
    """
    given, labels, ids = (_tensor(inputs, name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    if given is not None:
        return given
    if ids is None and labels is not None and labels.ndim == 2:
        return labels != -100
    if ids is None:
        mask = _tensor(inputs, "attention_mask")  # BART's classifiers shift the encoder's input to the right
        return mask if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    if pad is None:
        return None
    return (ids != pad).flip(1).cummax(1).values.flip(1)


def _tensor(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    value = inputs.get(name)
    return value if isinstance(value, Tensor) else None
