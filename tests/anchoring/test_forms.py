"""EWC, RecAdam's annealing, Mixout and LoRA updates on a real Trainer, against losses by autograd and plain loops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Trainer, TrainerCallback

from tests import scaler, tiny
from tests.anchoring.test_callback import distances, double
from tests.test_sharding import fsdp
from tl_callbacks import (
    GradualUnfreezing,
    PreflightError,
    PreflightWarning,
    WeightAnchoring,
    at_steps,
    attach,
    events,
    group_layers,
)
from tl_callbacks.anchoring import (
    Decoupled,
    Features,
    Mixout,
    Outputs,
    Penalty,
    diagonal_fisher,
    load_fisher,
    lora_updates,
    mixout_mask,
    save_fisher,
    sigmoid_annealing,
)
from tl_callbacks.parameters import parameters_by_name

HARD: dict[str, Any] = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05, "adam_epsilon": 1e-3}
OPTIMIZERS = ["sgd", "adamw_torch"]


def train(model: nn.Module, folder: Path, anchor: WeightAnchoring | None = None, **overrides: Any) -> Trainer:
    trainer = tiny.trainer(model, tiny.arguments(folder, **overrides), callbacks=[anchor] if anchor else [])
    attach(trainer)
    trainer.train()
    return trainer


class Penalised(Trainer):
    """The reference: a penalty as a term of the loss, by autograd, shared among the micro-batches."""

    penalty: Any = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + self.penalty(model)
        return (loss, outputs) if return_outputs else loss


def penalised(model: nn.Module, folder: Path, penalty: Any, **overrides: Any) -> None:
    trainer = Penalised(model, tiny.arguments(folder, **overrides), train_dataset=tiny.texts())
    trainer.penalty = penalty
    trainer.train()


def assert_same(ours: nn.Module, theirs: nn.Module, plain: nn.Module, tolerance: float = 1e-9) -> None:
    """Equal, relative to what the anchor changes."""
    effect = distances(tiny.state(plain), tiny.state(ours))
    assert effect > 1e-3, "the control: the anchor must change the run"
    assert distances(tiny.state(theirs), tiny.state(ours)) < tolerance * effect


def importance() -> dict[str, Tensor]:
    """Values from 0 to 100 that differ from element to element."""
    generator = torch.Generator().manual_seed(4)
    return {n: 100 * torch.rand(p.shape, generator=generator).double() for n, p in double().named_parameters()}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_ewc_is_the_autograd_loss(optim: str, tmp_path: Path) -> None:
    reference, fisher = tiny.state(double(seed=3)), importance()
    plain, theirs, ours = double(), double(), double()

    def penalty(model: nn.Module) -> Tensor:
        anchored = [(n, p) for n, p in model.named_parameters() if not n.startswith("classifier")]
        return 0.05 * sum((fisher[n] * (p - reference[n]).square()).sum() for n, p in anchored)  # type: ignore[return-value]

    train(plain, tmp_path / "plain", optim=optim, **HARD)
    penalised(theirs, tmp_path / "a", penalty, optim=optim, **HARD)
    anchor = WeightAnchoring(0.05, form=Penalty(importance=fisher), reference=reference)
    train(ours, tmp_path / "b", anchor, optim=optim, **HARD)
    assert_same(ours, theirs, plain)


def test_a_fisher_from_a_file_holds_what_matters(tmp_path: Path) -> None:
    model = tiny.bert()
    rows = tiny.texts(32, seed=5)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
    save_fisher(diagonal_fisher(model, [batch]), tmp_path / "fisher.safetensors")
    fisher = load_fisher(tmp_path / "fisher.safetensors")
    start = tiny.state(model)
    anchor = WeightAnchoring(1000.0, form=Penalty(importance=fisher))
    trainer = train(model, tmp_path, anchor)
    plain = tiny.bert()
    train(plain, tmp_path)

    def weighted(state: dict[str, Tensor]) -> float:
        return sum(float((fisher[n] * (state[n] - start[n]).square()).sum()) for n in fisher if "classifier" not in n)

    assert weighted(tiny.state(model)) < 0.5 * weighted(tiny.state(plain))
    facts = anchor.facts()["importance"]
    assert facts["kind"] == "empirical"
    assert facts["samples"] == 32
    assert "weights" not in facts
    assert trainer.state.global_step == 12


def test_a_fisher_of_other_weights_is_a_caution(tmp_path: Path) -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 1])}
    fisher = diagonal_fisher(tiny.bert(seed=1), [batch])
    anchor = WeightAnchoring(1.0, form=Penalty(importance=fisher))
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[anchor])
    with pytest.warns(PreflightWarning, match="estimated at other weights than the reference"):
        attach(trainer)
    same = WeightAnchoring(1.0, form=Penalty(importance=diagonal_fisher(tiny.bert(), [batch])))
    attach(tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[same]))


class RecAdam(torch.optim.Optimizer):
    """Algorithm 1 of the paper, written out: everything from the weights before the step, in one line."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            eta, (b1, b2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p), pre=group["pre"][id(p)])
                state["t"] += 1
                t = state["t"]
                state["m"] = b1 * state["m"] + (1 - b1) * p.grad
                state["v"] = b2 * state["v"] + (1 - b2) * p.grad**2
                g = (state["m"] / (1 - b1**t)) / ((state["v"] / (1 - b2**t)).sqrt() + group["eps"])
                if state["pre"] is None:
                    p.copy_(p - eta * g)
                else:
                    w = 1 / (1 + math.exp(-group["k"] * (t - group["t0"])))
                    p.copy_(p - eta * (w * g + (1 - w) * group["gamma"] * (p - state["pre"])))


def test_annealing_is_recadam(tmp_path: Path) -> None:
    reference = tiny.state(double(seed=3))
    common: dict[str, Any] = {
        "optim": "adamw_torch", "weight_decay": 0.0, "warmup_steps": 3, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2, "adam_epsilon": 1e-3,
    }  # fmt: skip
    plain, theirs, ours = double(), double(), double()
    strength, peak = 0.3, 1e-2
    train(plain, tmp_path / "plain", **common)
    pre = {id(p): None if n.startswith("classifier") else reference[n] for n, p in theirs.named_parameters()}
    optimizer = RecAdam(
        theirs.parameters(), lr=peak, betas=(0.9, 0.999), eps=1e-3, k=0.7, t0=6, gamma=strength / peak, pre=pre
    )
    trainer = tiny.trainer(theirs, tiny.arguments(tmp_path / "a", **common), optimizers=(optimizer, None))
    trainer.train()
    anchor = WeightAnchoring(strength, form=Decoupled(annealing=sigmoid_annealing(0.7, 6)), reference=reference)
    trainer = train(ours, tmp_path / "b", anchor, **common)
    assert_same(ours, theirs, plain, tolerance=1e-12)
    constant = double()
    train(constant, tmp_path / "c", WeightAnchoring(strength, reference=reference), **common)
    assert distances(tiny.state(constant), tiny.state(ours)) > 1e-2
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [
        entry["tl/rate/embeddings"] for entry in trainer.state.log_history if "tl/rate/embeddings" in entry
    ] == rates
    logged = [entry for entry in trainer.state.log_history if "tl/anchor_target_weight" in entry]
    assert [entry["tl/anchor_target_weight"] for entry in logged] == [pytest.approx(1 / (1 + math.exp(-0.7 * 6)))]


class Rates(TrainerCallback):
    """The rates of all groups as they are outside of the optimizer's step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append([float(group["lr"]) for group in kwargs["optimizer"].param_groups])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_rates_are_the_schedules_outside_of_the_step(optim: str, tmp_path: Path) -> None:
    def run(annealing: Any, tensors: bool = False) -> tuple[list[list[float]], dict[str, Tensor]]:
        model, rates = tiny.bert(dropout=0.0), Rates()
        args = tiny.arguments(tmp_path, optim=optim, lr_scheduler_type="constant")
        anchor = WeightAnchoring(0.1, form=Decoupled(annealing=annealing))
        trainer = tiny.trainer(model, args, callbacks=[anchor, rates])
        attach(trainer)
        if tensors:
            trainer.create_optimizer()
            for group in trainer.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])
        trainer.train()
        return rates.seen, tiny.state(model)

    plain, _ = run(None)
    seen, weights = run(sigmoid_annealing(1.0, 0.5))
    assert seen == plain
    assert len(seen) == 12
    if optim == "adamw_torch":  # rates as tensors, as for compiled optimizers
        _, with_tensors = run(sigmoid_annealing(1.0, 0.5), tensors=True)
        assert distances(weights, with_tensors) < 1e-4 * distances(tiny.state(tiny.bert()), weights)


def test_a_failed_or_skipped_step_leaves_the_rates(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.AdamW(model.bert.parameters(), lr=0.5)
    anchor = WeightAnchoring(
        0.1, form=Decoupled(annealing=sigmoid_annealing(0.1, 100)), exclude=(), groups=group_layers(model)
    )
    anchor._take(model)
    anchor._form.open(anchor._opening(model, optimizer, seed=0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = tiny.state(model)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    anchor._form._scale_rates(optimizer, (), {})  # type: ignore[attr-defined]
    assert optimizer.param_groups[0]["lr"] == 0.5
    del optimizer.found_inf  # type: ignore[attr-defined]

    def broken() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    assert optimizer.param_groups[0]["lr"] < 0.5
    anchor.restore(model)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not tiny.moved(before, tiny.state(model))


def test_annealing_refuses_groups_of_the_optimizer_with_the_head_in_them(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    anchor = WeightAnchoring(0.1, form=Decoupled(annealing=sigmoid_annealing(0.1, 100)))
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), optimizers=(optimizer, None), callbacks=[anchor])
    attach(trainer)
    with pytest.raises(ValueError, match="they share a group of the optimizer with 2 others"):
        trainer.train()


def test_a_midpoint_in_fractions_refuses_another_length_on_resume(tmp_path: Path) -> None:
    def make(steps: int) -> Trainer:
        anchor = WeightAnchoring(0.1, form=Decoupled(annealing=sigmoid_annealing(0.5, 0.5)))
        args = tiny.arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4)
        trainer = tiny.trainer(tiny.bert(), args, callbacks=[anchor])
        attach(trainer)
        return trainer

    first = make(12)
    first.train()
    assert events.read(first.state.log_history, "annealing") == [{"step": 0, "max_steps": 12}]
    with pytest.raises(ValueError, match="started with max_steps=12 and is resumed with 16"):
        make(16).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    again = make(12)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert len(events.read(again.state.log_history, "annealing")) == 1


class MixedTrainer(Trainer):
    """The reference: the mixed weights as a function of the weights, by autograd."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mixed = {}
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier"):
                kept = ~mixout_mask(parameter, self.p, seed=self.args.seed, step=self.state.global_step, name=name)  # type: ignore[attr-defined]
                pre = self.reference[name]  # type: ignore[attr-defined]
                mixed[name] = (kept * parameter + ~kept * pre - self.p * pre) / (1 - self.p)  # type: ignore[attr-defined]
        outputs = functional_call(model, mixed, (), inputs)
        return outputs["loss"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_mixout_is_the_gradient_of_the_mixed_weights(optim: str, tmp_path: Path) -> None:
    hard = {**HARD, "learning_rate": 0.5 if optim == "sgd" else 1e-2}
    reference = tiny.state(double(seed=3))
    plain, theirs, ours = double(), double(), double()
    train(plain, tmp_path / "plain", optim=optim, **hard)
    trainer = MixedTrainer(theirs, tiny.arguments(tmp_path / "a", optim=optim, **hard), train_dataset=tiny.texts())
    trainer.p, trainer.reference = 0.4, reference  # type: ignore[attr-defined]
    trainer.train()
    anchor = WeightAnchoring(0.4, form="mixout", reference=reference)
    train(ours, tmp_path / "b", anchor, optim=optim, **hard)
    assert_same(ours, theirs, plain)


class Seen(TrainerCallback):
    """The weights at each event between steps, and in the middle of a step."""

    def __init__(self) -> None:
        self.ends: list[dict[str, Tensor]] = []
        self.begins: list[dict[str, Tensor]] = []
        self.middles: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins.append(tiny.state(kwargs["model"]))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.middles.append(tiny.state(kwargs["model"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(tiny.state(kwargs["model"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(tiny.state(kwargs["model"]))


def test_mixout_is_seen_by_training_passes_alone(tmp_path: Path) -> None:
    model, seen = tiny.bert(), Seen()
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=1)
    anchor = WeightAnchoring(0.3, form="mixout", reference=tiny.state(tiny.bert(seed=3)))
    trainer = tiny.trainer(model, args, callbacks=[anchor, seen])
    attach(trainer)
    trainer.train()
    for step in range(12):
        assert not tiny.moved(seen.begins[step], seen.before[step])  # put back, bit for bit
        assert not tiny.moved(seen.middles[3 * step], seen.middles[3 * step + 2])  # one mix for all micro-batches
        mixed = tiny.moved(seen.begins[step], seen.middles[3 * step])
        assert "bert.pooler.dense.weight" in mixed
        assert not any(name.startswith("classifier") for name in mixed)
    for one, other in zip(seen.ends[:-1], seen.begins[1:], strict=True):
        assert not tiny.moved(one, other)
    masks = [
        torch.eq(m["bert.pooler.dense.weight"], anchor.reference["bert.pooler.dense.weight"]) for m in seen.middles[::3]
    ]  # type: ignore[index]
    assert float(torch.stack(masks).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(masks[0], masks[1])


def test_an_evaluation_within_a_step_sees_the_weights_themselves(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.tensor([tiny.texts(1)[0]["input_ids"]])}
    found: list[tuple[Tensor, Tensor]] = []

    class Evaluate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.expected = self.logits(kwargs["model"])

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append((self.expected, self.logits(kwargs["model"])))

        @torch.no_grad()
        def logits(self, model: Any) -> Tensor:
            training = model.training
            model.eval()
            logits: Tensor = model(**inputs).logits
            model.train(training)
            return logits

    def run(evaluate: bool) -> dict[str, Tensor]:
        model = tiny.bert(dropout=0.0)
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
        anchor = WeightAnchoring(0.3, form="mixout", reference=tiny.state(tiny.bert(seed=3)))
        trainer = tiny.trainer(model, args, callbacks=[anchor, *([Evaluate()] if evaluate else [])])
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    assert not tiny.moved(run(False), run(True))
    assert len(found) == 12
    assert all(torch.equal(one, other) for one, other in found)
    assert not torch.equal(found[0][0], found[1][0]), "the control: the weights train"


def test_an_exception_leaves_the_weights_themselves(tmp_path: Path) -> None:
    model, seen = tiny.bert(), Seen()

    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    anchor = WeightAnchoring(0.3, form="mixout", reference=tiny.state(tiny.bert(seed=3)))
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = tiny.trainer(model, args, callbacks=[anchor, seen, Stop()])
    attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert tiny.moved(seen.begins[-1], seen.middles[-1]), "it was mixed when the exception came"
    assert not tiny.moved(seen.begins[-1], tiny.state(model))
    assert not any(p._backward_hooks for p in model.parameters())


def test_mixout_under_a_gradient_scaler_that_skips_steps(tmp_path: Path) -> None:
    model, seen = tiny.bert(dropout=0.0), Seen()
    args = tiny.arguments(tmp_path, fp16=True, optim="adamw_torch_fused")
    anchor = WeightAnchoring(0.3, form="mixout", reference=tiny.state(tiny.bert(seed=3)))
    trainer = scaler.trainer(model, args, overflows=(2, 5), callbacks=[anchor, seen])
    attach(trainer)
    trainer.train()
    for step, (one, other) in enumerate(zip(seen.begins, seen.begins[1:], strict=False)):
        assert bool(tiny.moved(one, other)) is (step not in (2, 5))


def test_mixout_of_what_opens_later(tmp_path: Path) -> None:
    model, seen = tiny.bert(dropout=0.0), Seen()
    groups = group_layers(model)
    anchor = WeightAnchoring(0.5, form="mixout", reference=tiny.state(tiny.bert(seed=3)))
    unfreeze = GradualUnfreezing(groups, at_steps([6, 6, 6]), keep_frozen=("embeddings",))
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = tiny.trainer(model, args, callbacks=[anchor, unfreeze, seen])
    attach(trainer)
    trainer.train()
    late = groups["encoder.layer.0"].parameters
    assert not tiny.moved(seen.begins[5], seen.middles[5], late)
    assert tiny.moved(seen.begins[6], seen.middles[6], late)
    assert tiny.moved(seen.begins[0], tiny.state(model), late)
    assert not tiny.moved(seen.begins[0], seen.middles[11], groups["embeddings"].parameters)


def test_mixout_does_not_support_fsdp2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(fsdp(tmp_path, monkeypatch, lambda groups: WeightAnchoring(0.1, form="penalty"), version=2))
    with pytest.raises(PreflightError, match="does not support FSDP 2: it writes the gradients of a shard past"):
        attach(fsdp(tmp_path, monkeypatch, lambda groups: WeightAnchoring(0.1, form="mixout"), version=2))


def test_mixout_of_a_compiled_model(tmp_path: Path) -> None:
    def run(**overrides: Any) -> dict[str, Tensor]:
        model = tiny.bert(dropout=0.0, layers=1)
        anchor = WeightAnchoring(0.3, form="mixout", reference=tiny.state(tiny.bert(seed=3, layers=1)))
        train(model, tmp_path, anchor, max_steps=3, gradient_accumulation_steps=2, **overrides)
        return tiny.state(model)

    plain = run()
    compiled = run(torch_compile=True, torch_compile_backend="aot_eager")
    start = tiny.state(tiny.bert(dropout=0.0, layers=1))
    assert distances(plain, compiled) < 1e-4 * distances(start, plain)


def lora(**config: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 4, "lora_alpha": 6}
    return get_peft_model(double(), LoraConfig(**{**options, **config}))


def modules(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_penalty_of_lora_is_that_of_the_dense_update(optim: str, tmp_path: Path) -> None:
    hard = {**HARD, "learning_rate": 3.0 if optim == "sgd" else 0.3}
    plain, theirs, ours = lora(), lora(), lora()

    def penalty(model: nn.Module) -> Tensor:
        return 0.3 * sum(m.get_delta_weight("default").square().sum() for m in modules(model).values())  # type: ignore[return-value]

    train(plain, tmp_path / "plain", optim=optim, **hard)
    penalised(theirs, tmp_path / "a", penalty, optim=optim, **hard)
    anchor = WeightAnchoring(0.3, form="penalty")
    trainer = train(ours, tmp_path / "b", anchor, optim=optim, **hard)
    assert_same(ours, theirs, plain)
    dense = {n: m.get_delta_weight("default").detach() for n, m in modules(ours).items()}
    logged = next(entry for entry in trainer.state.log_history if "tl/anchor/encoder.layer.1" in entry)
    layer = math.hypot(*(float(d.norm()) for n, d in dense.items() if "layer.1." in n))
    assert logged["tl/anchor/encoder.layer.1"] == pytest.approx(layer, rel=1e-9)


def test_the_pull_of_lora_scales_the_update_alone(tmp_path: Path) -> None:
    class Reference(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            share = 0.2 * kwargs["optimizer"].param_groups[0]["lr"] / args.learning_rate
            with torch.no_grad():
                for module in modules(kwargs["model"]).values():
                    module.lora_B["default"].weight *= 1 - share

    plain, theirs, ours = lora(), lora(), lora()
    train(plain, tmp_path / "plain")
    trainer = tiny.trainer(theirs, tiny.arguments(tmp_path / "a"), callbacks=[Reference()])
    trainer.train()
    train(ours, tmp_path / "b", WeightAnchoring(0.2))
    assert_same(ours, theirs, plain, tolerance=1e-12)


@pytest.mark.parametrize("form", ["decoupled", "penalty"])
def test_the_distance_of_lora_falls_as_strength_grows(form: Any, tmp_path: Path) -> None:
    found = []
    for strength in (1e-4, 0.05, 0.5):
        model = lora()
        anchor = WeightAnchoring(strength if form == "decoupled" else 10 * strength, form=form)
        train(model, tmp_path, anchor)
        found.append(math.hypot(*anchor.distances(model).values()))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.6 * found[0]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_other_adapters_are_pulled_to_their_start(config: dict[str, Any], tmp_path: Path) -> None:
    model = lora(**config)
    assert not lora_updates(model)
    anchor = WeightAnchoring(0.5)
    start = {n: p.detach().clone() for n, p in parameters_by_name(model).items()}
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[anchor])
    attach(trainer)
    trainer.train()
    now = parameters_by_name(model)
    names = [n for n in start if "layer.0." in n and "lora_" in n]
    assert anchor.distances(model)["encoder.layer.0"] == pytest.approx(
        distances({n: now[n].detach() for n in names}, {n: start[n] for n in names})
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.pop("bert.pooler.dense.weight"), r"lacks `bert.pooler.dense.weight` \(closest: `bert.pooler"),
        (lambda f: f.update({"bert.poler.dense.weight": torch.ones(1)}), "no such parameter .closest: `bert.pooler"),
        (lambda f: f.update({"bert.pooler.dense.bias": torch.ones(1)}), "has shape .1,.; expected .16,."),
        (lambda f: f.update({"bert.pooler.dense.bias": -torch.ones(16)}), "negative or not finite"),
        (lambda f: f.update({"bert.pooler.dense.bias": torch.full((16,), torch.nan)}), "negative or not finite"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    fisher = importance()
    change(fisher)
    anchor = WeightAnchoring(0.1, form=Penalty(importance=fisher))
    with pytest.raises(ValueError, match=match):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[anchor])


def test_what_is_excluded_needs_no_importance(tmp_path: Path) -> None:
    fisher = {name: tensor for name, tensor in importance().items() if "embeddings" not in name}
    anchor = WeightAnchoring(0.1, form=Penalty(importance=fisher), exclude=("embeddings", "head"))
    train(tiny.bert(), tmp_path, anchor)
    assert f"form=Penalty(importance=<of {len(fisher)} parameters>)" in repr(anchor)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightAnchoring(1.0, form=Mixout()), r"`strength` is 1.0; expected a number in \[0, 1\), the prob"),
        (
            lambda: WeightAnchoring(0.1, form=Mixout),
            "`form` is <class .*Mixout'>; expected one of decoupled, .*Penalty",
        ),  # type: ignore[arg-type]
    ],
)
def test_a_form_checks_the_strength_and_a_class_is_none(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


FRESH: dict[str, Any] = {
    "decoupled": lambda: Decoupled(annealing=sigmoid_annealing(0.5, 6)),
    "penalty": lambda: Penalty(importance={name: 10 * tensor for name, tensor in importance().items()}),
    "mixout": Mixout,
    "features": Features,
    "outputs": Outputs,
}


@pytest.mark.parametrize("name", FRESH)
def test_one_form_in_two_trainings_at_once_is_as_two_forms(name: str, tmp_path: Path) -> None:
    """The second training runs in the middle of the first, on a model of its own."""

    class Meanwhile(TrainerCallback):
        def __init__(self, form: Any) -> None:
            self.form, self.end = form, dict[str, Tensor]()

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5 and not self.end:
                other = double(seed=4)
                train(other, tmp_path / "other", WeightAnchoring(0.3, form=self.form), max_steps=3)
                self.end = tiny.state(other)

    def run(first: Any, second: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, meanwhile = double(), Meanwhile(second)
        args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = tiny.trainer(model, args, callbacks=[WeightAnchoring(0.3, form=first), meanwhile])
        attach(trainer)
        trainer.train()
        return tiny.state(model), meanwhile.end

    shared = FRESH[name]()
    ours, theirs = run(shared, shared), run(FRESH[name](), FRESH[name]())
    assert not tiny.moved(ours[0], theirs[0])
    assert not tiny.moved(ours[1], theirs[1])
    assert tiny.moved(ours[0], ours[1])
    assert not shared.opened
