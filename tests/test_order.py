"""The order of the groups against a forward pass: seen in the first training step, mended only on request."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from tests import tiny
from tests.test_towers import clip, contrastive, pairs
from tl_callbacks import GradualUnfreezing, attach, every, group_layers, layerwise_optimizer
from tl_callbacks.discovery.order import contradictions, watch_order


class Swapped(nn.Module):
    """Registers its blocks in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, tiny.NUM_LABELS)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.second(self.first(self.embed(input_ids).mean(1))))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.sum()
        return {"loss": loss, "logits": logits}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def train(model: nn.Module, tmp_path: Path, data: Any = None, **kwargs: Any) -> None:
    groups = group_layers(model)
    args = tiny.arguments(tmp_path, max_steps=3, **kwargs.pop("args", {}))
    optimizer = layerwise_optimizer(args, groups)
    trainer = tiny.trainer(model, args, data, optimizer_cls_and_kwargs=optimizer, **kwargs)
    attach(trainer)
    trainer.train()


def test_a_contradiction_is_told_once_with_both_orders(tmp_path: Path) -> None:
    model = Swapped()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, tmp_path)
    told = [str(warning.message) for warning in caught if "another order" in str(warning.message)]
    assert len(told) == 1
    assert "the forward uses `first` before `second`" in told[0]
    assert "Groups: embed < second < first < head; forward: embed < first < second < head" in told[0]
    assert hooks(model) == 0


@pytest.mark.parametrize("peft", [False, True])
def test_the_right_order_is_silent(peft: bool, tmp_path: Path) -> None:
    model: Any = tiny.bert()
    if peft:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, tmp_path)
    assert hooks(model) == 0


def test_parallel_towers_are_not_compared(tmp_path: Path) -> None:
    model = clip()
    train(model, tmp_path, pairs(), data_collator=contrastive, args={"label_names": ["return_loss"]})
    names = group_layers(model).names
    vision_first = [*(n for n in names if n.startswith("vision")), *(n for n in names if n.startswith("text"))]
    assert contradictions(group_layers(model), vision_first) == []
    assert contradictions(group_layers(model), vision_first[::-1])


def test_an_unattached_unfreezing_checks_too(tmp_path: Path) -> None:
    model = Swapped()
    groups = group_layers(model)
    args = tiny.arguments(tmp_path, max_steps=4)
    trainer = tiny.trainer(
        model,
        args,
        callbacks=[GradualUnfreezing(groups, every(1))],
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert any("another order" in str(warning.message) for warning in caught)
    assert hooks(model) == 0


def test_hooks_go_when_no_forward_came() -> None:
    model = Swapped()
    remove = watch_order(model, group_layers(model))
    assert hooks(model) > 0
    remove()
    remove()
    assert hooks(model) == 0


def test_an_example_puts_the_groups_in_the_order_of_use() -> None:
    model = Swapped().train()
    before, generator = tiny.state(model), torch.get_rng_state()
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    groups = group_layers(model, example=batch)
    assert groups.names == ("embed", "first", "second", "head")
    assert groups.head == "head"
    assert tiny.moved(before, tiny.state(model)) == set()
    assert torch.equal(generator, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert hooks(model) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch_order(model, groups)
        model(**batch)


def test_an_example_keeps_an_order_that_holds_and_the_levels_of_towers() -> None:
    model = tiny.bert()
    assert group_layers(model, example={"input_ids": torch.zeros(1, 4, dtype=torch.long)}) == group_layers(model)
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)}
    assert group_layers(clip(), example=batch) == group_layers(clip())
    with pytest.raises(TypeError, match="unexpected keyword"):
        group_layers(Swapped(), example={"pixels": torch.zeros(1)})


def test_a_shared_block_has_no_order() -> None:
    config = transformers.AlbertConfig(
        embedding_size=4, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
    )
    with pytest.warns(UserWarning, match="all 3 layers share the weights of one block"):
        groups = group_layers(transformers.AlbertForSequenceClassification(config))
    assert len(groups) == 3
    assert "no order by depth" in str(groups)
