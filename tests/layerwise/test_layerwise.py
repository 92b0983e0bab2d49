"""Discriminative rates: the rule, the groups in the optimizer, and what a checkpoint of other groups does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, TrainerState

from tests import tiny
from tl_callbacks import LayerGroup, LayerGroups, attach, group_layers, layerwise_optimizer
from tl_callbacks.layerwise import layer_scales
from tl_callbacks.layerwise.factory import check_recorded, record_groups

NAMES = ("embeddings", "layer.0", "layer.1", "head")
GROUPS = LayerGroups(tuple(LayerGroup(name, (name,)) for name in NAMES), "head")
HEADLESS = LayerGroups(tuple(LayerGroup(name, (name,)) for name in NAMES[:3]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (1, 1, 1, 1)),
        ({"decay": 0.5}, (0.125, 0.25, 0.5, 1)),
        ({"decay": 1 / 2.6}, (2.6**-3, 2.6**-2, 2.6**-1, 1)),
        ({"head_factor": 10}, (1, 1, 1, 10)),
        ({"decay": 0.5, "head_factor": 4}, (0.125, 0.25, 0.5, 4)),
        ({"factors": {"layer.*": 0.3, "layer.1": 0}}, (1, 0.3, 0, 1)),
    ],
)
def test_scales(arguments: dict[str, Any], expected: tuple[float, ...]) -> None:
    assert tuple(layer_scales(GROUPS, **arguments).values()) == pytest.approx(expected)
    assert tuple(layer_scales(GROUPS, **arguments)) == NAMES


def test_without_a_head_the_top_block_has_the_full_rate() -> None:
    assert tuple(layer_scales(HEADLESS, decay=0.5).values()) == (0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    ("groups", "arguments", "match"),
    [
        (GROUPS, {"decay": 2.6}, r"`decay` is 2.6; expected a ratio above 0 and at most 1.*decay=1 / 2.6"),
        (GROUPS, {"decay": 0}, "`decay` is 0"),
        (GROUPS, {"head_factor": 0}, "`head_factor` is 0"),
        (GROUPS, {"factors": {"layer.1": -1}}, "the factor of `layer.1` is -1"),
        (GROUPS, {"factors": {"layers.1": 1}}, r"pattern `layers.1` matches no group. Closest names: `layer.1`"),
        (HEADLESS, {"head_factor": 2}, r"the model has no head of its own \(its last group is `layer.1`\)"),
    ],
)
def test_bad_numbers_are_refused(groups: LayerGroups, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        layer_scales(groups, **arguments)


def test_every_parameter_is_in_one_named_group_with_the_trainers_decay(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, weight_decay=0.1)
    groups = group_layers(model)
    plain = tiny.trainer(model, args)
    plain.create_optimizer()
    ours = tiny.trainer(model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5))
    ours.create_optimizer()
    assert type(ours.optimizer) is type(plain.optimizer)

    def decay(optimizer: Any) -> dict[int, float]:
        return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}

    assert decay(ours.optimizer) == decay(plain.optimizer)
    assert set(decay(ours.optimizer)) == {id(p) for p in model.parameters()}
    names = [group["name"] for group in ours.optimizer.param_groups]
    assert names[:2] == ["head", "head (no decay)"]
    assert len(set(names)) == len(names)
    rates = {group["layer_group"]: group["lr"] for group in ours.optimizer.param_groups}
    assert rates == {g.name: 1e-2 * 0.5 ** (len(groups) - 1 - n) for n, g in enumerate(groups)}
    for group in ours.optimizer.param_groups:
        assert set(group["param_names"]) <= set(groups[group["layer_group"]].parameters)


def test_the_decay_classes_are_the_trainers_for_a_model_whose_norms_have_other_names(tmp_path: Path) -> None:
    # The Trainer's name patterns miss Mamba's D and final norm; neutral means doing what it does.
    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4))
    args = tiny.arguments(tmp_path, weight_decay=0.1)
    trainer = tiny.trainer(model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, group_layers(model)))
    trainer.create_optimizer()
    decayed = {n for g in trainer.optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
    held = set(dict(model.named_parameters()))  # a tied head has a second name there
    assert decayed == set(trainer.get_decay_parameter_names(model)) & held
    assert "backbone.layers.0.mixer.D" in decayed


def test_lower_groups_move_less(tmp_path: Path) -> None:
    model = tiny.bert(dropout=0.0)
    start = tiny.state(model)
    groups = group_layers(model)
    args = tiny.arguments(tmp_path, max_steps=1, weight_decay=0.0, lr_scheduler_type="constant", max_grad_norm=0.0)
    trainer = tiny.trainer(model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.1))
    attach(trainer)
    trainer.train()
    # Adam's first step is the rate, for each element with a gradient.
    largest = {g.name: max(float((model.state_dict()[n] - start[n]).abs().max()) for n in g.parameters) for g in groups}
    assert largest == pytest.approx(
        {g.name: 1e-2 * 0.1 ** (len(groups) - 1 - n) for n, g in enumerate(groups)}, rel=0.03
    )


def test_groups_of_another_model_are_refused_with_near_names(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    optimizer = layerwise_optimizer(args, group_layers(tiny.bert(layers=4)))
    trainer = tiny.trainer(tiny.bert(), args, optimizer_cls_and_kwargs=optimizer)
    with pytest.raises(
        ValueError, match="are not those of this BertForSequenceClassification: 16 unknown and 0 missing"
    ):
        trainer.create_optimizer()
    with pytest.raises(ValueError, match=r"layerwise_optimizer: the groups are not those"):
        attach(trainer)


def test_without_attach_the_factory_works_alone(tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    args = tiny.arguments(tmp_path)
    optimizer = layerwise_optimizer(args, group_layers(model), factors={"embeddings": 0.0})
    tiny.trainer(model, args, optimizer_cls_and_kwargs=optimizer).train()
    assert not tiny.moved(start, tiny.state(model), ["bert.embeddings.word_embeddings.weight"])
    assert tiny.moved(start, tiny.state(model), ["classifier.weight"])


def test_optimizer_state_of_other_groups_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path)
    groups = group_layers(model)

    def optimizer(chosen: LayerGroups) -> torch.optim.Optimizer:
        return layerwise_optimizer(args, chosen)[0].build(model)

    saved = optimizer(groups).state_dict()
    optimizer(groups).load_state_dict(saved)
    merged = groups.merge(["encoder.layer.0", "encoder.layer.1"], "lower")
    with pytest.raises(ValueError, match=r"other parameter groups: 10 there, 8 here, first difference at number 4"):
        optimizer(merged).load_state_dict(saved)
    with pytest.raises(ValueError, match="other parameter groups: 1 there"):
        optimizer(groups).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_repr_shows_the_rates(tmp_path: Path) -> None:
    optimizer, kwargs = layerwise_optimizer(tiny.arguments(tmp_path), group_layers(tiny.bert()), decay=0.5)
    assert "encoder.layer.2: 0.005, head: 0.01)" in repr(optimizer)
    assert kwargs == {}


def test_recorded_groups_are_known_again_though_json_sorts_their_names(tmp_path: Path) -> None:
    groups = group_layers(tiny.bert(layers=11))  # layer.10 comes before layer.2 in a dictionary's order
    assert list(groups.names) != sorted(groups.names)
    state = TrainerState()
    record_groups(groups, state)
    state.save_to_json(str(tmp_path / "state.json"))
    resumed = TrainerState.load_from_json(str(tmp_path / "state.json"))
    check_recorded(groups, resumed)
    with pytest.raises(ValueError, match="belongs to other layer groups"):
        check_recorded(groups.merge(groups.names[:2], "low"), resumed)
