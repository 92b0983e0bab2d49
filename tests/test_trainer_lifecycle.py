"""Trainings that are repeated, made anew, cut short or resumed from half of what they need; and the compiled model."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from tests import tiny
from tests.test_trainer_features import FORMS, OPENINGS, Steps, assert_moves_by_plan, run
from tl_callbacks import (
    GradualUnfreezing,
    PreflightWarning,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
    per_epoch,
)
from tl_callbacks.events import read


class Hooks(TrainerCallback):
    """Counts at each step the hooks on the model's root and on the optimizer; refuses batches above a size."""

    def __init__(self, largest_batch: int = 10**9) -> None:
        self.largest_batch = largest_batch
        self.counts: list[tuple[int, int]] = []
        self.refused = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts = []
        self.optimizer = kwargs["optimizer"].optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks = len(kwargs["model"]._forward_pre_hooks)
        self.counts.append((hooks, len(self.optimizer._optimizer_step_pre_hooks)))

    def limit(self, module: nn.Module, inputs: Any, kwargs: Any) -> None:
        if module.training and len(kwargs["input_ids"]) > self.largest_batch:
            self.refused += 1
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")


def out_of_memory(folder: Path, *, batch: int, find: bool, form: Any) -> tuple[Trainer, Hooks, Steps]:
    """Three epochs on a machine that holds batches of four at most; two groups open at each epoch."""
    model, hooks, steps = tiny.bert(dropout=0.0), Hooks(largest_batch=4), Steps()
    args = tiny.arguments(
        folder, per_device_train_batch_size=batch, auto_find_batch_size=find, max_steps=-1, num_train_epochs=3
    )
    groups = group_layers(model)
    callbacks = [
        GradualUnfreezing(groups, per_epoch(2), rates="own"),
        WeightAnchoring(0.1, form=form, reference=tiny.state(tiny.bert(seed=3))),
        hooks,
        steps,
    ]
    optimizer = layerwise_optimizer(args, groups, decay=0.8)
    trainer = tiny.trainer(model, args, tiny.texts(24), callbacks=callbacks, optimizer_cls_and_kwargs=optimizer)
    attach(trainer)
    handle = model.register_forward_pre_hook(hooks.limit, with_kwargs=True)
    trainer.train()
    handle.remove()
    return trainer, hooks, steps


@pytest.mark.parametrize("form", FORMS)
def test_a_smaller_batch_after_running_out_of_memory_is_a_run_with_that_batch(form: Any, tmp_path: Path) -> None:
    straight, hooks, steps = out_of_memory(tmp_path / "straight", batch=4, find=False, form=form)
    found, again, more = out_of_memory(tmp_path / "found", batch=8, find=True, form=form)
    assert (hooks.refused, again.refused) == (0, 4), "8, 7, 6 and 5 are too many"
    assert tiny.moved(steps.states[-1], more.states[-1]) == set()
    assert tiny.moved(steps.states[0], steps.states[-1])
    assert again.counts == hooks.counts
    assert max(count for count, _ in again.counts) > 1, "hooks are counted"
    openings = read(found.state.log_history, "opening")
    assert openings == read(straight.state.log_history, "opening")
    assert [(event["step"], len(event["groups"])) for event in openings] == [(0, 1), (6, 2), (12, 2)]
    plan = json.loads((tmp_path / "found" / "recipe.json").read_text())["methods"]["GradualUnfreezing"]["plan"]
    assert [phase["step"] for phase in plan] == [0, 6, 12]
    assert found.model is not None
    assert not found.model._forward_pre_hooks


def test_hooks_that_pile_up_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, hooks, steps = out_of_memory(tmp_path / "straight", batch=4, find=False, form="decoupled")
    monkeypatch.setattr(WeightAnchoring, "restore", lambda self, model: None)
    _, again, more = out_of_memory(tmp_path / "found", batch=8, find=True, form="decoupled")
    assert again.counts != hooks.counts
    assert tiny.moved(steps.states[-1], more.states[-1])


def test_every_model_of_model_init_has_its_own_reference(tmp_path: Path) -> None:
    seeds = itertools.count()
    starts: list[dict[str, torch.Tensor]] = []

    class Starts(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            starts.append(tiny.state(kwargs["model"]))

    model = tiny.bert()
    anchor = WeightAnchoring(0.1)
    trainer = Trainer(
        model_init=lambda: tiny.bert(seed=next(seeds)),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.texts(),
        callbacks=[GradualUnfreezing(group_layers(model), at_steps(OPENINGS)), anchor, Starts()],
    )
    attach(trainer)
    for number in range(2):
        trainer.train()
        assert anchor._taken is not None
        weights = anchor._taken.tensors
        assert not tiny.moved({name: starts[number][name] for name in weights}, weights)
        assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, *OPENINGS]
    assert len(tiny.moved(starts[0], starts[1])) > 20, "the control: another model each time"


def test_a_trial_of_a_search_is_a_training_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(folder: Path, **overrides: Any) -> tuple[Trainer, Steps]:
        steps = Steps()
        args = tiny.arguments(folder, max_steps=-1, num_train_epochs=3, **overrides)
        groups = group_layers(tiny.bert())
        trainer = Trainer(
            model_init=lambda: tiny.bert(),
            args=args,
            train_dataset=tiny.texts(24),
            optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.8),
            callbacks=[GradualUnfreezing(groups, per_epoch(2), rates="own"), WeightAnchoring(0.1), steps],
        )
        attach(trainer)
        return trainer, steps

    search, steps = made(tmp_path / "search")
    # As Ray's search does it, whose trials are mappings; the package itself is asked for their meaning and folder.
    search.hp_search_backend = HPSearchBackend.RAY
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setattr(search, "_get_output_dir", lambda trial: search.args.output_dir)
    ends = []
    for rate in (2e-3, 2e-2):
        steps.states.clear()
        search.train(trial={"learning_rate": rate})
        single, expected = made(tmp_path / "single", learning_rate=rate)
        single.train()
        assert tiny.moved(expected.states[-1], steps.states[-1]) == set()
        assert read(search.state.log_history, "opening") == read(single.state.log_history, "opening")
        ends.append(steps.states[-1])
    assert tiny.moved(*ends), "the control: trials differ"


@pytest.mark.parametrize("form", FORMS)
def test_a_second_train_pulls_once_a_step_toward_the_pretrained_weights(form: Any, tmp_path: Path) -> None:
    model, hooks = tiny.bert(), Hooks()
    start = tiny.state(model)
    anchor = WeightAnchoring(0.05, form=form)
    callbacks = [GradualUnfreezing(group_layers(model), at_steps(OPENINGS)), anchor, hooks]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    attach(trainer)
    counts = []
    for _ in range(2):
        trainer.train()
        counts.append(hooks.counts)
        assert anchor._taken is not None
        weights = anchor._taken.tensors
        assert not tiny.moved({name: start[name] for name in weights}, weights)
        assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, *OPENINGS]
        assert len([entry for entry in trainer.state.log_history if "tl/unfreezing/open_groups" in entry]) == 5
    assert counts[0] == counts[1]
    assert sum(map(sum, counts[0])) > 12, "hooks are counted"


def test_distances_are_of_the_weights_of_their_step_and_at_the_end_of_the_best(tmp_path: Path) -> None:
    metrics = iter([1.0, 0.0, 0.0])
    model, anchor = tiny.bert(), WeightAnchoring(0.01)
    args = tiny.arguments(
        tmp_path, max_steps=10, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    callbacks = [GradualUnfreezing(group_layers(model), at_steps([0, 0, 1, 2])), anchor]
    trainer = tiny.trainer(model, args, callbacks=callbacks, compute_metrics=lambda _: {"score": next(metrics)})
    attach(trainer)
    trainer.train()
    assert trainer.state.best_global_step == 4
    logged = [
        (entry["step"], {k.removeprefix("tl/anchor/"): v for k, v in entry.items() if k.startswith("tl/anchor/")})
        for entry in trainer.state.log_history
        if "tl/anchor/embeddings" in entry
    ]
    steps, (best, later, last, final) = zip(*logged, strict=True)
    assert steps == (4, 8, 10, 10)
    assert anchor.distances(model) == best == final
    assert best != later != last != best, "the control: the last weights are others"


def test_several_evaluation_sets_and_one_before_training_repeat_nothing(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4, eval_on_start=True)
    callbacks = [GradualUnfreezing(group_layers(model), at_steps(OPENINGS)), WeightAnchoring(0.1)]
    trainer = tiny.trainer(model, args, callbacks=callbacks)
    trainer.eval_dataset = {"one": tiny.texts(8), "two": tiny.texts(8)}
    attach(trainer)
    trainer.train()
    history = trainer.state.log_history
    assert sum("eval_one_loss" in entry for entry in history) == sum("eval_two_loss" in entry for entry in history) == 4
    assert [entry["step"] for entry in history if "tl/anchor/embeddings" in entry] == [0, 4, 8, 12]
    assert [event["step"] for event in read(history, "opening")] == [0, *OPENINGS]
    assert [entry["step"] for entry in history if "tl/unfreezing/open_groups" in entry] == [0, *OPENINGS]


def test_evaluation_leaves_frozen_groups_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    model = tiny.bert()
    _, steps = run(model, tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert_moves_by_plan(model, steps)


@pytest.mark.parametrize("anchored", [False, True])
def test_weights_alone_are_no_checkpoint_to_resume_from(anchored: bool, tmp_path: Path) -> None:
    def made() -> Trainer:
        model = tiny.bert()
        callbacks: list[Any] = [GradualUnfreezing(group_layers(model), at_steps(OPENINGS), rates="own")]
        callbacks += [WeightAnchoring(0.1)] if anchored else []
        args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True)
        trainer = tiny.trainer(model, args, callbacks=callbacks)
        attach(trainer)
        return trainer

    made().train()
    with pytest.raises(ValueError, match=r"no checkpoint .*save_only_model=True writes weights alone"):
        made().train(resume_from_checkpoint=True)
    trainer = made()
    with pytest.warns(UserWarning, match=r"checkpoint-3` holds no optimizer: save_only_model=True leaves it out"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, *OPENINGS]
    assert trainer.state.global_step == 12


def test_a_path_that_is_no_checkpoint_is_the_trainers_own_error(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
    attach(trainer)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


class Noise(TrainerCallback):
    """Notes at each step whether the embedding gave noise: its output is not what its weights say."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.noisy: list[bool] = []
        self.now = False
        embedding.register_forward_hook(self.compare)

    def compare(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.now = not torch.equal(output, nn.functional.embedding(inputs[0], module.weight))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer's hook is there now; ours must see what it returns.
        hooks = kwargs["model"].get_input_embeddings()._forward_hooks
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook == self.compare))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.noisy.append(self.now)


def noise(folder: Path, openings: list[int] | None, **overrides: Any) -> list[bool]:
    model = tiny.bert()
    noise = Noise(model.get_input_embeddings())
    callbacks = [GradualUnfreezing(group_layers(model), at_steps(openings))] if openings is not None else []
    args = tiny.arguments(folder, **{"neftune_noise_alpha": 5.0, **overrides})
    trainer = tiny.trainer(model, args, callbacks=[*callbacks, noise])
    attach(trainer)
    trainer.train()
    return noise.noisy


def test_neftune_waits_until_the_embeddings_open_and_that_is_said(tmp_path: Path) -> None:
    assert noise(tmp_path, None) == [True] * 12
    assert noise(tmp_path, None, neftune_noise_alpha=None) == [False] * 12
    with pytest.warns(PreflightWarning, match=r"neftune_noise_alpha=5.0 adds no noise before step 5: `embeddings` is"):
        assert noise(tmp_path, [1, 2, 3, 5]) == [False] * 5 + [True] * 7
    with pytest.warns(PreflightWarning) as told:
        assert noise(tmp_path, [1, 2, 3]) == [False] * 12
    assert any("adds no noise in this training: `embeddings` is frozen" in str(w.message) for w in told)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_opens_groups_too(form: Any, tmp_path: Path) -> None:
    model = tiny.bert(dropout=0.0)
    with pytest.warns(PreflightWarning, match="compiles once more at each of the"):
        _, steps = run(model, tmp_path / "compiled", form=form, torch_compile=True)
    assert_moves_by_plan(model, steps)
    _, eager = run(tiny.bert(dropout=0.0), tmp_path / "eager", form=form)
    for name, tensor in eager.states[1].items():
        assert torch.allclose(tensor, steps.states[1][name], atol=1e-5), name
