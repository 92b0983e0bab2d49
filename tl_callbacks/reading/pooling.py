"""One vector a sample from whatever a module returns: masks, padding on either side, packed rows, images, speech."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "first", "last"]


def features_in(value: Any) -> Tensor | None:
    """Return the hidden states in what a module is given or returns: a tensor, tuple, dict or ModelOutput.

    Example:
        >>> features_in((torch.ones(2), None))
        tensor([1., 1.])
        >>> features_in({"attentions": None, "last_hidden_state": torch.zeros(1)})
        tensor([0.])
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        for name in ("hidden_states", "last_hidden_state"):
            if isinstance(value.get(name), Tensor):
                return features_in(value[name])
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((found for item in value if (found := features_in(item)) is not None), None)
    return None


def pool(
    features: Tensor,
    rows: int,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    pooling: Pooling = "mean",
    prompted: bool = False,
) -> Tensor | None:
    """Return one float32 vector a sample, or None where a tensor holds no fixed share of each row of the batch.

    Sequences (rows, length, d) are pooled over the places that the mask keeps, wherever the padding is; maps
    (rows, d, height, width), or (rows, height, width, d) of models that put the width last, and videos over all places.
    Where a module works on several pieces of each row, the pieces of a row (images, segments of a long text) are
    averaged; the choices of a multiple-choice row, whose mask has three dimensions, stand side by side.

    Args:
        features: what a module computed.
        rows: rows of the batch.
        mask: (rows, length), or (rows, choices, length), not 0 where a place counts; None: all count. One of four
            dimensions tells on its diagonal. Where it is shorter, the model has padded the sequence further.
        segments: (rows, length), the number of the sample that each place belongs to, from 0, of packed rows.
        pooling: "mean", "first" (a class token) or "last" of the places that count.
        prompted: whether the places that a shorter mask lacks are those of a soft prompt, which come first and count.

    Returns:
        (rows, d), or (samples, d) of packed rows; a row without any place that counts is 0.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]], [[9.0], [9.0], [5.0]]])
        >>> mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
        >>> pool(hidden, 2, mask).tolist(), pool(hidden, 2, mask, pooling="last").tolist()
        ([[2.0], [5.0]], [[3.0], [5.0]])
    """
    features = rows_first(features, rows, mask, segments)
    if features.ndim < 2 or features.shape[0] == 0 or features.shape[0] % rows:
        return None
    pieces, choices = features.shape[0] // rows, mask is not None and mask.ndim == 3
    if features.ndim > 3:
        pooled = _over_places(features)
    elif features.ndim == 2:
        if segments is not None:
            return None  # one vector a row where the row holds several samples
        pooled = features.float()
    elif segments is not None:
        return _by_segment(features, segments, pooling) if segments.shape == features.shape[:2] else None
    else:
        pooled = _over_length(features, fitting(mask, features, prompted=prompted), pooling)
    if pieces > 1:
        apart = pooled.view(rows, pieces, -1)
        pooled = apart.flatten(1) if choices else apart.mean(1)
    return pooled


def rows_first(features: Tensor, rows: int, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Return features with the rows of the batch in their first dimension, where they can be told.

    Args:
        features: (rows, ...), (length, rows, d), or (rows * length, d).
        rows: rows of the batch.
        mask: (rows, length).
        segments: (rows, length), of packed rows.

    Example:
        >>> rows_first(torch.zeros(5, 2, 4), rows=2, mask=torch.ones(2, 5)).shape
        torch.Size([2, 5, 4])
        >>> rows_first(torch.zeros(10, 4), rows=2, mask=torch.ones(2, 5)).shape
        torch.Size([2, 5, 4])
    """
    if features.ndim == 3 and _is_length_first(features, rows, mask):
        return features.transpose(0, 1)
    laid_out = mask if mask is not None and mask.ndim == 2 else segments
    if features.ndim == 2 and laid_out is not None and features.shape[0] == laid_out.numel() > rows:
        return features.view(*laid_out.shape, -1)
    return features


def packed_segments(position_ids: Tensor | None, ends: Tensor | None = None) -> Tensor | None:
    """Return which sample each place of packed rows belongs to; None where the rows are not packed.

    Args:
        position_ids: (rows, length); a sample begins where they do not rise.
        ends: where samples end in the one row that there is, beginning with 0, as flash attention takes it.

    Example:
        >>> packed_segments(torch.tensor([[0, 1, 2, 0, 1]]))
        tensor([[0, 0, 0, 1, 1]])
        >>> packed_segments(torch.tensor([[0, 1, 2], [0, 1, 2]])) is None
        True
    """
    if position_ids is None or position_ids.ndim != 2:
        if ends is None or len(ends) <= 2:
            return None
        lengths = ends.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)[None]
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) <= 0
    if not bool(starts[:, 1:].any()):
        return None
    return starts.flatten().cumsum(0).view_as(starts) - 1


def resized(mask: Tensor, length: int) -> Tensor:
    """Return a mask at another resolution, as that of speech: of the samples there, of the frames here.

    Args:
        mask: (rows, samples), padded on one side.
        length: frames.

    Example:
        >>> resized(torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]), 2).int().tolist()
        [[1, 0], [1, 1]]
    """
    mask = mask != 0
    counts = torch.div(mask.sum(1) * length + mask.shape[1] - 1, mask.shape[1], rounding_mode="floor")[:, None]
    places = torch.arange(length, device=mask.device)
    on_right = (mask[:, 0] | ~mask[:, -1])[:, None]
    return torch.where(on_right, places < counts, places >= length - counts)


def fitting(mask: Tensor | None, features: Tensor, *, prompted: bool) -> Tensor | None:
    """Return the mask of the places of `features`, (pieces, length), or None where it says nothing of them.

    Args:
        mask: as `pool` takes it.
        features: (pieces, length, d).
        prompted: whether the places that a shorter mask lacks come first and count.

    Example:
        >>> fitting(torch.tensor([[1, 0]]), torch.zeros(1, 3, 4), prompted=True).tolist()
        [[True, True, False]]
    """
    if mask is None:
        return None
    length = features.shape[1]
    if mask.ndim == 4:  # which places a place sees: whether it sees itself; added to the scores where not boolean
        seen = mask.diagonal(dim1=-2, dim2=-1)[:, 0] if mask.shape[-1] == mask.shape[-2] else mask[:, 0, -1]
        mask = seen if seen.dtype == torch.bool else seen == 0
    mask = mask.reshape(-1, mask.shape[-1]) != 0
    if mask.shape[0] != features.shape[0]:
        return None
    if mask.shape[1] < length:
        missing = mask.new_full((len(mask), length - mask.shape[1]), prompted)
        mask = torch.cat([missing, mask] if prompted else [mask, missing], dim=1)
    return mask if mask.shape[1] == length else None


def _is_length_first(features: Tensor, rows: int, mask: Tensor | None) -> bool:
    if features.shape[0] == rows or features.shape[1] != rows:
        return False
    return features.shape[0] % rows != 0 or (mask is not None and mask.shape == (rows, features.shape[0]))


def _over_places(features: Tensor) -> Tensor:
    width_last = features.ndim == 4 and features.shape[1] == features.shape[2] != features.shape[3]
    return features.float().flatten(1, 2).mean(1) if width_last else features.float().flatten(2).mean(2)


def _over_length(features: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    if mask is None:
        if pooling == "mean":
            return features.float().mean(1)
        return features[:, 0 if pooling == "first" else -1].float()
    if pooling == "mean":
        weights = mask.float()
        kept = features.float().masked_fill(~mask[..., None], 0.0)  # what stands on padding may be no number
        return kept.sum(1) / weights.sum(1, keepdim=True).clamp(min=1.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    scored = torch.where(mask, places, len(places) if pooling == "first" else -1)
    chosen = scored.amin(1) if pooling == "first" else scored.amax(1)
    picked = features[torch.arange(len(features), device=features.device), chosen.clamp(0, len(places) - 1)]
    return picked.float() * mask.any(1, keepdim=True)


def _by_segment(features: Tensor, segments: Tensor, pooling: Pooling) -> Tensor:
    flat, of = features.float().flatten(0, 1), segments.flatten()
    count = int(of[-1]) + 1
    lengths = torch.bincount(of, minlength=count)
    if pooling == "mean":
        return flat.new_zeros(count, flat.shape[1]).index_add_(0, of, flat) / lengths[:, None]
    last = lengths.cumsum(0) - 1
    return flat[last if pooling == "last" else last - lengths + 1]
