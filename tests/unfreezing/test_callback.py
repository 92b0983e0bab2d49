"""GradualUnfreezing on a real Trainer: what moves moves when the plan says, and nothing else does."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    LayerGroups,
    NoEffectWarning,
    PreflightError,
    PreflightWarning,
    UnfreezeSchedule,
    at_fractions,
    at_steps,
    attach,
    every,
    group_layers,
    layerwise_optimizer,
    per_epoch,
    staged,
)
from tl_callbacks.events import read
from tl_callbacks.frozen.state import frozen_by_us
from tl_callbacks.parameters import parameters_by_name


class Steps(TrainerCallback):
    """Keeps the whole state after each step, and the modes that the last forward left."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.training: list[dict[str, bool]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))
        self.training.append({name: module.training for name, module in kwargs["model"].named_modules()})


class Boom(TrainerCallback):
    """Stops the run as a user does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def run(
    model: nn.Module,
    folder: Path,
    schedule: UnfreezeSchedule,
    *,
    data: list[dict[str, Any]] | None = None,
    attached: bool = True,
    keep_frozen: tuple[str, ...] = (),
    **overrides: Any,
) -> tuple[Trainer, Steps, LayerGroups]:
    groups = group_layers(model)
    steps = Steps()
    args = tiny.arguments(folder, **overrides)
    callbacks = [GradualUnfreezing(groups, schedule, keep_frozen=keep_frozen), steps]
    trainer = tiny.trainer(model, args, data, callbacks=callbacks)
    if attached:
        attach(trainer)
    trainer.train()
    return trainer, steps, groups


def in_state(model: nn.Module, groups: LayerGroups) -> dict[str, list[str]]:
    """State-dict names by group: parameters, and the buffers of the modules they are in."""
    owner = {name.rpartition(".")[0]: group.name for group in groups for name in group.parameters}
    result: dict[str, list[str]] = {group.name: list(group.parameters) for group in groups}
    for name, buffer in model.named_buffers():
        tracked = buffer.dtype.is_floating_point or "num_batches" in name
        if tracked and (module := name.rpartition(".")[0]) in owner:
            result[owner[module]].append(name)
    return result


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("bert", every(2)),
        ("bert", at_steps([3, 3, 7, 11])),
        ("bert", at_fractions([0.1, 0.25, 0.5, 0.9])),
        ("bert", per_epoch()),
        ("bert", staged([(4, 2), (8, "all")])),
        ("resnet", at_steps([2, 4, 6, 8])),
    ],
    ids=str,
)
def test_each_tensor_moves_exactly_when_the_plan_says(kind: str, schedule: UnfreezeSchedule, tmp_path: Path) -> None:
    model = tiny.bert() if kind == "bert" else tiny.resnet()
    data = tiny.texts(16) if kind == "bert" else tiny.images(16)
    trainer, steps, groups = run(model, tmp_path, schedule, data=data, max_steps=20)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradualUnfreezing))
    plan = callback.plan(max_steps=20, steps_per_epoch=4)
    names = in_state(model, groups)
    assert kind == "bert" or any("running_mean" in name for found in names.values() for name in found)
    for step in range(20):
        before, after = steps.states[step], steps.states[step + 1]
        for group in groups:
            changed = tiny.moved(before, after, names[group.name])
            if group.name in plan.at(step).open:
                still = set(names[group.name]) - changed
                # Softmax is indifferent to a bias of the keys, so its gradient is rounding noise or zero; rows of the
                # embeddings that a batch lacks make no tensor stand still.
                assert not {name for name in still if not name.endswith("key.bias")}, f"{group.name} stands at {step}"
            else:
                assert not changed, f"{group.name} moved at step {step}"
    for phase in plan:
        assert set(phase.opened) <= set(phase.open)
    assert len(plan.phases) > 1


def test_the_trace_equals_the_plan(tmp_path: Path) -> None:
    trainer, _, groups = run(tiny.bert(), tmp_path, at_steps([2, 5, 5, 9]))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradualUnfreezing))
    trace = [
        (e["step"], tuple(e["groups"]), e["trainable_parameters"]) for e in read(trainer.state.log_history, "opening")
    ]
    plan = callback.plan(max_steps=12)
    assert trace == [(phase.step, phase.opened, phase.num_parameters) for phase in plan]
    assert [step for step, _, _ in trace] == [0, 2, 5, 9]
    assert trace[-1][2] == sum(group.num_parameters for group in groups)


def test_the_plan_is_printed_before_step_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _, _ = run(tiny.bert(), tmp_path, every(2))
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradualUnfreezing))
    out = capsys.readouterr().out
    assert str(callback.plan(max_steps=12, steps_per_epoch=16)) in out
    assert out.index("rate factor") < out.index("'loss'")


def test_steps_and_epochs_agree_under_accumulation(tmp_path: Path) -> None:
    # 18 rows, batches of 4, accumulation 3: 5 batches, 2 optimizer steps an epoch.
    trainer, _, _ = run(
        tiny.bert(), tmp_path, per_epoch(), data=tiny.texts(18), gradient_accumulation_steps=3, max_steps=-1,
        num_train_epochs=5,
    )  # fmt: skip
    assert trainer.state.max_steps == 10
    assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, 2, 4, 6, 8]


def test_frozen_groups_have_no_dropout_and_open_ones_have(tmp_path: Path) -> None:
    _, steps, _ = run(tiny.bert(), tmp_path, at_steps([2, 4, 6, 8]))
    for step, modes in enumerate(steps.training):
        assert modes["bert.encoder.layer.0.output.dropout"] is (step >= 6)
        assert modes["bert.embeddings.dropout"] is (step >= 8)
        assert modes["dropout"] is True, "the head's dropout is never off"


def test_without_the_eval_hook_frozen_batchnorm_drifts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.state(tiny.resnet())
    running = [name for name in before if "running" in name and "embedder" in name]

    def drift(folder: str) -> set[str]:
        trainer, _, _ = run(
            tiny.resnet(), tmp_path / folder, at_steps([9, 10, 11]), data=tiny.images(), keep_frozen=("embeddings",)
        )
        assert trainer.model is not None
        return tiny.moved(before, tiny.state(trainer.model), running)

    assert drift("ours") == set()
    monkeypatch.setattr("tl_callbacks.unfreezing.callback.keep_in_eval", lambda model: None)
    assert drift("remedy off") == set(running)


def test_a_hand_made_freeze_never_moves_what_it_opens_and_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    trainer = tiny.trainer(
        model, tiny.arguments(tmp_path), callbacks=[GradualUnfreezing(group_layers(model), every(2))]
    )
    with pytest.raises(
        ValueError,
        match=r"`bert\.embeddings\.word_embeddings\.weight` and \d+ other parameters were frozen by hand.*keep_frozen",
    ):
        attach(trainer)


def test_a_hand_made_freeze_is_refused_without_attach_too(tmp_path: Path) -> None:
    model = tiny.bert()
    model.bert.requires_grad_(False)
    trainer = tiny.trainer(
        model, tiny.arguments(tmp_path), callbacks=[GradualUnfreezing(group_layers(model), every(2))]
    )
    with pytest.raises(ValueError, match="were frozen by hand"):
        trainer.train()


def test_what_a_model_freezes_itself_is_no_error_and_never_opens(tmp_path: Path) -> None:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    config = PegasusConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PegasusForConditionalGeneration(config)
    own = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert own, "the control: Pegasus' position tables"
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny.texts()]
    before = tiny.state(model)
    run(model, tmp_path, at_steps([2] * (len(group_layers(model)) - 1)), data=data)
    after = tiny.state(model)
    assert not tiny.moved(before, after, own)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == own
    assert tiny.moved(before, after)


def test_peft_adapters_open_and_the_base_never_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = tiny.state(model)
    _, steps, groups = run(model, tmp_path, at_steps([3, 6, 9]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    full = {n: name for n, name in zip(parameters_by_name(model), dict(model.named_parameters()), strict=True)}
    lower = [full[name] for name in groups["encoder.layer.0"].parameters]
    head = [full[name] for name in groups["head"].parameters]
    assert not tiny.moved(before, steps.states[9], lower)
    assert tiny.moved(before, steps.states[12], lower)
    assert tiny.moved(before, steps.states[1], head) == set(head)
    assert tiny.moved(before, steps.states[12]) <= trainable


def test_a_plain_module_with_a_loss_of_its_own(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8))
            self.out = nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.out(self.body(input_ids.float() / 50))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    _, steps, groups = run(Net(), tmp_path, at_steps([4]))
    assert groups.names == ("body", "head")
    assert not tiny.moved(steps.states[0], steps.states[4], groups["body"].parameters)
    assert tiny.moved(steps.states[4], steps.states[5], groups["body"].parameters)


def test_after_training_the_model_is_as_the_user_had_it(tmp_path: Path) -> None:
    model = tiny.bert()
    run(model, tmp_path, at_steps([2, 4]), keep_frozen=("embeddings", "encoder.layer.0"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks
    model.train()
    assert all(module.training for module in model.modules())
    assert not frozen_by_us(model)


def test_after_an_exception_the_model_is_as_the_user_had_it(tmp_path: Path) -> None:
    model = tiny.bert()
    callbacks = [GradualUnfreezing(group_layers(model), every(2)), Boom()]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks


def test_a_second_trainer_on_a_model_that_an_unattached_run_left_frozen(tmp_path: Path) -> None:
    model = tiny.bert()
    callbacks = [GradualUnfreezing(group_layers(model), every(2)), Boom()]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    with pytest.warns(UserWarning, match="was not attached"), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not model.bert.pooler.dense.weight.requires_grad, "the control: the stopped run left it frozen"
    before = tiny.state(model)
    run(model, tmp_path, at_steps([2, 4, 6, 8]))
    names = [name for name in parameters_by_name(model) if not name.endswith("key.bias")]
    assert tiny.moved(before, tiny.state(model), names) == set(names)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_notebook_cell_run_again_gives_the_same_run(tmp_path: Path) -> None:
    def cell(model: nn.Module, folder: str) -> tuple[dict[str, torch.Tensor], Any]:
        trainer, _, _ = run(model, tmp_path / folder, at_steps([2, 4, 6, 8]))
        return tiny.state(model), read(trainer.state.log_history, "opening")

    model = tiny.bert()
    first, events = cell(model, "a")
    start = tiny.bert()
    model.load_state_dict(start.state_dict())
    second, again = cell(model, "b")
    assert tiny.moved(first, second) == set()
    assert events == again


def test_a_second_train_starts_frozen_again(tmp_path: Path) -> None:
    model = tiny.bert()
    trainer, steps, groups = run(model, tmp_path, at_steps([2, 4, 6, 8]))
    middle = tiny.state(model)
    del steps.states[:]
    trainer.train()
    assert not tiny.moved(middle, steps.states[2], groups["embeddings"].parameters)
    assert tiny.moved(middle, steps.states[12], groups["embeddings"].parameters)
    assert tiny.moved(middle, steps.states[1], groups["head"].parameters)


def test_load_best_model_at_end(tmp_path: Path) -> None:
    model = tiny.bert()
    trainer, _, _ = run(
        model, tmp_path, at_steps([2, 4, 6, 8]), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
        save_strategy="steps", save_steps=4, metric_for_best_model="loss",
    )  # fmt: skip
    best = Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors"
    from safetensors.torch import load_file

    saved = load_file(best)
    assert saved
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items() if name in saved)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_early_stopping_works_beside_it(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="eval_runtime", greater_is_better=True,
    )  # fmt: skip
    callbacks = [GradualUnfreezing(group_layers(model), every(2)), EarlyStoppingCallback(1, 1e9)]
    trainer = tiny.trainer(model, args, callbacks=callbacks)
    with pytest.warns(PreflightWarning, match="at step 4, before `embeddings` opens at step 8"):
        attach(trainer)
    trainer.train()
    assert trainer.state.global_step < 12
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_groups_that_never_open_are_named(tmp_path: Path) -> None:
    model = tiny.bert()
    trainer = tiny.trainer(
        model, tiny.arguments(tmp_path), callbacks=[GradualUnfreezing(group_layers(model), every(5))]
    )
    with pytest.warns(PreflightWarning, match="never opens `embeddings`, `encoder.layer.0` within 12 steps"):
        attach(trainer)
    trainer.train()


def test_groups_that_are_held_frozen_are_no_warning(tmp_path: Path) -> None:
    model = tiny.bert()
    before = tiny.state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, groups = run(
            model, tmp_path, at_steps([5]), keep_frozen=("embeddings", "encoder.layer.0", "encoder.layer.1")
        )
    assert not tiny.moved(before, tiny.state(model), groups["encoder.layer.1"].parameters)
    assert tiny.moved(before, tiny.state(model), groups["encoder.layer.2"].parameters)


def test_a_schedule_that_freezes_nothing_says_so(tmp_path: Path) -> None:
    model = tiny.bert()
    callbacks = [GradualUnfreezing(group_layers(model), at_steps([0, 0, 0, 0]))]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    attach(trainer)
    with pytest.warns(NoEffectWarning, match="everything open from step 0"):
        trainer.train()


def test_bad_arguments_are_refused() -> None:
    groups = group_layers(tiny.bert())
    with pytest.raises(ValueError, match="`keep_frozen` holds `head`"):
        GradualUnfreezing(groups, every(2), keep_frozen=("head",))
    with pytest.raises(ValueError, match=r"pattern `embedings` matches no group. Closest names: `embeddings`"):
        GradualUnfreezing(groups, every(2), keep_frozen=("embedings",))
    with pytest.raises(ValueError, match="`rates` is 'mine'"):
        GradualUnfreezing(groups, every(2), rates="mine")  # type: ignore[arg-type]


def test_groups_of_another_model_are_refused(tmp_path: Path) -> None:
    groups = group_layers(tiny.bert(layers=4))
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[GradualUnfreezing(groups, every(2))])
    with pytest.raises(ValueError, match=r"name `bert\.encoder\.layer\.3.*does not have"):
        attach(trainer)


def test_an_optimizer_without_the_frozen_parameters_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3)
    callbacks = [GradualUnfreezing(group_layers(model), every(2))]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="are not in the optimizer, so opening them would move nothing"):
        attach(trainer)


def test_an_optimizer_of_the_users_with_all_parameters_works(tmp_path: Path) -> None:
    model = tiny.bert()
    before = tiny.state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    callbacks = [GradualUnfreezing(group_layers(model), at_steps([3, 3, 3, 3]))]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks, optimizers=(optimizer, None))
    attach(trainer)
    trainer.train()
    assert tiny.moved(before, tiny.state(model), ["bert.embeddings.word_embeddings.weight"])


def test_two_unfreezing_callbacks_are_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    groups = group_layers(model)
    callbacks = [GradualUnfreezing(groups, every(2)), GradualUnfreezing(groups, every(3))]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    with pytest.raises(ValueError, match="found 1 problem:\n- the Trainer has several GradualUnfreezing"):
        attach(trainer)


def test_all_findings_come_at_once(tmp_path: Path) -> None:
    model = tiny.bert()
    model.classifier.weight.requires_grad_(False)
    groups = group_layers(tiny.bert(layers=4))
    args = tiny.arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    other = tiny.arguments(tmp_path)
    trainer = tiny.trainer(
        model,
        args,
        callbacks=[GradualUnfreezing(groups, every(2))],
        optimizer_cls_and_kwargs=layerwise_optimizer(other, groups),
    )
    with pytest.raises(ValueError, match="found 5 problems") as caught:
        attach(trainer)
    for text in ("frozen by hand", "other arguments", "layerwise_optimizer: the groups", "groups name", "plateau"):
        assert text in str(caught.value)


def test_attaching_after_training_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
    trainer.train()
    with pytest.raises(ValueError, match="already trained 12 steps"):
        attach(trainer)


def test_model_init(tmp_path: Path) -> None:
    groups = group_layers(tiny.bert())
    steps = Steps()
    trainer = Trainer(
        model_init=lambda: tiny.bert(),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.texts(),
        callbacks=[GradualUnfreezing(groups, at_steps([2, 4, 6, 8])), steps],
    )
    attach(trainer)
    trainer.train()
    assert not tiny.moved(steps.states[0], steps.states[8], groups["embeddings"].parameters)
    assert tiny.moved(steps.states[8], steps.states[9], groups["embeddings"].parameters)


def test_seq2seq_trainer(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8, decoder_start_token_id=0)
    )
    groups = group_layers(model)
    steps = Steps()
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in tiny.texts()]
    args = Seq2SeqTrainingArguments(**{
        "output_dir": str(tmp_path), "max_steps": 12, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "log_level": "error", "save_strategy": "no", "per_device_train_batch_size": 4,
        "dataloader_pin_memory": False,
    })  # fmt: skip
    callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 6, 8])), steps]
    trainer = Seq2SeqTrainer(model, args, train_dataset=data, callbacks=callbacks)
    attach(trainer)
    trainer.train()
    assert not tiny.moved(steps.states[0], steps.states[8], ["shared.weight"])
    assert tiny.moved(steps.states[8], steps.states[9], ["shared.weight"])


def test_an_iterable_dataset_has_no_epochs_to_count(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(tiny.texts())

    model = tiny.bert()
    args = tiny.arguments(tmp_path)
    trainer = Trainer(
        model, args, train_dataset=Stream(), callbacks=[GradualUnfreezing(group_layers(model), per_epoch())]
    )
    with pytest.raises(PreflightError, match="`steps_per_epoch` is None"):
        attach(trainer)
    fresh = tiny.bert()
    callbacks = [GradualUnfreezing(group_layers(fresh), at_fractions([0.2, 0.4, 0.6, 0.8]))]
    trainer = Trainer(fresh, args, train_dataset=Stream(), callbacks=callbacks)
    attach(trainer)
    trainer.train()
    assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, 3, 5, 8, 10]


def test_auto_find_batch_size_trains_again_from_frozen(tmp_path: Path) -> None:
    class OutOfMemoryOnce(TrainerCallback):
        raised = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.raised and state.global_step == 4:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    model = tiny.bert()
    groups = group_layers(model)
    steps = Steps()
    args = tiny.arguments(tmp_path, auto_find_batch_size=True)
    boom = OutOfMemoryOnce()
    callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 6, 8])), steps, boom]
    trainer = tiny.trainer(model, args, callbacks=callbacks)
    attach(trainer)
    trainer.train()
    assert boom.raised
    assert [event["step"] for event in read(trainer.state.log_history, "opening")] == [0, 2, 4, 6, 8]
    restart = steps.states[5]
    assert not tiny.moved(restart, steps.states[5 + 8], groups["embeddings"].parameters)
    assert tiny.moved(restart, steps.states[5 + 9], groups["embeddings"].parameters)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda groups: groups.merge(["encoder.layer.*"], "encoder"), "`encoder.layer.0` against `encoder`"),
        (
            lambda g: LayerGroups((g["encoder.layer.0"], g["embeddings"], *g[2:]), g.head),
            "`embeddings` against `encoder.layer.0`",
        ),
    ],
    ids=["merged", "another order"],
)
def test_groups_that_differ_from_the_optimizers_are_refused(change: Any, match: str, tmp_path: Path) -> None:
    model = tiny.bert()
    groups = group_layers(model)
    args = tiny.arguments(tmp_path)
    optimizer = layerwise_optimizer(args, change(groups))
    callbacks = [GradualUnfreezing(groups, every(2))]
    trainer = tiny.trainer(model, args, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer)
    with pytest.raises(ValueError, match=f"different groups .*{match}"):
        attach(trainer)


def test_another_strategy_after_an_unattached_run_was_stopped_trains_everything(tmp_path: Path) -> None:
    model = tiny.bert()
    callbacks = [GradualUnfreezing(group_layers(model), every(2)), Boom()]
    with pytest.warns(UserWarning, match="was not attached"), pytest.raises(KeyboardInterrupt):
        tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks).train()
    before = tiny.state(model)
    trainer = tiny.trainer(model, tiny.arguments(tmp_path))
    attach(trainer)
    assert not model._forward_pre_hooks
    trainer.train()
    assert tiny.moved(before, tiny.state(model), ["bert.embeddings.word_embeddings.weight"])
