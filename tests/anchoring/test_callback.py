"""WeightAnchoring on a real Trainer, against the penalty as an autograd loss and against plain loops."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR, SequentialLR
from transformers import Trainer, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    NoEffectWarning,
    WeightAnchoring,
    WeightInterpolation,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
)
from tl_callbacks.anchoring import Decoupled

STRENGTH = 0.5
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "clipping": {"max_grad_norm": 0.05},
    "accumulation and clipping": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
}


def double(**config: Any) -> Any:
    return tiny.bert(dropout=0.0, **config).double()


class PenalisedTrainer(Trainer):
    """The reference: the penalty as a term of the loss, by autograd, shared among the micro-batches."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            # The Trainer divides the loss by the number of micro-batches, so the term counts once a step.
            anchored = [n for n, _ in model.named_parameters() if not n.startswith("classifier")]
            parameters = dict(model.named_parameters())
            loss = loss + STRENGTH * sum((parameters[n] - self.reference[n]).square().sum() for n in anchored)  # type: ignore[attr-defined]
        return (loss, outputs) if return_outputs else loss


def distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(torch.sqrt(sum(((one[n] - other[n]).double() ** 2).sum() for n in one)))  # type: ignore[call-overload]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_penalty_is_the_autograd_loss(setting: str, optim: str, tmp_path: Path) -> None:
    # Start away from the reference, so that the penalty counts from the first step.
    reference = tiny.state(double(seed=3))
    overrides = {"optim": optim, "adam_epsilon": 1e-3, **SETTINGS[setting]}
    plain, theirs, ours = double(), double(), double()
    tiny.trainer(plain, tiny.arguments(tmp_path / "plain", **overrides)).train()
    penalised = PenalisedTrainer(theirs, tiny.arguments(tmp_path / "a", **overrides), train_dataset=tiny.texts())
    penalised.reference = reference  # type: ignore[attr-defined]
    penalised.train()
    anchor = WeightAnchoring(STRENGTH, form="penalty", reference=reference)
    trainer = tiny.trainer(ours, tiny.arguments(tmp_path / "b", **overrides), callbacks=[anchor])
    attach(trainer)
    trainer.train()
    gap = distances(tiny.state(theirs), tiny.state(ours))
    effect = distances(tiny.state(plain), tiny.state(ours))
    assert effect > 1e-3, "the control: the penalty must change the run"
    assert gap < 1e-12 * effect


@pytest.mark.parametrize("when", ["after clipping", "in every micro-batch"])
def test_the_penalty_in_the_wrong_place_is_seen(when: str, tmp_path: Path) -> None:
    reference = tiny.state(double(seed=3))
    norm = 0.05 if when == "after clipping" else 100.0
    overrides = {"optim": "sgd", "gradient_accumulation_steps": 4, "max_grad_norm": norm}
    theirs, ours = double(), double()
    penalised = PenalisedTrainer(theirs, tiny.arguments(tmp_path / "a", **overrides), train_dataset=tiny.texts())
    penalised.reference = reference  # type: ignore[attr-defined]
    penalised.train()

    class Wrong(TrainerCallback):
        def add(self, model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if not name.startswith("classifier") and parameter.grad is not None:
                    parameter.grad += 2 * STRENGTH * (parameter.detach() - reference[name])

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if when == "in every micro-batch":
                self.add(kwargs["model"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if when == "after clipping":
                self.add(kwargs["model"])

    tiny.trainer(ours, tiny.arguments(tmp_path / "b", **overrides), callbacks=[Wrong()]).train()
    assert distances(tiny.state(theirs), tiny.state(ours)) > 1e-3


class Reference(TrainerCallback):
    """The decoupled pull written out: before each step, with the rate that the step uses."""

    def __init__(
        self, strengths: dict[str, float], reference: dict[str, torch.Tensor], peaks: dict[str, float]
    ) -> None:
        self.strengths, self.reference, self.peaks = strengths, reference, peaks

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = {id(p): g["lr"] for g in kwargs["optimizer"].param_groups for p in g["params"]}
        with torch.no_grad():
            for name, parameter in kwargs["model"].named_parameters():
                if name in self.strengths:
                    share = self.strengths[name] * rates[id(parameter)] / self.peaks[name]
                    parameter -= share * (parameter - self.reference[name])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])
def test_the_decoupled_pull_is_the_formula(optim: str, tmp_path: Path) -> None:
    reference = tiny.state(double(seed=3))
    overrides = {"optim": optim, "warmup_steps": 3, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
    strength = {"**": 0.02, "encoder.layer.1": 0.2, "embeddings": 0.0}
    theirs, ours = double(), double()
    groups = group_layers(theirs)
    by_group = {g.name: strength.get(g.name, 0.02) for g in groups if g.name not in ("head", "embeddings")}
    strengths = {name: by_group[g.name] for g in groups if g.name in by_group for name in g.parameters}
    args = tiny.arguments(tmp_path / "a", **overrides)
    optimizer = layerwise_optimizer(args, groups, decay=0.5)
    peaks = {name: args.learning_rate * optimizer[0].scales[g.name] for g in groups for name in g.parameters}
    tiny.trainer(
        theirs, args, optimizer_cls_and_kwargs=optimizer, callbacks=[Reference(strengths, reference, peaks)]
    ).train()
    args = tiny.arguments(tmp_path / "b", **overrides)
    trainer = tiny.trainer(
        ours,
        args,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5),
        callbacks=[WeightAnchoring(strength, reference=reference)],
    )
    attach(trainer)
    trainer.train()
    start = tiny.state(double())
    assert distances(tiny.state(theirs), tiny.state(ours)) < 1e-12 * distances(start, tiny.state(ours))
    assert distances(start, tiny.state(ours)) > 1e-2


def one_cycle(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, OneCycleLR(optimizer, max_lr=1e-2, total_steps=13)


def warm_up_from_nearly_nothing(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = [LinearLR(optimizer, 1e-9, total_iters=4), CosineAnnealingLR(optimizer, 8)]
    return optimizer, SequentialLR(optimizer, parts, [4])


def cyclic(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return optimizer, CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=4)


def without_a_scheduler(model: nn.Module) -> Any:
    return torch.optim.AdamW([{"params": list(model.parameters()), "lr": 5e-2}], lr=1e-3), None


def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each pull removes, filled while a training runs."""
    found: list[float] = []
    share = Decoupled._share

    def watched(self: Decoupled, strength: float, group: dict[str, Any]) -> float:
        found.append(share(self, strength, group))
        return found[-1]

    monkeypatch.setattr(Decoupled, "_share", watched)
    return found


@pytest.mark.parametrize(
    ("make", "least", "most"),
    [
        (one_cycle, 0.05 * 0.02, 0.05),
        (warm_up_from_nearly_nothing, 0.0, 0.05),
        (cyclic, 0.05, 0.05),  # its peak is not known; no overshoot
        (without_a_scheduler, 0.05, 0.05),
    ],
)
def test_the_share_at_the_peak_rate_is_the_strength(
    make: Any, least: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model = shares(monkeypatch), tiny.bert()
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4}
    args = tiny.arguments(tmp_path, **(plateau if make is without_a_scheduler else {}))
    trainer = tiny.trainer(model, args, optimizers=make(model), callbacks=[WeightAnchoring(0.05)])
    attach(trainer)
    trainer.train()
    assert max(found) == pytest.approx(most, rel=1e-3)
    assert max(found) <= 0.05
    assert min(found) == pytest.approx(least, rel=0.9, abs=1e-9)


def test_a_resumed_run_knows_the_peak_of_a_rate_that_has_fallen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(checkpoint: str | None) -> tuple[list[float], list[float]]:
        found, model = shares(monkeypatch), tiny.bert()
        args = tiny.arguments(
            tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=2,
            lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "threshold": 10.0}, save_strategy="steps", save_steps=6,
        )  # fmt: skip
        rates = torch.optim.AdamW(model.parameters(), lr=1e-2), None
        trainer = tiny.trainer(model, args, optimizers=rates, callbacks=[WeightAnchoring(0.05)])
        attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        monkeypatch.undo()
        return found, [float(group["lr"]) for group in trainer.optimizer.param_groups]

    whole, rates = run(None)
    resumed, again = run(str(tmp_path / "checkpoint-6"))
    assert rates == again
    assert rates[0] < 5e-3, "the control: the rate falls"
    assert resumed == whole[len(whole) // 2 :]
    assert resumed[0] < 0.05


def test_an_optimizer_without_a_rate_is_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, warmup_init=True, lr=None)
    optimizers = (optimizer, AdafactorSchedule(optimizer))
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), optimizers=optimizers, callbacks=[WeightAnchoring(0.1)])
    attach(trainer)
    with pytest.raises(ValueError, match=r"Adafactor has no rate \(lr=None"):
        trainer.train()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distance_falls_strictly_as_strength_grows(seed: int, tmp_path: Path) -> None:
    found = []
    for strength in (0.0001, 0.003, 0.03, 0.3, 0.9):
        model = tiny.bert(seed=seed, layers=1)
        anchor = WeightAnchoring(strength)
        trainer = tiny.trainer(model, tiny.arguments(tmp_path, seed=seed), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        found.append(math.hypot(*anchor.distances(model).values()))
    assert all(weaker > stronger for weaker, stronger in itertools.pairwise(found))
    assert found[-1] < 0.5 * found[0]


def test_the_head_is_excluded_by_default_and_not_with_an_empty_exclude(tmp_path: Path) -> None:
    model = tiny.bert()
    for exclude, expected in ((None, False), ((), True), (("embeddings",), True)):
        anchor = WeightAnchoring(0.1, exclude=exclude)
        tiny.trainer(copy.deepcopy(model), tiny.arguments(tmp_path), callbacks=[anchor])
        assert ("head" in anchor.distances(model)) is expected
        assert ("embeddings" in anchor.distances(model)) is (exclude != ("embeddings",))


def test_distances_are_logged_once_an_evaluation_and_at_the_end(tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer = tiny.trainer(model, args, callbacks=[WeightAnchoring(0.1)])
    trainer.eval_dataset = {"one": tiny.texts(8), "two": tiny.texts(8)}
    attach(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "tl/anchor/embeddings" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    names = group_layers(model)["encoder.layer.0"].parameters
    expected = distances({n: model.state_dict()[n] for n in names}, {n: start[n] for n in names})
    assert logged[-1]["tl/anchor/encoder.layer.0"] == pytest.approx(expected, rel=1e-6)
    assert "tl/anchor/head" not in logged[-1]


def test_the_last_distances_are_of_the_weights_that_training_leaves(tmp_path: Path) -> None:
    def last(trainer: Trainer) -> dict[str, Any]:
        return [entry for entry in trainer.state.log_history if "tl/anchor/embeddings" in entry][-1]

    model, anchor = tiny.bert(), WeightAnchoring(0.001)
    found = iter([0.0, 1.0])
    back = WeightInterpolation([0.0], retention=lambda: next(found), min_retention=0.9, exclude=())
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer = tiny.trainer(model, args, callbacks=[back, anchor])
    attach(trainer)
    trainer.train()
    assert last(trainer)["tl/anchor/embeddings"] == anchor.distances(model)["embeddings"] == 0
    assert [e["tl/anchor/embeddings"] > 0 for e in trainer.state.log_history if "tl/anchor/embeddings" in e] == [
        True, True, True, False,
    ]  # fmt: skip

    model, anchor = tiny.bert(), WeightAnchoring(0.001)
    args = tiny.arguments(
        tmp_path / "best", eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = tiny.trainer(model, args, callbacks=[anchor])
    attach(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint
    assert not trainer.state.best_model_checkpoint.endswith("-12"), "the control: the last weights are not the best"
    assert last(trainer)["tl/anchor/embeddings"] == anchor.distances(model)["embeddings"]


def test_many_evaluation_sets_log_one_step_once(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tiny.bert(), tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=12), callbacks=[WeightAnchoring(0.1)]
    )
    trainer.eval_dataset = {str(number): tiny.texts(4) for number in range(12)}
    attach(trainer)
    trainer.train()
    assert sum("tl/anchor/embeddings" in entry for entry in trainer.state.log_history) == 1


def test_the_model_of_model_init_needs_attach(tmp_path: Path) -> None:
    def make() -> Trainer:
        seeds = itertools.count()
        return Trainer(
            model_init=lambda: tiny.bert(seed=next(seeds)), args=tiny.arguments(tmp_path), train_dataset=tiny.texts(),
            callbacks=[WeightAnchoring(0.1)],
        )  # fmt: skip

    with pytest.raises(RuntimeError, match=r"reference of another model .* Call attach\(trainer\)"):
        make().train()
    trainer = make()
    attach(trainer)
    trainer.train()


def test_a_resumed_model_of_model_init_has_the_reference_of_the_first_run(tmp_path: Path) -> None:
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        anchor = WeightAnchoring(0.1)
        trainer = Trainer(
            model_init=lambda: tiny.bert(seed=3), train_dataset=tiny.texts(), callbacks=[anchor],
            args=tiny.arguments(tmp_path, save_strategy="steps", save_steps=6),
        )  # fmt: skip
        attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert anchor._taken is not None
        start = tiny.state(tiny.bert(seed=3))
        weights = anchor._taken.tensors
        assert not tiny.moved({name: start[name] for name in weights}, dict(weights))


@pytest.mark.parametrize("form", ["decoupled", "penalty", "mixout"])
def test_no_hook_stays_behind(form: Any, tmp_path: Path) -> None:
    model = tiny.bert()
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1, form=form)])
    attach(trainer)
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("form", ["decoupled", "penalty"])
def test_with_unfreezing_frozen_groups_stay_and_late_ones_are_anchored(form: Any, tmp_path: Path) -> None:
    def run(strength: float, folder: str) -> dict[str, torch.Tensor]:
        model = tiny.bert(dropout=0.0)
        groups = group_layers(model)
        callbacks = [
            WeightAnchoring(strength, form=form, reference=tiny.state(tiny.bert(seed=3))),
            GradualUnfreezing(groups, at_steps([6, 6, 6]), keep_frozen=("embeddings",)),
        ]
        trainer = tiny.trainer(model, tiny.arguments(tmp_path / folder), callbacks=callbacks)
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    start = tiny.state(tiny.bert())
    weak, strong = run(1e-6, "weak"), run(0.3, "strong")
    groups = group_layers(tiny.bert())
    assert not tiny.moved(start, strong, groups["embeddings"].parameters)
    late = groups["encoder.layer.0"].parameters
    reference = tiny.state(tiny.bert(seed=3))
    far = distances({n: weak[n] for n in late}, {n: reference[n] for n in late})
    near = distances({n: strong[n] for n in late}, {n: reference[n] for n in late})
    assert near < 0.8 * far


def test_peft_adapters_are_pulled_to_their_start(tmp_path: Path) -> None:
    def run(strength: float) -> float:
        torch.manual_seed(0)
        model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
        anchor = WeightAnchoring(strength)
        start = tiny.state(model)
        trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        assert set(anchor.distances(model)) == {"encoder.layer.0", "encoder.layer.1", "encoder.layer.2"}
        base = [name for name in start if "lora_" not in name and "modules_to_save" not in name]
        assert not tiny.moved(start, tiny.state(model), base)
        return max(anchor.distances(model).values())

    assert 0 < run(0.5) < 0.5 * run(1e-6)


def test_an_idle_parameter_is_penalised_too(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)
            self.body = nn.Linear(8, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            logits = self.out(self.body(input_ids.float() / 50))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Idle()
    start = tiny.state(model)
    reference = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    args = tiny.arguments(tmp_path, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant")
    anchor = WeightAnchoring({"idle": 0.5}, form="penalty", reference=reference)
    trainer = tiny.trainer(model, args, callbacks=[anchor])
    attach(trainer)
    trainer.train()
    # Gradient descent on strength * ||p||^2 alone: p shrinks by (1 - 2 * rate * strength) a step.
    expected = start["idle.weight"] * (1 - 2 * 1e-2 * 0.5) ** 12
    assert torch.allclose(model.idle.weight, expected, rtol=1e-5)


def test_a_step_that_the_scaler_skips_pulls_nothing() -> None:
    model = tiny.bert()
    groups = group_layers(model)
    anchor = WeightAnchoring(0.5, reference=tiny.state(tiny.bert(seed=3)), groups=groups)
    anchor._take(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    form: Any = anchor._form
    form.open(anchor._opening(model, optimizer, seed=0))
    before = tiny.state(model)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    form._pull(optimizer, (), {})
    assert not tiny.moved(before, tiny.state(model))
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    form._pull(optimizer, (), {})
    assert tiny.moved(before, tiny.state(model))


@pytest.mark.parametrize("form", ["decoupled", "penalty", "mixout"])
def test_strength_0_says_that_it_does_nothing(form: Any, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.0, form=form)])
    attach(trainer)
    with pytest.warns(NoEffectWarning, match="anchors nothing"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightAnchoring(1.0), r"`strength` is 1.0; expected a number in \[0, 1\), the share of the distance"),
        (lambda: WeightAnchoring(-0.1), "`strength` is -0.1"),
        (lambda: WeightAnchoring({"a": 0.1, "b": 2.0}), "`strength` is 2.0"),
        (lambda: WeightAnchoring(-1.0, form="penalty"), r"expected a number in \[0, infinity\)"),
        (lambda: WeightAnchoring("0.1"), r"`strength` is '0.1'; expected a number in"),  # type: ignore[arg-type]
        (lambda: WeightAnchoring({"a": None}, form="penalty"), "`strength` is None; expected a number"),  # type: ignore[dict-item]
        (lambda: WeightAnchoring(0.1, form="l2"), "`form` is 'l2'"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_wrong_group_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern `encoder.layers.*` matches no group. Closest names: `encoder.layer"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring({"encoder.layers": 0.1})])


def test_a_reference_of_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    reference = tiny.state(tiny.bert())
    missing = {name: tensor for name, tensor in reference.items() if "pooler" not in name}
    with pytest.raises(ValueError, match=r"the reference lacks `bert\.pooler\.dense\.weight`"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1, reference=missing)])
    other = {name: tensor[:1] for name, tensor in reference.items() if tensor.ndim}
    with pytest.raises(ValueError, match=r"has shape \(1, 16\); expected \(50, 16\)"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1, reference=other)])


def test_a_checkpoint_is_not_taken_for_pretrained_weights(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path / "checkpoint-8")
    model = type(tiny.bert()).from_pretrained(tmp_path / "checkpoint-8")
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1)])
    with pytest.raises(ValueError, match="for the pretrained ones"):
        attach(trainer)
    anchor = WeightAnchoring(0.1, reference=tiny.state(tiny.bert()))
    attach(tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor]))


def test_a_callback_added_later_takes_its_reference_when_attached(tmp_path: Path) -> None:
    model = tiny.bert()
    trainer = tiny.trainer(model, tiny.arguments(tmp_path))
    anchor = WeightAnchoring(0.1)
    trainer.add_callback(anchor)
    with pytest.raises(RuntimeError, match="has no reference"):
        trainer.train()
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
    trainer.add_callback(anchor)
    attach(trainer)
    trainer.train()
    assert trainer.model is not None
    assert max(anchor.distances(trainer.model).values()) > 0


def test_the_same_callback_in_a_second_trainer_keeps_the_pretrained_reference(tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    anchor = WeightAnchoring(0.01)
    for _ in range(2):
        trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor])
        attach(trainer)
        trainer.train()
    assert anchor._taken is not None
    weights = anchor._taken.tensors
    assert tiny.moved({n: start[n] for n in weights}, weights) == set()


def test_a_strength_that_names_the_head_anchors_it(tmp_path: Path) -> None:
    model = tiny.bert()
    anchor = WeightAnchoring({"embeddings": 0.1, "head": 0.1})
    tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor])
    assert set(anchor.distances(model)) == {"embeddings", "head"}


def test_a_strength_for_what_is_excluded_is_refused(tmp_path: Path) -> None:
    def make(strength: dict[str, float], exclude: tuple[str, ...] | None) -> None:
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(strength, exclude=exclude)])

    with pytest.raises(ValueError, match=r"0\.1 for `embeddings`, and `exclude` leaves out all groups that it names"):
        make({"**": 0.2, "embeddings": 0.1}, ("embeddings",))
    with pytest.raises(ValueError, match=r"for `he\*`, .* The head is left out unless"):
        make({"he*": 0.1}, None)
    make({"**": 0.2, "embeddings": 0.0}, ("embeddings",))
    make({"encoder.*.*": 0.2}, ("encoder.layer.0",))


def test_distances_before_there_is_a_reference_are_refused() -> None:
    with pytest.raises(RuntimeError, match="has no reference yet, which it takes when the Trainer is made"):
        WeightAnchoring(0.1).distances(tiny.bert())


def test_groups_of_another_model_and_a_second_anchor_are_refused(tmp_path: Path) -> None:
    groups = group_layers(tiny.bert(layers=4))
    with pytest.raises(ValueError, match=r"groups name `bert\.encoder\.layer\.3.* does not have \(closest: `bert"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(0.1, groups=groups)])
    callbacks = [WeightAnchoring(0.1), WeightAnchoring(0.2)]
    with pytest.raises(ValueError, match="several WeightAnchoring"):
        attach(tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=callbacks))
