"""WiSE-FT: the ends are the two models bit for bit, the place is chosen by the rule, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests import tiny
from tl_callbacks import (
    PreflightError,
    RepresentationProbes,
    WeightAnchoring,
    WeightInterpolation,
    attach,
    events,
    group_layers,
)
from tl_callbacks.anchoring.operations.interpolation import Place, choose, interpolate_


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def trained(folder: Path, interpolation: WeightInterpolation | None, model: nn.Module, **options: Any) -> Any:
    callbacks = [] if interpolation is None else [interpolation]
    data = tiny.images() if options.pop("images", False) else None
    trainer = tiny.trainer(
        model, tiny.arguments(folder, **options), data, callbacks=callbacks, compute_metrics=accuracy
    )
    attach(trainer)
    trainer.train()
    return trainer


# -- the operation and the rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_ends_are_the_two_weights_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before, tuned = (torch.randn(7, 5, generator=generator).mul(1e3).to(dtype) for _ in range(2))
    place = torch.empty_like(before)
    assert torch.equal(interpolate_(place, before, tuned, 0.0), before)
    assert torch.equal(interpolate_(place, before, tuned, 1.0), tuned)
    halfway = interpolate_(place, before.double(), tuned, 0.5)  # a reference in another dtype
    tolerance = 4e3 * torch.finfo(dtype).eps
    assert torch.allclose(halfway.double(), (before.double() + tuned.double()) / 2, rtol=0, atol=tolerance)
    assert not torch.equal(halfway, before)


def test_the_rule() -> None:
    places = [
        Place(0.0, 0.1, 1.0),
        Place(0.25, 0.7, 0.99),
        Place(0.5, 0.8, 0.98),
        Place(0.75, 0.8, 0.9),
        Place(1, 0.8, 0.5),
    ]
    assert choose(places, greater_is_better=True).alpha == 0.5  # of equals the one nearest to pretrained
    assert choose(places, greater_is_better=True, min_retention=0.985).alpha == 0.25
    assert choose(places, greater_is_better=True, min_retention=0.98).alpha == 0.5
    assert choose(places[1:], greater_is_better=True, min_retention=1.0).alpha == 0.25  # the most there is
    assert choose(places, greater_is_better=False).alpha == 0.0
    broken = [Place(0.0, 0.1), Place(0.5, float("nan"))]
    assert choose(broken, greater_is_better=True).alpha == 0.0
    assert choose([Place(0.0, float("nan"), 1.0), Place(1.0, 0.3, 0.1)], greater_is_better=True).alpha == 1.0
    assert choose([Place(0.0, float("nan"), 1), Place(1, 9, 0.1)], greater_is_better=True, min_retention=0.9).alpha == 1
    assert choose([Place(0.0, float("inf")), Place(1.0, float("nan"))], greater_is_better=True).alpha == 1.0
    assert (
        choose([Place(0.0, 0.1, float("nan")), Place(1.0, 0.2, 0.3)], greater_is_better=True, min_retention=0.5).alpha
        == 1
    )
    with pytest.raises(ValueError, match="retention was not measured"):
        choose(broken, greater_is_better=True, min_retention=0.9)
    with pytest.raises(ValueError, match="no place"):
        choose([], greater_is_better=True)


# -- in a Trainer ------------------------------------------------------------------------------------------------------


def held_at_0(**options: Any) -> WeightInterpolation:
    """An interpolation that its rule leaves at 0: retention is 0 at 1, which is measured first, and 1 at 0."""
    return WeightInterpolation([0.0], retention=iter([0.0, 1.0]).__next__, min_retention=0.9, **options)


@pytest.mark.parametrize("kind", ["bert", "resnet"])
def test_at_its_ends_it_is_the_pretrained_model_and_the_tuned_one(kind: str, tmp_path: Path) -> None:
    """BatchNorm's statistics are part of a model."""
    make: Any = tiny.bert if kind == "bert" else tiny.resnet
    options: dict[str, Any] = {"images": kind == "resnet"}
    start, plain, back, body, same = tiny.state(make()), make(), make(), make(), make()
    trained(tmp_path / "plain", None, plain, **options)
    tuned = tiny.state(plain)
    floating = [name for name, tensor in start.items() if tensor.is_floating_point()]
    head = set(group_layers(plain)[-1].parameters)
    assert len(tiny.moved(start, tuned, floating)) == len(floating)
    trained(tmp_path / "back", held_at_0(exclude=()), back, **options)
    assert not tiny.moved(start, tiny.state(back), floating)
    trained(tmp_path / "body", held_at_0(), body, **options)
    found = tiny.state(body)
    assert not tiny.moved(tuned, found, head)
    assert not tiny.moved(start, found, set(floating) - head)
    trained(tmp_path / "same", WeightInterpolation([1.0]), same, **options)
    assert not tiny.moved(tuned, tiny.state(same))


def lora(**config: Any) -> Any:
    torch.manual_seed(0)
    model = tiny.bert(layers=2, dropout=0.0).double()
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4, **config))


def left_at(alpha: float) -> WeightInterpolation:
    return WeightInterpolation([alpha], retention=iter([0.0, 1.0]).__next__, min_retention=0.9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_of_lora_what_it_adds_is_scaled(alpha: float, tmp_path: Path) -> None:
    """Beside weights that were merged and then interpolated; the head stays tuned."""
    options = {"lora_alpha": 12, "lora_bias": True}
    model, tuned = lora(**options), lora(**options)
    start = {name: p.detach().clone() for name, p in lora(**options).get_base_model().named_parameters()}
    start = {name.replace(".base_layer", ""): tensor for name, tensor in start.items() if "lora_" not in name}
    trained(tmp_path / "plain", None, tuned, learning_rate=0.1)
    callback = WeightInterpolation([1.0]) if alpha == 1 else left_at(alpha)
    trained(tmp_path / "ours", callback, model, learning_rate=0.1)
    if alpha == 1:
        assert not tiny.moved(tiny.state(tuned), tiny.state(model))
    factors = {name: tensor for name, tensor in tiny.state(model).items() if "lora_A" in name}
    assert len(factors) == 13
    assert not tiny.moved({name: tiny.state(tuned)[name] for name in factors}, factors)
    dense, ours = tuned.merge_and_unload(), model.merge_and_unload()
    travelled = interpolated = 0
    for name, parameter in dense.named_parameters():
        if not name.startswith("classifier"):
            travelled += int((parameter - start[name]).norm() > 1e-3 * start[name].norm())
            interpolated += 1
            parameter.data = torch.lerp(start[name], parameter.data, alpha)
    assert travelled > 10
    for name, parameter in ours.named_parameters():
        expected = dense.get_parameter(name)
        assert (parameter - expected).norm() <= 1e-12 * expected.norm(), name
        if alpha == 0 and not name.startswith("classifier"):
            assert torch.equal(parameter, start[name]), name


def test_other_adapters_move_between_their_initial_state_and_the_tuned_one(tmp_path: Path) -> None:
    start, model = tiny.state(lora(use_dora=True)), lora(use_dora=True)
    trained(tmp_path, left_at(0.0), model, learning_rate=0.1)
    assert tiny.moved(start, tiny.state(model)) == {name for name in start if "modules_to_save" in name}


def test_a_run_resumed_with_another_reference_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    straight, resumed = tiny.bert(), tiny.bert()
    trainer = trained(tmp_path, left_at(0.5), straight, **saving)
    (event,) = events.read(trainer.state.log_history, "interpolation_start")
    recipe = json.loads((tmp_path / "recipe.json").read_text())["methods"]["WeightInterpolation"]
    assert recipe["reference"]["fingerprint"] == event["reference"]
    for seed in (0, 3):
        model = resumed if seed == 0 else tiny.bert(seed=seed)
        again = tiny.trainer(model, tiny.arguments(tmp_path, **saving), callbacks=[left_at(0.5)])
        attach(again)
        if seed == 0:
            again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
            assert not tiny.moved(tiny.state(straight), tiny.state(resumed))
        else:
            with pytest.raises(RuntimeError, match=r"WeightInterpolation has the reference .* expected the same"):
                again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_reference_may_live_in_another_dtype(dtype: torch.dtype | None, tmp_path: Path) -> None:
    start, model = tiny.state(tiny.bert()), tiny.bert()
    callback = held_at_0(exclude=(), reference_dtype=dtype, reference_device="cpu")
    trained(tmp_path, callback, model)
    expected = {name: tensor.to(dtype).to(tensor) if dtype else tensor for name, tensor in start.items()}
    floating = {name for name, tensor in start.items() if tensor.is_floating_point()}
    assert not tiny.moved({n: expected[n] for n in floating}, {n: tiny.state(model)[n] for n in floating})
    assert callback.facts()["reference"]["dtype"] == (dtype and "bfloat16")


def test_what_is_kept_is_the_best_of_the_curve(tmp_path: Path) -> None:
    model = tiny.bert()
    callback = WeightInterpolation(metric="accuracy")
    trainer = trained(tmp_path, callback, model, max_steps=40)
    assert [place.alpha for place in callback.places] == [number / 10 for number in range(11)]
    best = max(place.metric for place in callback.places)
    assert callback.chosen is not None
    assert callback.chosen.metric == best > callback.places[0].metric
    assert callback.chosen.alpha == min(place.alpha for place in callback.places if place.metric == best)
    assert trainer.evaluate()["eval_accuracy"] == best
    (event,) = events.read(trainer.state.log_history, "interpolation")
    assert event["alpha"] == callback.chosen.alpha
    assert [place["metric"] for place in event["curve"]] == [place.metric for place in callback.places]
    recipe = json.loads((tmp_path / "recipe.json").read_text())["methods"]["WeightInterpolation"]
    assert recipe["curve"] == event["curve"]
    assert recipe["alpha"] == event["alpha"]


def test_training_is_the_same_and_so_is_every_random_state(tmp_path: Path) -> None:
    plain, ours = tiny.bert(), tiny.bert()
    trained(tmp_path / "plain", None, plain)
    expected = torch.get_rng_state()
    trainer = trained(tmp_path / "ours", WeightInterpolation([0.0, 0.5], metric="accuracy"), ours)
    assert torch.equal(torch.get_rng_state(), expected)
    assert ours.training == plain.training
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3


def test_no_place_that_retains_enough(tmp_path: Path) -> None:
    retention = iter([0.1, 0.6, 0.7]).__next__
    callback = WeightInterpolation([0.2, 0.4], retention=retention, min_retention=0.8)
    with pytest.warns(UserWarning, match=r"no place .* retains 0.8; the model is left at alpha = 0.2"):
        trained(tmp_path, callback, tiny.bert())


def test_a_retention_that_fails_leaves_the_tuned_weights(tmp_path: Path) -> None:
    plain, model = tiny.bert(), tiny.bert()
    trained(tmp_path / "plain", None, plain)
    with pytest.raises(StopIteration):
        trained(tmp_path / "ours", WeightInterpolation([0.0, 0.5], retention=iter([1.0, 1.0]).__next__), model)
    assert not tiny.moved(tiny.state(plain), tiny.state(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alphas": []}, r"`alphas` is \(\); expected at least one"),
        ({"alphas": [0.5, 1.5]}, "each from 0 to 1"),
        ({"min_retention": 98, "retention": lambda: 1.0}, "`min_retention` is 98"),
        ({"min_retention": 0.9}, "given without `retention`"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WeightInterpolation(**options)


def test_what_would_go_wrong_is_said_before_training(tmp_path: Path) -> None:
    model, rows = tiny.bert(), tiny.texts()
    callbacks = [WeightAnchoring(0.1), RepresentationProbes(rows), WeightInterpolation()]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    with pytest.raises(PreflightError, match="WeightAnchoring stands before WeightInterpolation"):
        attach(trainer)
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[WeightInterpolation()])
    trainer.eval_dataset = None
    with pytest.raises(PreflightError, match="needs one development set, and the Trainer's eval_dataset holds none"):
        attach(trainer)
    trainer.eval_dataset = {"a": rows, "b": rows}
    with pytest.raises(PreflightError, match="holds several, by name"):
        attach(trainer)
    model.config._name_or_path = "runs/checkpoint-12"
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[WeightInterpolation()])
    with pytest.raises(PreflightError, match=r"`runs/checkpoint-12` for the pretrained"):
        attach(trainer)
    with pytest.raises(RuntimeError, match=r"Call attach\(trainer\)"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightInterpolation()]).train()
