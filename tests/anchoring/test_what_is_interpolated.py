"""What WiSE-FT moves: the statistics of norms with the parameters beside them, and a language model's head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.anchoring.test_weight_interpolation import held_at_0, trained
from tl_callbacks import WeightAnchoring, WeightInterpolation, attach, group_layers


class NormsInTheHead(nn.Module):
    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)])
        self.classifier = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = input_ids.float()
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.classifier(hidden)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(("exclude", "staying"), [(None, ["classifier"]), (("blocks.0",), ["blocks.0"]), ((), [])])
def test_statistics_go_with_the_parameters_of_their_module(exclude: Any, staying: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NormsInTheHead()
    assert group_layers(model).names[-1] == "head"
    start, plain = tiny.state(model), tiny.clone(model)
    trained(tmp_path / "plain", None, plain)
    tuned = tiny.state(plain)
    trained(tmp_path / "ours", held_at_0(exclude=exclude), model)
    floating = [name for name, tensor in start.items() if tensor.is_floating_point()]
    stay = {name for name in floating if any(name.startswith(group) for group in staying)}
    assert len([name for name in tiny.moved(start, tuned, floating) if "running" in name]) == 8
    assert tiny.moved(start, tiny.state(model), floating) == stay
    assert not stay or not tiny.moved(tuned, tiny.state(model), stay)


def test_a_reference_that_is_given_has_statistics_of_its_own(tmp_path: Path) -> None:
    other, model = tiny.resnet(seed=1), tiny.resnet()
    other(torch.stack([row["pixel_values"] for row in tiny.images(32)]))
    given = tiny.state(other)
    floating = [name for name, tensor in given.items() if tensor.is_floating_point()]
    assert [name for name in tiny.moved(given, tiny.state(model), floating) if "running_mean" in name]
    trained(tmp_path, held_at_0(exclude=(), reference=given), model, images=True)
    assert not tiny.moved(given, tiny.state(model), floating)
    name = next(name for name in floating if "running_mean" in name)
    wrong = WeightInterpolation(exclude=(), reference={**given, name: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"reference of `{name}` has shape \(1,\); expected"):
        tiny.trainer(tiny.resnet(), tiny.arguments(tmp_path), tiny.images(), callbacks=[wrong])


@pytest.mark.parametrize(("tied", "adapted"), [(False, False), (False, True), (True, False)])
def test_a_language_models_head_is_pretrained(tied: bool, adapted: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    before = tiny.state(model)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny.texts()]
    anchor = WeightAnchoring(0.1)
    trainer = tiny.trainer(model, tiny.arguments(tmp_path, max_steps=4), rows, callbacks=[held_at_0(), anchor])
    attach(trainer)
    assert any("lm_head" in name for name in anchor._names(model)) is (adapted or not tied)
    trainer.train()
    after = model.merge_and_unload() if adapted else model
    assert not tiny.moved(before, tiny.state(after)), "at 0 all of the model is the pretrained one"
