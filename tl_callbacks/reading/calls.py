"""What a model was called with: how many rows, and which places of which stream count."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_callbacks.reading.points import Stream
from tl_callbacks.reading.pooling import packed_segments, resized

_AUDIO_MASKS = ("feature_attention_mask", "input_features_mask", "padding_mask")
_SPEECH = ("input_values", "input_features")


@dataclass(frozen=True)
class Call:
    """One call of a model: its inputs by name, and what they say of the rows.

    Args:
        inputs: argument name to value.
        rows: rows of the batch.
        masks: the mask of each stream, not 0 where a place counts; None: all count.
        segments: the sample that each place of packed rows belongs to; None: the rows are not packed.
        frames: the model's own way from the places of a waveform to its frames, if it has one.
    """

    inputs: dict[str, Any]
    rows: int
    masks: Mapping[Stream, Tensor | None]
    segments: Tensor | None
    frames: Any = None

    def mask(self, stream: Stream, features: Tensor) -> Tensor | None:
        """Return the mask of a stream; that of speech at the resolution of the features."""
        mask = self.masks.get(stream)
        speech = stream == "audio" or (stream == "main" and _hears(self.inputs))
        if mask is None or not speech or features.ndim != 3 or mask.ndim != 2 or mask.shape[1] == features.shape[1]:
            return mask
        if self.frames is not None:
            found: Tensor = self.frames(features.shape[1], mask)
            return found
        return resized(mask, features.shape[1])


class CallReader:
    """Reads what a model is called with, in its root's forward hooks.

    Args:
        model: the model without wrappers.

    Example:
        >>> call = CallReader(nn.Linear(3, 2)).read((torch.ones(5, 3),), {})
        >>> call.rows, list(call.inputs)
        (5, ['input'])
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters.items()
        self._names = tuple(name for name, parameter in parameters if parameter.kind in kinds)
        own = (getattr(module, "_get_feature_vector_attention_mask", None) for module in model.modules())
        self._frames = next((found for found in own if found is not None), None)
        self._config = getattr(model, "config", None)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Return what a call says, None where it holds no tensor with rows."""
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rows = count_rows(inputs)
        if rows is None:
            return None
        packed = inputs.get("attention_mask") is None
        segments = packed_segments(inputs.get("position_ids"), inputs.get("cu_seq_lens_q")) if packed else None
        return Call(inputs, rows, _masks(inputs, self._config), segments, self._frames)


def count_rows(inputs: Mapping[str, Any]) -> int | None:
    """Return the rows of a batch: those of its main input, else of its first tensor; None if it holds none.

    Example:
        >>> count_rows({"labels": torch.zeros(4), "input_ids": torch.zeros(4, 7)})
        4
    """
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
