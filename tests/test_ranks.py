"""The checksum that ranks compare, and what it says of them; that it is compared is tested in `distributed`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests import tiny
from tl_callbacks import attach, ranks
from tl_callbacks.ranks import VerifyRanks, checksum, checksums, differences

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_single_bit_changes_the_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_CHUNK", 16)  # several chunks
    tensor = (torch.randn(7, 9) * 9).to(dtype)
    expected = checksum(tensor)
    assert checksum(tensor.clone()) == expected
    seen = {int(expected)}
    for byte in range(tensor.numel() * tensor.element_size()):
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[byte] ^= 1 << (byte % 8)
        seen.add(int(checksum(other)))
    assert len(seen) == 1 + tensor.numel() * tensor.element_size()


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swapped": lambda t: t.flip(0),
    "opposite changes": lambda t: t + torch.tensor([1.0, -1.0, 0, 0]),
    "transposed": lambda t: t.view(2, 2).t().reshape(-1),
}


@pytest.mark.parametrize("change", ROWS)
def test_changes_that_a_plain_sum_would_miss(change: str) -> None:
    tensor = torch.tensor([1.0, 2.0, 4.0, 8.0])
    other = ROWS[change](tensor)
    assert tensor.sum() == other.sum(), "the control: the sums are equal"
    assert checksum(tensor) != checksum(other)


def test_values_that_are_equal_but_not_the_same_bits_differ() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert checksum(nan) == checksum(nan.clone())


def test_a_view_has_the_checksum_of_its_copy() -> None:
    tensor = torch.randn(6, 4)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)
    assert checksum(torch.zeros(0)) == 0


def test_rows_say_bits_and_whether_a_parameter_trains() -> None:
    model = nn.Linear(2, 2)
    before = checksums(model.parameters())
    model.bias.requires_grad_(False)
    after = checksums(model.parameters())
    assert differences(torch.stack([before, after])) == [(1, 2, 1, 0)]
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert differences(torch.stack([after, after, checksums(model.parameters())])) == [(0, 0, 2, 0)]


def test_shards_are_compared_with_their_replicas_only() -> None:
    def rank(bits: int, shard: int) -> torch.Tensor:
        return torch.tensor([[bits, shard, 1]])

    assert differences(torch.stack([rank(5, 0), rank(6, 1), rank(5, 0), rank(6, 1)])) == []
    assert differences(torch.stack([rank(5, 0), rank(6, 1), rank(5, 0), rank(7, 1)])) == [(0, 0, 3, 1)]


@pytest.mark.parametrize("value", [-1, 2.5, True, None])
def test_an_interval_that_is_none(value: object, tmp_path: object) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(str(tmp_path)))
    with pytest.raises(ValueError, match=r"`verify_ranks` is .*; expected optimizer steps between two comparisons"):
        attach(trainer, verify_ranks=value)  # type: ignore[arg-type]


def test_one_process_has_nothing_to_compare(tmp_path: object) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(str(tmp_path)))
    attach(trainer, verify_ranks=1)
    assert not any(isinstance(callback, VerifyRanks) for callback in trainer.callback_handler.callbacks)
