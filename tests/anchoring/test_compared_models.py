"""Features and old outputs of several architectures, old heads, old classes, and what is refused."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback

from tests import tiny
from tl_callbacks import GradualUnfreezing, LayerGroup, LayerGroups, WeightAnchoring, at_steps, attach, group_layers
from tl_callbacks.anchoring import Outputs, distillation_loss, feature_distance
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.preflight import PreflightError


class Measured(TrainerCallback):
    """Keeps what the anchor's form measured at each step."""

    def __init__(self, anchor: WeightAnchoring) -> None:
        self.anchor = anchor
        self.found: list[Mapping[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append(self.anchor._form.measured())


def one_step(
    folder: Path, model: nn.Module, old: nn.Module | None, rows: list[dict[str, Any]], form: Any, **kwargs: Any
) -> Mapping[str, float]:
    """What the form measures at the first step, on all rows at once."""
    args = tiny.arguments(folder, max_steps=1, per_device_train_batch_size=len(rows), learning_rate=0.0)
    anchor = WeightAnchoring(1.0, form=form, reference=None if old is None else tiny.state(old), exclude=())
    measured = Measured(anchor)
    trainer = tiny.trainer(model, args, rows, callbacks=[anchor, measured], **kwargs)
    attach(trainer)
    trainer.train()
    return measured.found[0]


def gpt2(seed: int) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def t5(seed: int) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double()


def language_rows(count: int = 8) -> list[dict[str, Any]]:
    rows = tiny.texts(count)
    for number, row in enumerate(rows):
        kept = 3 + number % 6
        row["attention_mask"] = [1] * kept + [0] * (8 - kept)
        row["labels"] = row["input_ids"][:kept] + [-100] * (8 - kept)
    return rows


def stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_a_causal_language_model_keeps_its_features_and_outputs_where_the_mask_does(tmp_path: Path) -> None:
    model, old, rows = gpt2(0), gpt2(1), language_rows()
    batch = stacked(rows)
    mask = batch["attention_mask"] != 0
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch, output_hidden_states=True) for m in (model, old))
    found = one_step(tmp_path, model, old, rows, "outputs")
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours.logits, theirs.logits, mask)), rel=1e-6)
    found = one_step(tmp_path, model, old, rows, "features")
    expected = feature_distance(ours.hidden_states[1], theirs.hidden_states[1], mask)
    assert found["features/h.0"] == pytest.approx(float(expected), rel=1e-6)
    assert found["features/h.0"] != pytest.approx(
        float(feature_distance(ours.hidden_states[1], theirs.hidden_states[1])), rel=1e-3
    )


def test_an_encoder_decoder_is_read_on_both_sides(tmp_path: Path) -> None:
    model, old, rows = t5(0), t5(1), language_rows()
    batch = stacked(rows)
    kept = batch["labels"] != -100
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch, output_hidden_states=True) for m in (model, old))
    found = one_step(tmp_path, model, old, rows, "outputs")
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours.logits, theirs.logits, kept)), rel=1e-6)
    found = one_step(tmp_path, model, old, rows, "features")
    for side, mask in (("encoder", batch["attention_mask"] != 0), ("decoder", kept)):
        a, b = (getattr(output, f"{side}_hidden_states")[1] for output in (ours, theirs))
        assert found[f"features/{side}.block.0"] == pytest.approx(float(feature_distance(a, b, mask)), rel=1e-6)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_outputs_with_a_prompt_are_kept_near_those_without(config: Any, tmp_path: Path) -> None:
    base, rows = gpt2(0).float(), language_rows()
    batch = stacked(rows)
    mask = batch["attention_mask"] != 0
    with torch.no_grad():
        theirs = base.eval()(**batch).logits
        torch.manual_seed(0)
        model = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        ours = model(**batch).logits[:, -8:]
    found = one_step(tmp_path, model, None, rows, "outputs")
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours, theirs, mask)), rel=1e-4)
    assert found["outputs"] > 1e-4, "the control: the prompt changes the outputs from the start"
    assert "forward" not in vars(model)


def test_outputs_of_a_classifier_with_a_prompt_are_kept_near_those_without(tmp_path: Path) -> None:
    base, rows = tiny.bert(dropout=0.0), [{**row, "attention_mask": [1] * 8} for row in tiny.texts(8)]
    batch = stacked(rows)
    with torch.no_grad():
        theirs = base.eval()(**batch).logits
        torch.manual_seed(0)
        model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
        ours = model(**batch).logits
    found = one_step(tmp_path, model, None, rows, "outputs")
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours, theirs)), rel=1e-4)
    assert found["outputs"] > 1e-5, "the control"


@pytest.mark.parametrize("form", ["features", "outputs"])
def test_adapters_that_add_something_from_the_start_are_compared_with_the_base(form: str, tmp_path: Path) -> None:
    base, rows = tiny.bert(dropout=0.0), tiny.texts(8)
    ids = stacked(rows)["input_ids"]
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    with torch.no_grad():
        theirs = base.eval()(ids, output_hidden_states=True)
        torch.manual_seed(0)
        model = get_peft_model(base, config).eval()
        ours = model(ids, output_hidden_states=True)
    found = one_step(tmp_path, model, None, rows, form)
    if form == "outputs":
        expected = {"outputs": distillation_loss(ours.logits, theirs.logits)}
    else:
        pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        expected = {f"features/encoder.layer.{i}": feature_distance(a, b) for i, (a, b) in enumerate(pairs)}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4)
        assert found[name] > 1e-5, "the control"


def test_a_reference_without_adapters_leaves_frozen_adapters_frozen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    groups = group_layers(model)
    start = {name: p.detach().clone() for name, p in parameters_by_name(model).items()}
    callbacks = [
        GradualUnfreezing(groups, at_steps([2, 4]), keep_frozen=("encoder.layer.0",)),
        WeightAnchoring(1.0, form="features"),
    ]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=callbacks)
    attach(trainer)
    trainer.train()
    now = {name: p.detach() for name, p in parameters_by_name(model).items()}
    assert not tiny.moved(start, now, groups["encoder.layer.0"].parameters)
    assert tiny.moved(start, now, groups["encoder.layer.1"].parameters)


def test_batch_norm_is_compared_with_the_pretrained_statistics(tmp_path: Path) -> None:
    old = tiny.resnet(seed=1)
    pixels = torch.stack([row["pixel_values"] for row in tiny.images(32)])
    for _ in range(20):
        old(pixels)  # moves its statistics
    model = tiny.resnet()
    model.accepts_loss_kwargs = False
    rows = tiny.images(8, seed=2)
    pixels = torch.stack([row["pixel_values"] for row in rows])
    with torch.no_grad():
        theirs = old.eval()(pixels, output_hidden_states=True).hidden_states
        ours = copy.deepcopy(model).train()(pixels, output_hidden_states=True).hidden_states
        unmoved = copy.deepcopy(old)
        unmoved.load_state_dict({**old.state_dict(), **{n: b for n, b in tiny.resnet().named_buffers()}})
        wrong = unmoved.eval()(pixels, output_hidden_states=True).hidden_states
    found = one_step(tmp_path, model, old, rows, "features")
    name = [key for key in found if "stages.1" in key][-1]
    assert found[name] == pytest.approx(float(feature_distance(ours[-1], theirs[-1])), rel=1e-5)
    assert found[name] != pytest.approx(float(feature_distance(ours[-1], wrong[-1])), rel=1e-2), "the control"


def test_an_old_head_stands_in_for_a_new_one(tmp_path: Path) -> None:
    model, rows = tiny.bert(dropout=0.0), tiny.texts(8)
    old, head = tiny.bert(dropout=0.0, seed=3), nn.Linear(16, 5)
    weights, new_head = tiny.state(head), tiny.state(model)["classifier.weight"]
    ids = stacked(rows)["input_ids"]
    with torch.no_grad():
        ours, theirs = (head(m.bert(ids).pooler_output) for m in (model.eval(), old.eval()))
    found = one_step(tmp_path, model, old, rows, Outputs(old_head=head))
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours, theirs)), rel=1e-5)
    args = tiny.arguments(tmp_path)
    anchor = WeightAnchoring(50.0, form=Outputs(old_head=head), reference=tiny.state(old))
    measured = Measured(anchor)
    trainer = tiny.trainer(model, args, callbacks=[anchor, measured])
    attach(trainer)
    trainer.train()
    assert measured.found[-1]["outputs"] < 0.5 * measured.found[0]["outputs"]
    assert not tiny.moved(weights, tiny.state(head))
    assert all(parameter.grad is None for parameter in head.parameters())
    assert not torch.equal(new_head, model.classifier.weight), "the control: the new head trains"


class Digits(nn.Module):
    """Two layers and a head for ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.accepts_loss_kwargs = False
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.classifier = nn.Linear(64, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            pixels = block(pixels)
        logits = self.classifier(pixels)
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def test_old_classes_are_kept_while_new_ones_are_learned(tmp_path: Path) -> None:
    pixels, labels = (torch.tensor(part) for part in (load_digits().data / 16, load_digits().target))
    pixels, held_out = pixels.float(), torch.arange(len(pixels)) % 4 == 0
    source, new = (labels < 5) & ~held_out, (labels >= 5) & ~held_out
    rows = [{"pixels": x, "labels": int(y)} for x, y in zip(pixels[new], labels[new], strict=True)]

    def pretrained(seed: int) -> Digits:
        torch.manual_seed(seed)
        model = Digits()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels[source])["logits"][:, :5], labels[source]).backward()
            optimizer.step()
        return model

    def accuracy(model: nn.Module, first: int) -> float:
        """Of the five classes from the first one on, among themselves."""
        asked = held_out & (labels >= first) & (labels < first + 5)
        logits = model.eval()(pixels[asked])["logits"][:, first : first + 5]
        return float((logits.argmax(1) + first == labels[asked]).float().mean())

    def tuned(*forms: Any) -> tuple[float, float]:
        """The accuracy on old and on new digits, the mean of two seeds."""
        found = []
        for seed in range(2):
            model = pretrained(seed)
            assert accuracy(model, 0) > 0.98
            args = tiny.arguments(
                tmp_path, max_steps=150, per_device_train_batch_size=32, learning_rate=3e-3, weight_decay=0.0,
                logging_strategy="no",
            )  # fmt: skip
            trainer = tiny.trainer(model, args, rows, callbacks=[WeightAnchoring(1.0, form=f) for f in forms])
            attach(trainer)
            trainer.train()
            found.append((accuracy(model, 0), accuracy(model, 5)))
        return sum(old for old, _ in found) / 2, sum(learned for _, learned in found) / 2

    plain = tuned()
    assert plain[0] < 0.95, "the control: plain fine-tuning forgets"
    for form in (Outputs(classes=range(5)), "features"):
        kept, learned = tuned(form)
        assert kept > 0.985
        assert learned > plain[1] - 0.1


def test_several_labels_a_row_are_kept_one_by_one(tmp_path: Path) -> None:
    kinds = {"problem_type": "multi_label_classification"}
    model, old = tiny.bert(dropout=0.0, **kinds), tiny.bert(dropout=0.0, seed=3, **kinds)
    rows = [{**row, "labels": [1.0, 0.0, 1.0]} for row in tiny.texts(8)]
    with torch.no_grad():
        ours, theirs = (m.eval()(stacked(rows)["input_ids"]).logits for m in (model, old))
    found = one_step(tmp_path, model, old, rows, "outputs")
    assert found["outputs"] == pytest.approx(float(distillation_loss(ours, theirs, independent=True)), rel=1e-4)


class Twice(Trainer):
    """A loss that calls the model twice, as that of pairs does, and once without gradient."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        with torch.no_grad():
            model(**inputs)
        flipped = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
        return model(**inputs).loss + model(**flipped).loss


def test_a_loss_may_call_the_model_several_times(tmp_path: Path) -> None:
    model, old, rows = tiny.bert(dropout=0.0), tiny.bert(dropout=0.0, seed=3), tiny.texts(8)
    ids = stacked(rows)["input_ids"]
    with torch.no_grad():
        each = [distillation_loss(model.eval()(i).logits, old.eval()(i).logits) for i in (ids, ids.flip(1))]
    anchor = WeightAnchoring(1.0, form="outputs", reference=tiny.state(old))
    measured = Measured(anchor)
    args = tiny.arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0)
    trainer = Twice(model, args, train_dataset=rows, callbacks=[anchor, measured])
    attach(trainer)
    trainer.train()
    assert measured.found[0]["outputs"] == pytest.approx(float(sum(each)) / 2, rel=1e-4)


class PastTheModel(Trainer):
    """A loss from a part of the model, which passes its root by."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model.classifier(model.bert(inputs["input_ids"]).pooler_output)
        return nn.functional.cross_entropy(logits, inputs["labels"])


@pytest.mark.parametrize(
    ("form", "match"),
    [
        ("features", "without a call of BertForSequenceClassification that records a gradient"),
        ("penalty", "without a call of BertForSequenceClassification in training mode, where form='penalty' enters"),
        ("mixout", "without a call of BertForSequenceClassification in training mode, where form='mixout' enters"),
    ],
)
def test_a_loss_that_passes_the_model_by_is_refused(form: Any, match: str, tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    anchor = WeightAnchoring(0.5, form=form)
    trainer = PastTheModel(model, tiny.arguments(tmp_path), train_dataset=tiny.texts(), callbacks=[anchor])
    attach(trainer)
    with pytest.raises(RuntimeError, match=match):
        trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert not tiny.moved(start, tiny.state(model)), "it is refused before the first step"


def test_it_must_be_attached(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[WeightAnchoring(1.0, form="features")])
    with pytest.raises(RuntimeError, match=r"needs the trainer\. Call attach\(trainer\)"):
        trainer.train()


def test_fsdp2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("features", "outputs"):
        anchor = WeightAnchoring(1.0, form=form)  # type: ignore[arg-type]
        trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[anchor])
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, sync_module_states=False)
        monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
        trainer.is_fsdp_enabled = True
        with pytest.raises(PreflightError, match=rf"form='{form}' runs the model .* under FSDP 2"):
            attach(trainer)


class Bare(nn.Module):
    """A model that returns a tuple, and has a parameter of its own that no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.out(input_ids.float() / 50) * self.scale
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize(
    ("form", "make", "match"),
    [
        ("outputs", Bare, "the model returns tuple without `logits`"),
        ("outputs", lambda: tiny.bert(problem_type="regression"), "for the problem type regression; distillation"),
        (Outputs(classes=[1]), tiny.bert, r"outputs of shape \(4, 1\)"),
        (Outputs(classes=range(5)), tiny.bert, "`classes` has 3, and there are 3 logits; expected numbers from 0 to 2"),
        ("features", Bare, "no module stands for the group `scale`"),
    ],
)
def test_what_cannot_be_compared_is_refused(form: Any, make: Any, match: str, tmp_path: Path) -> None:
    model = make()
    groups = None
    rows = tiny.texts()
    if isinstance(model, Bare):
        groups = LayerGroups((LayerGroup("scale", ("scale",)), LayerGroup("head", ("out.weight", "out.bias"))), "head")
    if getattr(getattr(model, "config", None), "problem_type", None) == "regression":
        rows = [{**row, "labels": [0.5, 0.1, 0.2]} for row in rows]
    anchor = WeightAnchoring(1.0, form=form, groups=groups)
    trainer = tiny.trainer(model, tiny.arguments(tmp_path), rows, callbacks=[anchor])
    attach(trainer)
    with pytest.raises(ValueError, match=match):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightAnchoring({"embeddings": 1.0}, form="outputs"), "numbers by group, which form='outputs' cannot"),
        (lambda: WeightAnchoring(-1.0, form="features"), r"`strength` is -1.0; expected a number in \[0, infinity\)"),
        (lambda: Outputs(temperature=0.0), "`temperature` is 0.0; expected a number above 0"),
        (lambda: WeightAnchoring(1.0, form="lwf"), "`form` is 'lwf'; expected one of .*features, outputs"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_model_made_anew_is_its_own_reference(tmp_path: Path) -> None:
    anchor = WeightAnchoring(1.0, form="outputs")
    measured = Measured(anchor)
    args = tiny.arguments(tmp_path, max_steps=2)
    trainer = Trainer(
        args=args, model_init=lambda: tiny.bert(dropout=0.0), train_dataset=tiny.texts(), callbacks=[anchor, measured]
    )
    attach(trainer)
    trainer.train()
    assert measured.found[0]["outputs"] == pytest.approx(0.0, abs=1e-12)
    assert measured.found[1]["outputs"] > 0


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path: Path) -> None:
    def run(form: Any, **overrides: Any) -> dict[str, Tensor]:
        model = tiny.bert(dropout=0.0, layers=1).double()
        args = tiny.arguments(tmp_path, optim="sgd", max_steps=3, **overrides)
        anchor = WeightAnchoring(50.0, form=form, reference=tiny.state(tiny.bert(layers=1, seed=3)))
        trainer = tiny.trainer(model, args, callbacks=[anchor])
        attach(trainer)
        trainer.train()
        return tiny.state(model)

    eager = run("features")
    compiled = run("features", torch_compile=True, torch_compile_backend="aot_eager")
    start = tiny.state(tiny.bert(dropout=0.0, layers=1).double())
    for name, weight in eager.items():
        assert torch.allclose(weight, compiled[name], rtol=1e-12, atol=1e-15), name
    assert tiny.moved(start, eager)


def test_facts_tell_the_settings() -> None:
    facts = WeightAnchoring(0.5, form=Outputs(classes=range(2))).facts()
    assert facts["form"] == "outputs"
    assert (facts["temperature"], facts["classes"], facts["old_head"]) == (2.0, [0, 1], False)
    assert WeightAnchoring(0.5, form="features").facts()["form"] == "features"
