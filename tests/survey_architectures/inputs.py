"""Made-up inputs for the forward pass of any model: `candidates`."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.survey_architectures.inputs_by_type import BY_TYPE
from tests.survey_architectures.known import Known

TEXT = 16
MODALITIES = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values"),
}
Maker = Callable[[Known], list[Any]]


def candidates(model: nn.Module, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, arguments) to try, the ones that use most of the model first."""
    known = Known(model, device)
    signature = dict(inspect.signature(model.forward).parameters)
    required = [name for name, p in signature.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", "")
    main = main if isinstance(main, list) else [main]
    rich = {*RICH, *main, *required, *known.features_need()}
    choices = {
        "rich": [name for name in signature if name in rich],
        "crossed": [name for name in signature if name in {*rich, "encoder_hidden_states"}],
        "plain": [name for name in signature if name in {*required, *main, "decoder_input_ids"}],
        "text": [name for name in signature if name in {*required, "input_ids", "decoder_input_ids"}],
    }
    if "pixel_values" in choices["rich"] and "pixel_values_videos" not in {*main, *required}:
        for label in ("rich", "crossed"):
            choices[label] = [name for name in choices[label] if name != "pixel_values_videos"]
    with torch.device(device):
        if known.model_type in BY_TYPE:
            yield "by type", BY_TYPE[known.model_type](known)
        seen: list[list[str]] = []
        for label, wanted in choices.items():
            if wanted in seen or not wanted:
                continue
            seen.append(wanted)
            made = {name: MAKERS[name](known) for name in wanted if name in MAKERS}
            for number in range(max(map(len, made.values()), default=0)):
                arguments = {name: options[number % len(options)] for name, options in made.items()}
                yield from _worded(known, f"{label} {number}", arguments, signature)


def _worded(
    known: Known, label: str, arguments: dict[str, Any], signature: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the arguments with a place in the text for each image and sound, without and with a mask."""
    if "input_ids" not in arguments:
        yield label, arguments
        return
    kinds = [torch.zeros(1, arguments["input_ids"].shape[1], dtype=torch.long)]
    ids = [arguments["input_ids"]]
    for kind, (modality, inputs) in enumerate(MODALITIES.items(), start=1):
        token = known.token(modality)
        if token is None or not any(name in arguments for name in inputs):
            continue
        count = _features_in(known, modality, arguments)
        if count is None:
            yield label, arguments
            return
        ids.append(torch.full((1, count), token))
        kinds.append(torch.full((1, count), kind))
    arguments = {**arguments, "input_ids": torch.cat(ids, 1)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in signature and len(ids) > 1:
            arguments[name] = torch.cat(kinds, 1)
    yield label, arguments
    if "attention_mask" in signature:
        yield f"{label} masked", {**arguments, "attention_mask": torch.ones_like(arguments["input_ids"])}


def _features_in(known: Known, modality: str, arguments: dict[str, Any]) -> int | None:
    """Return how many places in the text the features of an image or a sound take, None if they cannot be made."""
    method = known.features_method(modality)
    if method is None:
        return known.get("image_seq_length", "image_seq_len", "mm_tokens_per_image", default=1)
    taken = {name: value for name, value in arguments.items() if name in inspect.signature(method).parameters}
    try:
        with torch.no_grad():
            features = method(**taken)
    except Exception:  # the same inputs will fail in the forward pass, with a text of their own
        return None
    features = getattr(features, "pooler_output", None) if not isinstance(features, torch.Tensor) else features
    if features is None:
        return None
    each = features if isinstance(features, list | tuple) else [features]
    return sum(item.numel() // item.shape[-1] for item in each)


def _ids(known: Known) -> list[Any]:
    return [known.words(TEXT)]


def _decoder_ids(known: Known) -> list[Any]:
    return [known.words(TEXT // 2)]


def _mask(known: Known) -> list[Any]:
    return [torch.ones_like(ids) for ids in _ids(known)]


def _pixels(known: Known) -> list[Any]:
    channels, (height, width) = known.channels(), known.image_size()
    if known.takes("image_grid_thw", "grid_thw"):
        patches = _patches(known)
        return [*patches, *(rows[None] for rows in patches)]
    if known.takes("target_sizes"):
        return [torch.rand(1, channels, known.patch(), 64 * known.patch())]
    frames = known.get("num_frames", "frames_per_clip")
    still = torch.rand(1, channels, height, width)
    if known.takes("spatial_shapes", "pixel_position_ids"):
        return [_rows(known)]
    if frames:
        return [still[:, None].repeat(1, frames, 1, 1, 1), still]
    if "image_sizes" in known.features_need():
        return [still[:, None].repeat(1, 3, 1, 1, 1), still, still[:, None], still[:, None].repeat(1, 5, 1, 1, 1)]
    return [still, still[:, None], still[:, None].repeat(1, 2, 1, 1, 1), _rows(known)]


def _rows(known: Known) -> Any:
    return torch.rand(1, 64, known.channels() * known.patch() ** 2)


def _video(known: Known) -> list[Any]:
    channels, (height, width) = known.channels(), known.image_size()
    frames = known.get("num_frames", "frames_per_clip", default=8)
    return [torch.rand(1, frames, channels, height, width)]


def _wave(known: Known) -> list[Any]:
    bins = known.get("num_mel_bins", "feature_size")
    spectrogram = [torch.rand(1, known.get("max_length", default=1024), bins)] if bins else []
    wave = torch.rand(1, 19200)
    return [*spectrogram, wave, wave[:, None]]


def _features(known: Known) -> list[Any]:
    bins = known.get(
        "num_mel_bins", "feature_size", "input_feat_per_channel", "input_feat_size", "input_dim", "mel_bins", default=80
    )
    frames = 2 * known.get("max_source_positions", default=1500)
    dimension = known.get("feature_projection_input_dim", default=160)
    return [
        torch.rand(1, bins, frames),
        torch.rand(1, 128, bins),
        torch.rand(1, 64, dimension),
        torch.rand(1, 1, 1001, 64),
        torch.rand(1, 19200),
    ]


def _features_mask(known: Known) -> list[Any]:
    shapes = [(1, features.shape[index]) for features, index in zip(_features(known), (2, 1, 1, 2, 1), strict=True)]
    return [torch.ones(shape, dtype=torch.long) for shape in shapes]


def _grid(known: Known) -> list[Any]:
    return [torch.tensor([[1, 4 * known.merge(), 4 * known.merge()]])]


def _patches(known: Known) -> list[Any]:
    merge, patch = known.merge(), known.patch()
    wide = known.channels() * (known.get("temporal_patch_size") or 1) * patch * patch
    count = (4 * merge) ** 2
    return [torch.rand(count, wide), torch.rand(count, known.channels(), patch, patch), torch.rand(count, 2 * wide)]


def _hidden(known: Known) -> list[Any]:
    width = known.get("hidden_size", "d_model", "dim", default=64)
    return [*_patches(known), torch.rand(1, TEXT, width), torch.rand(1, width, TEXT)]


def _boxes(known: Known) -> list[Any]:
    return [torch.zeros(1, TEXT, 4, dtype=torch.long)]


def _length(known: Known) -> int:
    return known.get("context_length", "prediction_length", default=64)


def _lagged(known: Known) -> int:
    return _length(known) + max(known.get("lags_sequence", default=[0]))


def _series(known: Known) -> list[Any]:
    long = _lagged(known)
    return [torch.rand(1, long), torch.rand(1, long, known.get("num_input_channels", "input_size", default=1))]


def _ahead(known: Known) -> int:
    return known.get("prediction_length", default=8)


def _size(known: Known) -> list[Any]:
    return [torch.tensor([known.image_size()])]


MAKERS: dict[str, Maker] = {
    "input_ids": _ids,
    "attention_mask": _mask,
    "decoder_input_ids": _decoder_ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _video,
    "image_sizes": _size,
    "input_values": _wave,
    "input_features": _features,
    "input_features_mask": _features_mask,
    "feature_attention_mask": _features_mask,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "hidden_states": _hidden,
    "inputs_embeds": lambda known: [torch.rand(1, TEXT, known.get("hidden_size", default=64))],
    "encoder_hidden_states": lambda known: [torch.rand(1, TEXT, known.cross_width())],
    "bbox": _boxes,
    "past_values": _series,
    "past_observed_mask": lambda known: [torch.ones_like(series) for series in _series(known)],
    "past_time_features": lambda known: [torch.rand(1, _lagged(known), known.get("num_time_features", default=0))],
    "future_time_features": lambda known: [torch.rand(1, _ahead(known), known.get("num_time_features", default=0))],
    "future_values": lambda known: [torch.rand(1, _ahead(known))],
    "input_points": lambda known: [torch.rand(1, 1, 1, 2)],
    "pixel_position_ids": lambda known: [torch.arange(64)[None, :, None].repeat(1, 1, 2) % 8],
    "image_position_ids": lambda known: [torch.arange(64)[None, :, None].repeat(1, 1, 2) % 8],
    "merge_sizes": lambda known: [torch.tensor([known.merge()])],
    "qformer_input_ids": _ids,
    "spatial_shapes": lambda known: [torch.tensor([[8, 8]])],
    "target_sizes": lambda known: [torch.tensor([[8, 8]])],
    "pixel_attention_mask": lambda known: [torch.ones(1, 64, dtype=torch.long)],
    "flattened_patches": lambda known: [torch.rand(1, 64, known.channels() * known.patch() ** 2 + 2)],
}
RICH = {
    "input_ids", "decoder_input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values",
    "input_features_mask", "feature_attention_mask", "image_grid_thw", "spatial_shapes", "bbox",
    "future_time_features", "future_values", "input_points", "flattened_patches", "past_time_features",
    "past_observed_mask", "target_sizes",
}  # fmt: skip
