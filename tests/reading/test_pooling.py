"""One vector a sample, against a loop over the places that count."""

import pytest
import torch
from torch import Tensor

from tl_callbacks.reading.pooling import Pooling, features_in, packed_segments, pool, resized

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(3, 5, 4, generator=GENERATOR)
MASKS = {
    "right padding": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
    "left padding": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]),
    "holes": torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]]),
}


def by_hand(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    rows = [row[kept.bool()] for row, kept in zip(hidden, mask, strict=True)]
    return torch.stack([row.mean(0) if pooling == "mean" else row[0 if pooling == "first" else -1] for row in rows])


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("name", MASKS)
def test_what_counts_is_pooled_wherever_the_padding_is(name: str, pooling: Pooling) -> None:
    mask = MASKS[name]
    dirty = HIDDEN.masked_fill(mask[..., None] == 0, float("nan"))
    for given in (mask, mask.bool(), mask.float()):
        assert torch.allclose(pool(dirty, 3, given, pooling=pooling), by_hand(HIDDEN, mask, pooling), atol=1e-6)
    if (name, pooling) not in {("right padding", "first"), ("left padding", "last")}:
        assert not torch.allclose(pool(HIDDEN, 3, None, pooling=pooling), by_hand(HIDDEN, mask, pooling), atol=1e-2)


def test_a_mask_of_what_sees_what_tells_on_its_diagonal() -> None:
    mask = MASKS["right padding"].bool()
    seen = mask[:, None, None, :] & mask[:, None, :, None]
    scores = torch.where(seen, 0.0, -1e9)
    expected = by_hand(HIDDEN, mask, "mean")
    assert torch.allclose(pool(HIDDEN, 3, seen), expected)
    assert torch.allclose(pool(HIDDEN, 3, scores), expected)


def test_a_row_without_a_place_that_counts_is_zero() -> None:
    mask = torch.zeros(3, 5)
    for pooling in ("mean", "first", "last"):
        assert pool(HIDDEN, 3, mask, pooling=pooling).tolist() == torch.zeros(3, 4).tolist()


def test_a_soft_prompt_counts_and_the_models_own_padding_does_not() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    left, right = torch.nn.functional.pad(mask, (2, 0), value=1), torch.nn.functional.pad(mask, (0, 2))
    assert torch.allclose(pool(HIDDEN, 3, mask, prompted=True), by_hand(HIDDEN, left, "mean"))
    assert torch.allclose(pool(HIDDEN, 3, mask), by_hand(HIDDEN, right, "mean"))


def test_maps_videos_and_vectors() -> None:
    maps = torch.randn(2, 5, 3, 3, generator=GENERATOR)
    assert torch.allclose(pool(maps, 2), maps.mean((2, 3)), atol=1e-6)
    assert torch.allclose(pool(maps.permute(0, 2, 3, 1), 2), maps.mean((2, 3)), atol=1e-6)
    videos = torch.randn(2, 5, 2, 3, 4, generator=GENERATOR)
    assert torch.allclose(pool(videos, 2), videos.mean((2, 3, 4)), atol=1e-6)
    assert torch.equal(pool(HIDDEN[:, 0].bfloat16(), 3), HIDDEN[:, 0].bfloat16().float())
    assert pool(HIDDEN, 2) is None, "3 pieces of 2 rows"
    assert pool(torch.ones(3), 3) is None


def test_length_first_and_flat_sequences() -> None:
    mask = MASKS["left padding"]
    expected = by_hand(HIDDEN, mask, "mean")
    assert torch.allclose(pool(HIDDEN.transpose(0, 1), 3, mask), expected)
    assert torch.allclose(pool(HIDDEN.flatten(0, 1), 3, mask), expected)


def test_choices_stand_side_by_side_and_images_are_averaged() -> None:
    hidden = torch.randn(6, 5, 4, generator=GENERATOR)
    mask = torch.cat([MASKS["right padding"], MASKS["left padding"]])
    each = by_hand(hidden, mask, "mean")
    assert torch.allclose(pool(hidden, 2, mask.view(2, 3, 5)), each.view(2, 12))
    assert torch.allclose(pool(hidden, 2), hidden.mean(1).view(2, 3, 4).mean(1), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_packed_rows_give_a_vector_a_sample(pooling: Pooling) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    segments = packed_segments(positions)
    assert segments is not None
    parts = [HIDDEN[0, :3], HIDDEN[0, 3:], HIDDEN[1, :1], HIDDEN[1, 1:]]
    expected = torch.cat([by_hand(part[None], torch.ones(1, len(part)), pooling) for part in parts])
    assert torch.allclose(pool(HIDDEN[:2], 2, None, segments, pooling=pooling), expected)
    assert pool(HIDDEN[:2, 0], 2, None, segments) is None, "a vector a row is none a sample"
    ends = packed_segments(None, torch.tensor([0, 3, 5]))
    assert ends is not None
    assert torch.allclose(pool(HIDDEN[:1], 1, None, ends, pooling=pooling), expected[:2])


def test_rows_that_are_not_packed() -> None:
    assert packed_segments(torch.arange(5)[None].expand(2, 5)) is None
    assert packed_segments(None) is None
    assert packed_segments(None, torch.tensor([0, 5])) is None


def test_speech_masks_follow_the_frames() -> None:
    mask = torch.zeros(2, 400)
    mask[0, :200] = 1
    mask[1, 300:] = 1
    assert resized(mask, 4).int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]


def test_the_hidden_states_in_what_modules_return() -> None:
    other = torch.ones(1, dtype=torch.long)
    assert features_in((other, [None, HIDDEN])) is HIDDEN
    assert features_in({"logits": other, "hidden_states": HIDDEN}) is HIDDEN
    assert features_in({"attentions": HIDDEN[0], "last_hidden_state": HIDDEN}) is HIDDEN
    assert features_in(None) is None
    assert features_in("text") is None
