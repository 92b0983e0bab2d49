"""Named strategies: what each trains, what it leaves alone, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from tests import tiny
from tl_callbacks import STRATEGIES, adapt, at_steps, attach, group_layers, slanted_triangular


def train(model: Any, folder: Path, strategy: str, **options: Any) -> Any:
    args = tiny.arguments(folder, weight_decay=0.1)
    keywords = adapt(model, args, strategy, **options)
    trainer = Trainer(args=args, train_dataset=tiny.texts(), **keywords)
    attach(trainer)
    trainer.train()
    return trainer.model


ALL = {"embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "head"}


@pytest.mark.parametrize(
    ("strategy", "options", "trained"),
    [
        ("probe", {}, {"head"}),
        ("head", {}, {"head"}),
        ("top_k", {}, {"head", "encoder.layer.2", "encoder.layer.1"}),
        ("top_k", {"k": 1}, {"head", "encoder.layer.2"}),
        ("gradual", {}, ALL),
        ("gradual", {"keep_frozen": ["embeddings"]}, ALL - {"embeddings"}),
        ("lp_ft", {}, ALL),
        ("full", {}, ALL),
        ("discriminative", {}, ALL),
        ("anchored", {}, ALL),
        ("anchored", {"form": "penalty"}, ALL),
    ],
)
def test_what_each_strategy_trains(strategy: str, options: dict[str, Any], trained: set[str], tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    groups = group_layers(model)
    assert train(model, tmp_path, strategy, **options) is model
    assert {g.name for g in groups if tiny.moved(start, tiny.state(model), g.parameters)} == trained
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_leaves_the_base_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    adapted = train(model, tmp_path, "lora", r=4)
    assert isinstance(adapted, PeftModel)
    base = adapted.unload()
    after = {name: tensor for name, tensor in tiny.state(base).items() if not name.startswith("classifier")}
    assert not tiny.moved({name: start[name] for name in after}, after)
    with torch.no_grad():
        assert not torch.equal(base.classifier.weight, start["classifier.weight"]), "the head was trained and kept"


def test_scratch_is_the_same_architecture_from_random_weights(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, seed=7)
    one, again = (adapt(model, args, "scratch")["model"] for _ in range(2))
    other = adapt(model, tiny.arguments(tmp_path, seed=8), "scratch")["model"]
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    assert one is not model
    assert tiny.moved(tiny.state(model), tiny.state(one), names) == set(names)
    assert not tiny.moved(tiny.state(one), tiny.state(again))
    assert tiny.moved(tiny.state(one), tiny.state(other), names) == set(names)
    assert one.config._name_or_path == ""


def test_head_is_made_anew_and_nothing_else(tmp_path: Path) -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.classifier.bias.fill_(5.0)
    start = tiny.state(model)
    adapt(model, tiny.arguments(tmp_path), "head")
    assert tiny.moved(start, tiny.state(model)) == {"classifier.weight", "classifier.bias"}
    assert not model.classifier.bias.detach().any()


def test_adapting_draws_nothing_from_the_global_random_state(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        before = torch.get_rng_state()
        adapt(tiny.bert(), tiny.arguments(tmp_path), strategy)
        torch.manual_seed(0)
        tiny.bert()
        torch.set_rng_state(before)
    model, args = tiny.bert(), tiny.arguments(tmp_path)
    before = torch.get_rng_state()
    for strategy in STRATEGIES:
        if strategy != "lora":
            adapt(model, args, strategy)
    adapt(model, args, "lora")
    assert torch.equal(before, torch.get_rng_state())


def test_options_as_a_configuration_file_has_them(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    made = adapt(
        tiny.bert(), args, "gradual", schedule={"at_steps": [1, 2, 3, 4]}, rates={"slanted_triangular": {"ratio": 8}}
    )
    unfreezing = made["callbacks"][1]
    assert unfreezing.schedule == at_steps([1, 2, 3, 4])
    assert unfreezing.rates == slanted_triangular(ratio=8)
    with pytest.raises(ValueError, match=r"names no schedule or rule; expected one key of .*\(`at_steps`"):
        adapt(tiny.bert(), args, "gradual", schedule={"at_step": [1]})


def test_the_strategy_prints_what_it_did(tmp_path: Path) -> None:
    strategy = adapt(tiny.bert(), tiny.arguments(tmp_path), "top_k", k=1)["callbacks"][0]
    assert str(strategy) == "strategy top_k: trains head, encoder.layer.2; the rest stays frozen (k=1)"
    assert repr(strategy) == "Strategy('top_k', {'k': 1})"


@pytest.mark.parametrize(
    ("strategy", "options", "match"),
    [
        ("graduel", {}, r"unknown strategy `graduel`. Closest names: `gradual`"),
        ("full", {"decay": 0.9}, r"strategy `full` has no option `decay`.*Options: none"),
        ("gradual", {"decai": 0.9}, r"has no option `decai`. Closest names: `decay`"),
        ("top_k", {"k": 9}, "`k` is 9; expected the number of groups below the head to train, from 1 to 4"),
        ("top_k", {"k": 0}, "`k` is 0"),
    ],
)
def test_unknown_names_are_refused(strategy: str, options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        adapt(tiny.bert(), tiny.arguments(tmp_path), strategy, **options)


def test_strategies_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for strategy in ("scratch", "lora"):
        with pytest.raises(ValueError, match=f"`{strategy}` .*Sequential"):
            adapt(plain, args, strategy)
    for strategy in ("head", "probe"):
        with pytest.raises(
            ValueError, match=f"`{strategy}` trains the head alone, but BertModel has no head of its own"
        ):
            adapt(tiny.bert().bert, args, strategy)
    assert str(adapt(tiny.bert().bert, args, "top_k", k=1)["callbacks"][0]).startswith("strategy top_k: trains encoder")
    adapted = adapt(tiny.bert(), args, "lora")["model"]
    with pytest.raises(ValueError, match="without adapters"):
        adapt(adapted, args, "lora")


def test_what_is_made_anew_keeps_how_the_trainer_scales_its_loss(tmp_path: Path) -> None:
    model = tiny.bert()
    assert model.accepts_loss_kwargs is False
    assert adapt(model, tiny.arguments(tmp_path), "scratch")["model"].accepts_loss_kwargs is False
