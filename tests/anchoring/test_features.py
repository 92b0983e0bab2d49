"""Features and outputs kept near the reference's: the operations, and the term in a real Trainer's loss."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from tests import scaler, tiny
from tl_callbacks import GradualUnfreezing, WeightAnchoring, at_steps, attach, group_layers
from tl_callbacks.anchoring import Outputs, distillation_loss, feature_distance
from tl_callbacks.anchoring.reference.beside import as_reference, floating_buffers

STRENGTH = 5.0
FORMS: dict[str, Callable[[], Any]] = {"features": lambda: "features", "outputs": lambda: Outputs(temperature=3.0)}


def double(**config: Any) -> Any:
    return tiny.bert(dropout=0.0, **config).double()


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(((one[n] - other[n]).double() ** 2).sum()) for n in one))


def padded(count: int = 64, *, shortest: int = 3) -> list[dict[str, Any]]:
    """Rows of texts of several lengths, padded on the right."""
    rows = tiny.texts(count)
    for number, row in enumerate(rows):
        kept = shortest + number % (len(row["input_ids"]) - shortest + 1)
        row["attention_mask"] = [1] * kept + [0] * (len(row["input_ids"]) - kept)
    return rows


# The operations


def test_feature_distance_is_the_mean_over_rows_of_the_means_over_places() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 4, 3, dtype=torch.float64).unbind()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]) != 0
    rows = [
        ((a[m] - b[m]) ** 2).mean() if m.any() else torch.zeros(()) for a, b, m in zip(ours, theirs, mask, strict=True)
    ]
    assert float(feature_distance(ours, theirs, mask)) == pytest.approx(float(sum(rows)) / 5, rel=1e-14)
    assert float(feature_distance(ours, theirs)) == pytest.approx(float(((ours - theirs) ** 2).mean()), rel=1e-14)


def test_what_stands_on_padding_has_no_part_and_no_gradient() -> None:
    ours = torch.ones(2, 3, 2, requires_grad=True)
    broken = ours.clone()
    broken.data[:, 2] = float("nan")
    mask = torch.tensor([[True, True, False]] * 2)
    for loss in (
        feature_distance(broken, torch.zeros(2, 3, 2), mask),
        distillation_loss(broken, torch.eye(3, 2).expand(2, 3, 2), mask),
    ):
        (gradient,) = torch.autograd.grad(loss, ours, retain_graph=True)
        assert loss > 0
        assert torch.isfinite(gradient).all()
        assert (gradient[:, 2] == 0).all()


def test_distillation_has_the_gradient_of_the_softened_cross_entropy() -> None:
    torch.manual_seed(0)
    ours = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(6, 4, dtype=torch.float64)
    temperature = 3.0
    softened = [(theirs / temperature).exp(), (ours / temperature).exp()]
    old, new = (p / p.sum(1, keepdim=True) for p in softened)
    expected = -(old * new.log()).sum(1).mean() * temperature**2  # equation 2 of the paper, times Hinton's square
    loss = distillation_loss(ours, theirs, temperature=temperature)
    (a,), (b,) = torch.autograd.grad(expected, ours), torch.autograd.grad(loss, ours)
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    entropy = -(old * old.log()).sum(1).mean() * temperature**2
    assert loss.item() == pytest.approx((expected - entropy).item(), rel=1e-12)
    # The gradient with respect to a logit is temperature * (new - old) / rows.
    assert torch.allclose(b, temperature * (new - old).detach() / 6, rtol=1e-12, atol=1e-15)


def test_independent_outputs_are_binary_divergences() -> None:
    ours, theirs = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[1.0, 0.5]]).double()
    p, q = torch.sigmoid(theirs / 2), torch.sigmoid(ours / 2)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert float(distillation_loss(ours, theirs, independent=True)) == pytest.approx(float(expected), rel=1e-12)


def test_distillation_over_places_counts_rows_alike() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]]) != 0
    rows = [distillation_loss(a[m], b[m]) for a, b, m in zip(ours, theirs, mask, strict=True)]
    assert float(distillation_loss(ours, theirs, mask)) == pytest.approx(float(sum(rows)) / 3, rel=1e-12)


# The reference beside the model


class Recurrent(nn.Module):
    """What refers to its parameters beside their names: an LSTM's flat list; and BatchNorm's statistics."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.cell = nn.LSTM(3, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.cell(x)[0][:, -1]))


def test_one_module_computes_as_the_reference_and_then_as_itself() -> None:
    pretrained, tuned = Recurrent(0), Recurrent(1)
    x = torch.randn(8, 5, 3)
    for _ in range(3):
        pretrained(torch.randn(8, 5, 3) * 4 + 1)  # moves its statistics
    expected = pretrained.eval()(x)
    tuned.norm.weight.requires_grad_(False)
    before, state = tiny.state(tuned), torch.get_rng_state()
    loss = tuned(x).square().mean()
    drawn = torch.get_rng_state()
    weights = {name: p.detach() for name, p in pretrained.named_parameters()}
    with as_reference(tuned, weights, floating_buffers(pretrained)):
        found = tuned(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(state, drawn), "the control: the tuned model draws"
    assert tuned.training
    assert tuned.drop.training
    assert tiny.moved(before, tiny.state(tuned)) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    (gradient,) = torch.autograd.grad(loss, [tuned.cell.weight_ih_l0])
    torch.set_rng_state(state)
    alone = Recurrent(1)
    torch.set_rng_state(state)
    (expected_gradient,) = torch.autograd.grad(alone(x).square().mean(), [alone.cell.weight_ih_l0])
    assert torch.equal(gradient, expected_gradient), "a graph from before keeps its weights"


def test_the_weights_come_back_after_an_error() -> None:
    model = tiny.bert()
    before = tiny.state(model)
    weights = {name: p.detach() for name, p in tiny.bert(seed=3).named_parameters()}
    during: dict[str, Tensor] = {}

    def fails() -> None:
        during.update(tiny.state(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), as_reference(model, weights):
        fails()
    assert tiny.moved(before, during), "the control: it held the others meanwhile"
    assert not tiny.moved(before, tiny.state(model))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_that_autocast_keeps_are_not_taken_for_the_reference(dtype: torch.dtype) -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype):
        ours = model(x)  # autocast keeps the weight in low precision
        with as_reference(model, {n: p.detach() for n, p in other.named_parameters()}):
            theirs = model(x)
        assert torch.equal(theirs, other(x))
        assert torch.equal(model(x), ours)


# The term in a Trainer's loss


class TermTrainer(Trainer):
    """The reference implementation: a frozen second model and hidden states; the Trainer divides by micro-batches."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            given = {key: value for key, value in inputs.items() if key != "labels"}
            ours = model(**given, output_hidden_states=True)
            with torch.no_grad():
                theirs = self.old.eval()(**given, output_hidden_states=True)  # type: ignore[attr-defined]
            if self.form == "features":  # type: ignore[attr-defined]
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).double()[..., None]
                for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                    by_row = ((a - b) ** 2 * mask).sum((1, 2)) / mask.sum((1, 2)) / a.shape[-1]
                    loss = loss + STRENGTH * by_row.mean()
            else:
                old, new = (torch.softmax(o.logits / 3.0, -1) for o in (theirs, ours))
                loss = loss + STRENGTH * 9.0 * (old * (old / new).log()).sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05},
    "smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_term_is_that_of_a_second_model(setting: str, form: str, tmp_path: Path) -> None:
    overrides = {"optim": "sgd", "learning_rate": 0.1, **SETTINGS[setting]}
    plain, theirs, ours, old = double(), double(), double(), double(seed=3)
    rows = padded()
    tiny.trainer(plain, tiny.arguments(tmp_path / "plain", **overrides), rows).train()
    expected = TermTrainer(theirs, tiny.arguments(tmp_path / "a", **overrides), train_dataset=rows)
    expected.old, expected.form = old, form  # type: ignore[attr-defined]
    expected.train()
    anchor = WeightAnchoring(STRENGTH, form=FORMS[form](), reference=tiny.state(old))
    trainer = tiny.trainer(ours, tiny.arguments(tmp_path / "b", **overrides), rows, callbacks=[anchor])
    attach(trainer)
    trainer.train()
    effect = gap(tiny.state(plain), tiny.state(ours))
    assert effect > 1e-3, "the control: the term must change the run"
    assert gap(tiny.state(theirs), tiny.state(ours)) < 1e-11 * effect
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(
        [e["loss"] for e in expected.state.log_history if "loss" in e], rel=1e-9
    )


class ByCount(nn.Module):
    """A head that divides its loss by the count of the whole step, so that the Trainer does not divide it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.accepts_loss_kwargs = True
        self.base = base

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None) -> Any:
        logits = self.base(input_ids).logits
        if labels is None:
            return {"logits": logits}
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / (len(labels) if num_items_in_batch is None else num_items_in_batch), "logits": logits}


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


LOSSES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "divided by the Trainer": (double, {}),
    "divided by the head": (lambda: ByCount(double()), {}),
    "a function's": (double, {"compute_loss_func": summed}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_equals_one_large_batch(loss: str, form: str, tmp_path: Path) -> None:
    make, kwargs = LOSSES[loss]

    def run(name: str, strength: float, **overrides: Any) -> dict[str, Tensor]:
        model = make()
        args = tiny.arguments(
            tmp_path / name, max_steps=8, optim="sgd", learning_rate=0.2, max_grad_norm=0.3,
            train_sampling_strategy="sequential", **overrides,
        )  # fmt: skip
        reference = {
            f"base.{n}" if isinstance(model, ByCount) else n: t for n, t in double(seed=3).state_dict().items()
        }
        anchor = WeightAnchoring(strength, form=FORMS[form](), reference=reference)
        trainer = tiny.trainer(model, args, tiny.texts(128), callbacks=[anchor], **kwargs)
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    whole, parts = run("a", STRENGTH, per_device_train_batch_size=16), run("b", STRENGTH, **small)
    travelled = gap(tiny.state(make()), whole)
    assert gap(whole, parts) < 1e-12 * travelled
    once_a_micro_batch = run("c", STRENGTH * 4, **small)
    assert gap(whole, once_a_micro_batch) > 1e-6 * travelled, "the control"


def test_a_last_step_of_fewer_rows_is_the_mean_over_its_rows(tmp_path: Path) -> None:
    measured: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            measured.append(anchor._form.measured()["features/encoder.layer.1"])

    # 22 rows in micro-batches of 4, three a step: steps of 12 and of 10 rows, the last micro-batch of 2.
    args = tiny.arguments(
        tmp_path, max_steps=2, gradient_accumulation_steps=3, train_sampling_strategy="sequential", learning_rate=0.0
    )
    old, rows = double(seed=3), padded(22)
    anchor = WeightAnchoring(STRENGTH, form="features", reference=tiny.state(old))
    model = double()
    trainer = tiny.trainer(model, args, rows, callbacks=[anchor, Watch()])
    attach(trainer)
    trainer.train()
    for found, step in zip(measured, (rows[:12], rows[12:]), strict=True):
        ids, mask = (torch.tensor([row[key] for row in step]) for key in ("input_ids", "attention_mask"))
        with torch.no_grad():
            ours, theirs = (m(ids, mask, output_hidden_states=True).hidden_states[2] for m in (model, old.eval()))
        assert found == pytest.approx(float(feature_distance(ours, theirs, mask != 0)), rel=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_changes_nothing(form: str, reentrant: bool, tmp_path: Path) -> None:
    def run(name: str, strength: float = STRENGTH, **overrides: Any) -> dict[str, Tensor]:
        model = double()
        anchor = WeightAnchoring(strength, form=FORMS[form](), reference=tiny.state(double(seed=3)))
        trainer = tiny.trainer(model, tiny.arguments(tmp_path / name, optim="sgd", **overrides), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    checkpointing = {
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}
    }  # fmt: skip
    stored, recomputed = run("a"), run("b", **checkpointing)
    travelled = gap(tiny.state(double()), stored)
    assert gap(stored, recomputed) < 1e-12 * travelled
    assert gap(stored, run("c", 2 * STRENGTH, **checkpointing)) > 1e-6 * travelled, "the control: a doubled term"


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_is_not_touched_and_nothing_stays_behind(form: str, tmp_path: Path) -> None:
    model = tiny.bert(dropout=0.0)
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=4)
    anchor = WeightAnchoring(100.0, form=FORMS[form](), reference=tiny.state(tiny.bert(seed=3)))
    trainer = tiny.trainer(model, args, callbacks=[anchor])
    attach(trainer)
    trainer.train()
    assert not {"compute_loss", "get_batch_samples"} & set(vars(trainer))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    key = {"features": "tl/anchor/features/encoder.layer.1", "outputs": "tl/anchor/outputs"}[form]
    assert [e["step"] for e in trainer.state.log_history if e.get(key, 0) > 0] == [4, 8, 12]


@pytest.mark.parametrize("form", FORMS)
def test_the_random_stream_is_that_of_the_plain_run(form: str, tmp_path: Path) -> None:
    def run(callbacks: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        model = tiny.bert(dropout=0.1)
        trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
        attach(trainer)
        trainer.train()
        return torch.get_rng_state(), tiny.state(model)

    plain, weights = run([])
    ours, anchored = run([WeightAnchoring(STRENGTH, form=FORMS[form]())])
    assert torch.equal(plain, ours)
    assert tiny.moved(weights, anchored), "the control: the term must change the run"


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision_stays_near_single_precision(half: str, form: str, tmp_path: Path) -> None:
    def run(name: str, strength: float, **overrides: Any) -> dict[str, Tensor]:
        model = tiny.bert(dropout=0.0)
        args = tiny.arguments(tmp_path / name, optim="sgd", **overrides)
        anchor = WeightAnchoring(strength, form=FORMS[form](), reference=tiny.state(tiny.bert(seed=3)))
        trainer = scaler.trainer(model, args, callbacks=[anchor])
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    single, mixed, weak = run("a", STRENGTH), run("b", STRENGTH, **{half: True}), run("c", 1e-9)
    assert gap(single, mixed) < 0.1 * gap(single, weak)


def test_frozen_groups_have_no_term_until_they_open(tmp_path: Path) -> None:
    model = tiny.bert(dropout=0.0)
    seen: list[set[str]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({name for name in anchor._form.measured() if name.startswith("features")})

    anchor = WeightAnchoring(1.0, form="features")
    unfreezing = GradualUnfreezing(group_layers(model), at_steps([4, 6, 8]), keep_frozen=("embeddings",))
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[unfreezing, anchor, Watch()])
    attach(trainer)
    trainer.train()
    blocks = [f"features/encoder.layer.{number}" for number in range(3)]
    assert seen[0] == set()
    assert seen[4] == {blocks[2]}
    assert seen[-1] == set(blocks)


@pytest.mark.parametrize("form", FORMS)
def test_peft_is_compared_with_its_base(form: str, tmp_path: Path) -> None:
    def run(strength: float) -> float:
        torch.manual_seed(0)
        base = tiny.bert(dropout=0.0)
        old = copy.deepcopy(base).eval()
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
        anchor = WeightAnchoring(strength, form=FORMS[form](), exclude=())
        trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        ids = torch.tensor([row["input_ids"] for row in tiny.texts(16, seed=5)])
        with torch.no_grad():
            ours, theirs = (m(ids, output_hidden_states=True) for m in (model.eval(), old))
        if form == "features":
            return float(feature_distance(ours.hidden_states[-1], theirs.hidden_states[-1]))
        return float(distillation_loss(ours.logits, theirs.logits))

    weak, strong = run(1e-6), run(100.0)
    assert strong < 0.2 * weak


def test_features_stay_nearer_as_strength_grows(tmp_path: Path) -> None:
    ids = torch.tensor([row["input_ids"] for row in tiny.texts(32, seed=5)])

    def run(strength: float) -> float:
        model = tiny.bert(dropout=0.0)
        old = copy.deepcopy(model).eval()
        trainer = tiny.trainer(
            model, tiny.arguments(tmp_path, max_steps=24), callbacks=[WeightAnchoring(strength, form="features")]
        )
        attach(trainer)
        trainer.train()
        with torch.no_grad():
            ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (model.eval(), old))
        return sum(float(feature_distance(a, b)) for a, b in zip(ours, theirs, strict=True))

    found = [run(strength) for strength in (1e-6, 0.1, 1.0, 10.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.2 * found[0]
