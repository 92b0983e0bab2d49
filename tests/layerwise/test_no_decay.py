"""Which parameters get no weight decay: the Trainer's own classes, or besides all with fewer than two dimensions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from tests import tiny
from tl_callbacks import adapt, group_layers, layerwise_optimizer

CONVNEXT = {"depths": [1, 1], "hidden_sizes": [8, 8], "num_stages": 2}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}

# What only the Trainer's classes decay.
DIFFER: dict[str, tuple[Any, set[str]]] = {
    "BERT": (tiny.bert, set()),
    "ResNet": (tiny.resnet, {"normalization.weight"}),
    "ConvNeXt": (
        lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**CONVNEXT)),
        {"layer_scale_parameter"},
    ),
    "BEiT": (
        lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL)),
        {"lambda_1", "lambda_2"},
    ),
    "Mamba": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
        ),
        {"mixer.D", "norm_f.weight"},
    ),
}


def decayed(model: nn.Module, tmp_path: Path, **options: Any) -> set[str]:
    args = tiny.arguments(tmp_path, weight_decay=0.1)
    optimizer = layerwise_optimizer(args, group_layers(model), **options)[0].build(model)
    held = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert len(held) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}


@pytest.mark.parametrize("kind", DIFFER)
def test_1d_spares_what_the_names_of_the_trainer_miss(kind: str, tmp_path: Path) -> None:
    build, differ = DIFFER[kind]
    model = build()
    parameters = dict(model.named_parameters())
    plain, narrow = decayed(model, tmp_path), decayed(model, tmp_path, no_decay="1d")
    assert plain == set(Trainer.get_decay_parameter_names(None, model)) & set(parameters)
    assert narrow == {name for name in plain if parameters[name].ndim > 1}
    missed = {name for name in plain - narrow if any(name.endswith(end) for end in differ)}
    assert missed == plain - narrow
    assert all(any(name.endswith(end) for name in missed) for end in differ)


def test_every_parameter_is_still_in_one_group(tmp_path: Path) -> None:
    model = tiny.resnet()
    args = tiny.arguments(tmp_path, weight_decay=0.1)
    optimizer = layerwise_optimizer(args, group_layers(model), no_decay="1d")[0].build(model)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert all(p.ndim > 1 for group in optimizer.param_groups if group["weight_decay"] for p in group["params"])


def test_with_adapters(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["query"], use_dora=True, modules_to_save=["classifier"])
    model = get_peft_model(tiny.bert(layers=1), config)
    plain, narrow = decayed(model, tmp_path), decayed(model, tmp_path, no_decay="1d")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in plain - narrow} == {"lora_magnitude_vector"}
    assert any("lora_A" in name for name in narrow)
    assert any("classifier" in name for name in narrow)


def test_a_tied_weight_keeps_its_class(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    for choice in ("trainer", "1d"):
        assert "transformer.wte.weight" in decayed(model, tmp_path, no_decay=choice)


def test_the_true_shape_counts_where_a_shard_has_none(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]  # as DeepSpeed ZeRO-3 leaves them
        parameter.data = torch.empty(0)
    assert decayed(model, tmp_path, no_decay="1d") == {"0.weight", "1.weight"}


def test_neutral_by_default_and_said_in_the_recipe(tmp_path: Path) -> None:
    args, groups = tiny.arguments(tmp_path), group_layers(tiny.resnet())
    assert layerwise_optimizer(args, groups)[0].facts()["no_decay"] == "trainer"
    assert layerwise_optimizer(args, groups, no_decay="1d")[0].facts()["no_decay"] == "1d"
    optimizer, _ = adapt(tiny.resnet(), args, "discriminative", no_decay="1d")["optimizer_cls_and_kwargs"]
    assert optimizer.no_decay == "1d"


def test_another_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`no_decay` is '2d'; expected `trainer` .* or `1d`"):
        layerwise_optimizer(tiny.arguments(tmp_path), group_layers(tiny.bert()), no_decay="2d")  # type: ignore[arg-type]
