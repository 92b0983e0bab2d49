"""The fingerprint of a base: the same with adapters on it and without, another for one flipped bit."""

import copy
import hashlib
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor  # what torchao's quantised weights are built like
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests import tiny
from tl_callbacks import group_layers
from tl_callbacks.fingerprints import fingerprint, tensor_hash


def found(model: nn.Module, head: frozenset[str] = frozenset()) -> dict[str, Any]:
    result = fingerprint(model, head)
    assert result is not None
    return result


def head(model: nn.Module) -> frozenset[str]:
    groups = group_layers(model)
    assert groups.head is not None
    return frozenset(groups[groups.head].parameters)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, tie_word_embeddings=True,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config)


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], peft.PeftConfig]]] = {
    "LoRA": (tiny.bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")),
    "LoRA, bias and embeddings": (
        tiny.bert,
        lambda: peft.LoraConfig(target_modules=["query", "word_embeddings"], bias="all", lora_bias=False),
    ),
    "DoRA": (tiny.bert, lambda: peft.LoraConfig(target_modules=["query"], use_dora=True, modules_to_save=["pooler"])),
    "LoRA of a convolution": (
        tiny.resnet,
        lambda: peft.LoraConfig(target_modules=["convolution"], modules_to_save=["classifier"]),
    ),
    "LoRA of expert parameters": (
        mixtral,
        lambda: peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]),
    ),
    "trainable tokens": (
        mixtral,
        lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
    ),
    "IA3": (
        tiny.bert,
        lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]),
    ),
    "OFT": (tiny.bert, lambda: peft.OFTConfig(target_modules=["query"], oft_block_size=4)),
    "VeRA": (tiny.bert, lambda: peft.VeraConfig(target_modules=["query"], r=2)),
    "prompt tuning": (tiny.bert, lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
    "adaption prompt": (
        llama,
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=1, adapter_len=2),
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_base_has_its_fingerprint_under_adapters_too(name: str) -> None:
    make, config = ADAPTERS[name]
    base = make()
    alone = found(base)
    assert set(alone["tensors"]) == set(base.state_dict())
    adapted = peft.get_peft_model(make(), config())
    assert len(adapted.state_dict()) > len(alone["tensors"]), "the control: adapters add tensors"
    assert found(adapted) == alone


def test_adapters_of_other_names_and_several_of_them_leave_it_as_it_is() -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(tiny.bert(), config, adapter_name="first")
    adapted.add_adapter("second", copy.deepcopy(config))
    base = tiny.bert()
    assert found(adapted, head(adapted)) == found(base, head(base))
    injected = tiny.bert()
    injected.add_adapter(peft.LoraConfig(target_modules=["query"]))
    assert found(injected) == found(base)


def test_adapters_that_change_the_base_leave_no_fingerprint() -> None:
    def adapted(way: Any) -> nn.Module:
        config = peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=way)
        return peft.get_peft_model(tiny.bert(), config)  # type: ignore[no-any-return]

    weight = tiny.bert().bert.encoder.layer[0].attention.self.query.weight
    for way in ("pissa", "olora"):
        assert not torch.equal(adapted(way).get_base_model().bert.encoder.layer[0].attention.self.query.weight, weight)
        assert fingerprint(adapted(way)) is None
    for way in (True, "gaussian", "orthogonal"):
        assert found(adapted(way)) == found(tiny.bert())


def test_a_flipped_bit_and_a_head_of_its_own_are_told_apart() -> None:
    model = tiny.resnet()
    before = found(model, head(model))
    assert len(before["tensors"]) == len(model.state_dict()) > len(list(model.parameters())), "buffers too"
    for name, tensor in model.state_dict().items():
        flat = tensor.reshape(-1).view(torch.uint8)
        flat[-1] ^= 1
        after = found(model, head(model))
        flat[-1] ^= 1
        changed = {key for key, value in after["tensors"].items() if value != before["tensors"][key]}
        assert changed == {name}
        assert (after["digest"] == before["digest"]) is (name in head(model))
    assert found(model, head(model)) == before
    other = tiny.resnet(seed=1)
    assert found(other)["digest"] != found(model)["digest"]


def test_the_digest_can_be_computed_from_the_tensors() -> None:
    model = tiny.bert()
    of_head = head(model)
    result = found(model, of_head)
    lines = [f"{name} {value}\n" for name, value in sorted(result["tensors"].items()) if name not in of_head]
    assert of_head < set(result["tensors"])
    assert result["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.tensor([[1.0, 2.0]]), (b"float32 1x2\n", "0000803f00000040")),
        (torch.tensor([1.0, -2.0], dtype=torch.bfloat16), (b"bfloat16 2\n", "803f00c0")),
        (torch.tensor(3), (b"int64 \n", "0300000000000000")),
        (torch.tensor([True]), (b"bool 1\n", "01")),
        (torch.zeros(0, 2), (b"float32 0x2\n", "")),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int8).T, (b"int8 2x2\n", "01030204")),
        (torch.ones(1).to(torch.float8_e4m3fn), (b"float8_e4m3fn 1\n", "38")),
    ],
)
def test_the_hash_of_a_tensor(tensor: torch.Tensor, text: tuple[bytes, str]) -> None:
    expected = hashlib.sha256(text[0] + bytes.fromhex(text[1])).hexdigest()[:16]
    assert tensor_hash(tensor) == tensor_hash(nn.Parameter(tensor, requires_grad=False)) == expected
    assert re.fullmatch("[0-9a-f]{16}", expected)


def test_dtype_ties_and_wrappers() -> None:
    model = mixtral()
    result = found(model)
    assert result["tensors"]["lm_head.weight"] == result["tensors"]["model.embed_tokens.weight"]
    low = copy.deepcopy(tiny.bert()).to(torch.bfloat16)
    assert found(low)["digest"] != found(tiny.bert())["digest"]
    assert found(copy.deepcopy(low)) == found(low)
    assert found(torch.compile(tiny.bert())) == found(tiny.bert())  # type: ignore[arg-type]


def test_weights_that_are_not_there_have_none() -> None:
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) is None


def test_what_is_no_tensor_is_left_out() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            pass

    odd = Odd(2, 2)
    odd.register_buffer("sparse", torch.eye(2).to_sparse())
    assert set(found(odd)["tensors"]) == {"weight", "bias"}
    assert len(odd.state_dict()) == 4


def test_a_weight_of_several_tensors_has_a_hash_for_each() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.ones(2, 2)), requires_grad=False)
    tensors = found(model)["tensors"]
    assert set(tensors) == {"weight.a", "weight.b", "bias"}
    assert tensors["weight.b"] == tensor_hash(torch.ones(2, 2)) != tensors["weight.a"]
