"""The true size of a parameter: packed, sharded or as it is.

`Params4bit` and `QuantState` stand in for bitsandbytes' classes of these names, which need that package: the same
attributes, and the same packing of two numbers to a byte, viewed in `quant_storage`.
"""

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests import tiny
from tl_callbacks.parameters import dimensions, true_size


class QuantState:
    """What bitsandbytes keeps of a packed weight, as far as its size goes."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


class Params4bit(nn.Parameter):
    """A weight before and after `pack`; PEFT knows the class by its name."""

    def __new__(cls, data: torch.Tensor, quant_storage: torch.dtype = torch.uint8) -> "Params4bit":
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state, self.quant_storage, self.bnb_quantized = None, quant_storage, False
        return self

    def pack(self) -> "Params4bit":
        packed = torch.zeros(math.ceil(self.numel() / 2), dtype=torch.uint8).view(self.quant_storage).unsqueeze(1)
        result = Params4bit(packed, self.quant_storage)
        result.quant_state, result.bnb_quantized = QuantState(self.shape), True
        return result


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_packed_weight_has_the_size_of_its_shape(storage: torch.dtype) -> None:
    weight = Params4bit(torch.zeros(6, 4), storage)
    assert true_size(weight) == 24
    packed = weight.pack()
    assert packed.numel() == 12 // storage.itemsize
    assert true_size(packed) == 24
    packed.quant_state = None
    assert true_size(packed) == 24


def test_padding_is_not_counted() -> None:
    assert true_size(Params4bit(torch.zeros(3, 3)).pack()) == 9


def with_packed_base(storage: torch.dtype) -> PeftModel:
    """A BERT with adapters whose frozen query weights are packed."""
    model = get_peft_model(tiny.bert(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    for name, module in model.named_modules():
        if name.endswith("query.base_layer"):
            module._parameters["weight"] = Params4bit(module.weight.data, storage).pack()
    return model


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_sums_are_those_of_peft(storage: torch.dtype) -> None:
    model = with_packed_base(storage)
    trained = sum(true_size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    every = sum(true_size(parameter) for parameter in model.parameters())
    assert (trained, every) == model.get_nb_trainable_parameters()
    assert every > sum(parameter.numel() for parameter in model.parameters())


def test_sums_are_those_of_transformers_where_nothing_is_packed() -> None:
    for build in (tiny.bert, tiny.resnet):
        model = build()
        assert sum(true_size(parameter) for parameter in model.parameters()) == model.num_parameters()


def emptied() -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_numel, parameter.ds_shape = 6, (2, 3)  # type: ignore[attr-defined]  # as DeepSpeed ZeRO-3 leaves them
    return parameter


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Parameter(torch.zeros(2, 3)), 6),
        (lambda: nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False), 6),
        (lambda: nn.Parameter(torch.zeros(2, 3, device="meta")), 6),
        (lambda: nn.Parameter(torch.tensor(1.0)), 1),
        (lambda: nn.Parameter(torch.empty(0)), 0),
        (emptied, 6),
    ],
)
def test_other_parameters_are_as_large_as_they_say(make: Callable[[], nn.Parameter], size: int) -> None:
    assert true_size(make()) == size


def test_dimensions_are_those_before_a_shard_was_emptied() -> None:
    assert dimensions(emptied()) == 2
    assert dimensions(nn.Parameter(torch.zeros(3))) == 1
    assert dimensions(nn.Parameter(torch.tensor(1.0))) == 0
