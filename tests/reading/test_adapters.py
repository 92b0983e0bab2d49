"""The base below adapters of every kind: what it computes, and that nothing else has changed after it."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from tests import tiny
from tl_callbacks.reading.adapters import without_adapters


def _moved(model: Any) -> Any:
    """Let adapters say something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "prompt" in name:
                parameter.normal_()
    return model


def _native(model: Any) -> Any:
    model.add_adapter(LoraConfig(target_modules=["query"]))
    return model


KINDS = {
    "PEFT": lambda model: get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])),
    "a prompt": lambda model: get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)),
    "transformers' own": _native,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_computes_and_the_adapters_come_back(kind: str) -> None:
    base: nn.Module = tiny.bert(dropout=0.0).eval()
    ids = torch.tensor([row["input_ids"] for row in tiny.texts(4)])
    expected = base(input_ids=ids).logits
    model = _moved(KINDS[kind](base)).eval()
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    mask = torch.ones_like(ids)
    adapted = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.equal(adapted, expected), "the control: they do something"
    with without_adapters(model):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, adapted)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
