"""RepresentationProbes in a Trainer: what it logs, of which rows, and what it leaves as it was."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback

from hub_cards.facts import RunFacts
from hub_cards.history import measures
from hub_cards.pictures import pictures
from tests import tiny
from tl_callbacks import PreflightError, RepresentationProbes, attach, events, group_layers
from tl_callbacks.probing.alignment import procrustes
from tl_callbacks.probing.capture import Batch, Capture
from tl_callbacks.probing.geometry import geometry
from tl_callbacks.probing.measures import measure
from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.passes import Listener
from tl_callbacks.probing.reference import random_twin
from tl_callbacks.probing.similarity import linear_cka
from tl_callbacks.probing.targets import as_targets

EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
NAMES = group_layers(tiny.bert()).names


def trained(folder: Path, probes: Any, *, eval_dataset: Any = None, **options: Any) -> Trainer:
    model = options.pop("model", None) or tiny.bert()
    args = tiny.arguments(folder, **{**EVALUATION, **options})
    data = tiny.texts(64)
    evaluated = data[:20] if eval_dataset is None else eval_dataset
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=evaluated, callbacks=[probes])
    attach(trainer)
    trainer.train()
    return trainer


def logged(trainer: Trainer, ending: str = "") -> dict[int, dict[str, float]]:
    """What was logged of one set, by step."""
    key = f"tl/effective_rank{ending}/encoder.layer.0"
    return {entry["step"]: entry for entry in trainer.state.log_history if key in entry}


class Count(TrainerCallback):
    """Counts the forwards of the model outside training steps."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = 0
        model.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any) -> None:
        self.forwards += not module.training


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A training with all that there is; read only."""
    probes = RepresentationProbes("eval", reference_set=tiny.texts(15, seed=9))
    return trained(tmp_path_factory.mktemp("usual"), probes)


def measured(trainer: Trainer, step: int = 4) -> dict[str, float]:
    """What was measured of the probe set at a step."""
    found = logged(trainer)[step].items()
    return {key: value for key, value in found if key.startswith("tl/") and "_reference/" not in key}


def test_every_group_has_every_measure_at_every_evaluation(usual: Trainer) -> None:
    trainer = usual
    found = logged(trainer)
    assert list(found) == [0, 2, 4]
    first, last = found[0], found[4]
    kinds = ("probe", "probe_se", "effective_rank", "anisotropy")
    controls = ("probe_random_init", "probe_shuffled", "probe_chance")
    for ending in ("", "_reference"):
        assert {f"tl/{kind}{ending}/{name}" for kind in (*kinds, *controls) for name in NAMES} <= set(first)
        later = logged(trainer, ending)[4]
        assert {f"tl/{kind}{ending}/{name}" for kind in (*kinds, "cka", "procrustes") for name in NAMES} <= set(later)
    assert {key.partition("drift/")[2] for key in last if "drift" in key} == {*NAMES} - {"head"}
    assert all(math.isfinite(value) for entry in found.values() for key, value in entry.items() if "tl/" in key)
    assert last["tl/drift/encoder.layer.0"] > 0.1
    assert 0 < last["tl/cka/encoder.layer.0"] < 0.999
    assert last["tl/procrustes/encoder.layer.0"] > 0.01
    (event,) = events.read(trainer.state.log_history, "probing")
    assert event["rows"] == {"probe": 20, "reference": 15}


def test_the_numbers_are_those_of_the_rows_read_by_hand(usual: Trainer) -> None:
    trainer = usual
    rows, model, pretrained = tiny.texts(64)[:20], trainer.model, tiny.bert().eval()
    assert model is not None
    sides = []
    for one in (model.eval(), pretrained):
        seen: list[Any] = []
        with Capture(one, group_layers(one), seen.append), torch.no_grad():
            one(input_ids=torch.tensor([row["input_ids"] for row in rows]))
        sides.append(seen[0].features)
    labels = torch.tensor([row["labels"] for row in rows])
    for kind, values in measure(sides[0], labels, sides[1]).items():
        for name, value in values.items():
            assert logged(trainer)[4][f"tl/{kind}/{name}"] == pytest.approx(value, abs=1e-5), (kind, name)


def test_a_set_that_is_evaluated_costs_no_forward_and_another_one_a_pass(tmp_path: Path) -> None:
    def forwards(make_probes: Any, **options: Any) -> tuple[int, Trainer]:
        model = tiny.bert()
        trainer = tiny.trainer(model, tiny.arguments(tmp_path, **EVALUATION), callbacks=make_probes)
        attach(trainer)
        count = Count(model)
        trainer.train()
        return count.forwards, trainer

    plain, _ = forwards([])
    own, _ = forwards([RepresentationProbes("eval", controls=False)])
    probes = RepresentationProbes(tiny.texts(16, seed=3), controls=False)
    extra, _ = forwards([probes])
    assert plain == own == 2 * 2
    assert extra == plain + 2 * 2
    assert probes.facts()["seconds"]["passes"] > 0
    assert probes.facts()["passes"] == {"probe": "it is no evaluation set of the Trainer"}


def test_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"first": tiny.texts(20, seed=3), "second": tiny.texts(21, seed=4)}
    probes = RepresentationProbes("second", reference_set=sets["first"], controls=False)
    trainer = trained(tmp_path, probes, eval_dataset=sets)
    assert list(logged(trainer)) == list(logged(trainer, "_reference")) == [0, 2, 4]
    assert set(probes.facts()["passes"].values()) == {"the Trainer's evaluation"}
    assert "passes" not in probes.facts()["seconds"]
    copies = RepresentationProbes([*sets["second"]], reference_set=[*sets["first"]], controls=False)
    alone = trained(tmp_path / "alone", copies, eval_dataset=sets)
    for ending in ("", "_reference"):
        ours, theirs = logged(trainer, ending)[4], logged(alone, ending)[4]
        for key, value in theirs.items():
            if key.startswith("tl/"):
                assert ours[key] == pytest.approx(value, abs=1e-6), key


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "by length": ({"train_sampling_strategy": "group_by_length"}, "it reads rows by length"),
    "last batch dropped": ({"dataloader_drop_last": True}, "dataloader_drop_last leaves rows out"),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch.compile passes hooks by"),
}


@pytest.mark.parametrize("name", REASONS)
def test_an_evaluation_that_does_not_show_the_rows_is_not_used(name: str, tmp_path: Path) -> None:
    overrides, reason = REASONS[name]
    probes = RepresentationProbes("eval", controls=False)
    found = logged(trained(tmp_path, probes, **overrides))
    assert probes.facts()["passes"] == {"probe": reason}
    assert set(found) == {0, 2, 4}
    assert {key.partition("cka/")[2] for key in found[4] if "cka" in key} == {*NAMES}


class Backwards(Trainer):
    """Evaluates from the last row to the first."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return list(range(len(eval_dataset)))[::-1]


class Twice(Trainer):
    """Calls the model twice a batch."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model(**self._prepare_inputs(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", [Backwards, Twice])
def test_a_trainer_with_a_pass_of_its_own_kind_is_noticed(
    kind: type[Trainer], usual: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, probes = tiny.texts(64), RepresentationProbes("eval", controls=False)
    args = tiny.arguments(tmp_path, **EVALUATION)
    trainer = kind(tiny.bert(), args, train_dataset=data, eval_dataset=data[:20], callbacks=[probes])
    attach(trainer)
    trainer.train()
    assert measured(trainer) == pytest.approx(measured(usual), abs=1e-6)
    assert len(re.findall("reads the probe set itself", capsys.readouterr().out)) == 1


def test_the_rows_of_ranks_without_those_that_fill_the_last_batches() -> None:
    places = torch.arange(10)
    parts = []
    for rank in range(3):
        listener = Listener(10, places, rank, 3)
        for step in range(2):  # batches of 2: 12 places
            values = torch.arange(2.0) + (step * 3 + rank) * 2
            listener.add(_batch(torch.where(values < 10, values, values - 10)))
        part = listener.part()
        assert part is not None
        parts.append(part)
    assert [part.places.tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]
    assert all(part.features["layer"][:, 0].tolist() == part.places.tolist() for part in parts)


def _batch(values: torch.Tensor) -> Batch:
    return Batch({"layer": values[:, None]}, {})


@pytest.mark.parametrize("sizes", [[4, 4], [4, 4, 3], [3, 4, 3], [4, 4, 2, 0], []])
def test_forwards_that_are_not_one_pass_are_noticed(sizes: list[int]) -> None:
    listener = Listener(10, torch.arange(10))
    for size in sizes:
        listener.add(_batch(torch.zeros(size)))
    assert listener.part() is None
    whole = Listener(10, torch.tensor([1, 5]))
    for size in (4, 4, 2):
        whole.add(_batch(torch.zeros(size)))
    part = whole.part()
    assert part is not None
    assert part.places.tolist() == [1, 5]


def test_a_pass_of_its_own_changes_no_random_state(tmp_path: Path) -> None:
    probes = RepresentationProbes(tiny.texts(16, seed=3))
    args = tiny.arguments(tmp_path)
    trainer = tiny.trainer(tiny.bert(), args, callbacks=[probes])
    trainer.data_collator = Drawing()
    modes = [module.training for module in trainer.model.modules()]  # type: ignore[union-attr]
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    attach(trainer)
    assert Drawing.drawn > 0
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert [module.training for module in trainer.model.modules()] == modes  # type: ignore[union-attr]


class Drawing:
    """A collator that draws from every random state."""

    drawn = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        Drawing.drawn += 1
        torch.rand(1), random.random(), numpy.random.rand()
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_padding_by_the_trainers_collator(tmp_path: Path) -> None:
    """Rows of different lengths, whose means depend on the mask and not on what they are batched with."""

    class Padder:
        """What of a tokenizer pads."""

        padding_side = "right"
        model_input_names = ("input_ids", "attention_mask")

        def pad(self, rows: list[dict[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)
            ids = torch.tensor([[*row["input_ids"], *[0] * (longest - len(row["input_ids"]))] for row in rows])
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            mask = (torch.arange(longest) < lengths[:, None]).long()
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}

    rows = [{**row, "input_ids": row["input_ids"][: 2 + number % 6]} for number, row in enumerate(tiny.texts(20))]
    found = []
    for size in (1, 3, 20):
        args = tiny.arguments(tmp_path, **{**EVALUATION, "max_steps": 2}, per_device_eval_batch_size=size)
        collate = DataCollatorWithPadding(Padder())  # type: ignore[arg-type]
        probes = RepresentationProbes("eval", controls=False)
        trainer = Trainer(
            tiny.bert(), args, data_collator=collate, train_dataset=rows, eval_dataset=rows, callbacks=[probes]
        )
        attach(trainer)
        trainer.train()
        found.append(measured(trainer, 2))
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def test_the_reference_of_adapters_is_their_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(tiny.bert(), config)
    trainer = trained(tmp_path, RepresentationProbes("eval"), model=model, learning_rate=1e-9)
    found = logged(trainer)[4]
    assert found["tl/procrustes/encoder.layer.2"] > 0.001, "the adapters are no identity, so they differ from the base"
    assert found["tl/drift/encoder.layer.2"] < 1e-4


def test_a_model_made_anew_has_a_reference_of_its_own(tmp_path: Path) -> None:
    seeds = iter([1, 2])
    args = tiny.arguments(tmp_path, **EVALUATION, learning_rate=1e-9)
    data = tiny.texts(64)
    trainer = Trainer(
        args=args, model_init=lambda: tiny.bert(seed=next(seeds)), train_dataset=data, eval_dataset=data[:20],
        callbacks=[RepresentationProbes("eval")],
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    assert logged(trainer)[4]["tl/cka/encoder.layer.2"] > 0.9999


def test_rows_beyond_the_limit_are_left_out_at_random_but_the_same(tmp_path: Path) -> None:
    found = []
    for more in ({}, REASONS["by length"][0]):
        probes = RepresentationProbes("eval", max_rows=12, controls=False)
        found.append(measured(trained(tmp_path, probes, max_steps=2, learning_rate=0.0, **more), 2))
        assert probes.facts()["rows"] == {"probe": 12}
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_without_labels_and_with_values(tmp_path: Path) -> None:
    bare = [{"input_ids": row["input_ids"]} for row in tiny.texts(20, seed=5)]
    found = logged(trained(tmp_path, RepresentationProbes(bare)))[4]
    assert not any("probe" in key for key in found)
    assert {f"tl/{kind}/{name}" for kind in ("cka", "effective_rank") for name in NAMES} <= set(found)
    assert as_targets(torch.tensor([1, 1, -100])) is None
    assert as_targets(torch.tensor([float("nan"), 1.0, 2.0]))[0]["task"].tolist() == [1.0, 2.0]  # type: ignore[index]
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    assert measure({"layer": x}, x @ torch.ones(4))["probe"]["layer"] > 0.99


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_few_rows_give_what_exists(rows: int) -> None:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = measure({"layer": x, "constant": torch.ones(rows, 4)}, torch.arange(rows) % 2, {"layer": x, "constant": x})
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    assert ("cka" in found and "layer" in found["cka"]) is (rows > 3)


def test_a_run_that_resumes_from_other_weights_is_warned(tmp_path: Path) -> None:
    probes = RepresentationProbes("eval", controls=False)
    trainer = trained(tmp_path, probes, save_strategy="steps", save_steps=2)
    assert trainer.state.global_step == 4
    for seed in (0, 1):
        args = tiny.arguments(tmp_path, **EVALUATION)
        data = tiny.texts(64)
        again = Trainer(
            tiny.bert(seed=seed),
            args,
            train_dataset=data,
            eval_dataset=data[:20],
            callbacks=[RepresentationProbes("eval", controls=False)],
        )
        attach(again)
        if seed:
            with pytest.warns(UserWarning, match="began with other weights"):
                again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        else:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert {k: v for k, v in logged(again)[4].items()} == logged(trainer)[4]


def test_an_evaluation_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[RepresentationProbes("eval")])
    attach(trainer)
    assert trainer.model is not None
    trainer.eval_dataset[3]["input_ids"] = [999] * 8  # type: ignore[index]
    with pytest.raises(IndexError):
        trainer.evaluate()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_evaluation_without_training(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[RepresentationProbes("eval")])
    attach(trainer)
    trainer.evaluate()
    assert logged(trainer)[0]["tl/cka/encoder.layer.2"] == pytest.approx(1.0)


FINDINGS: dict[str, tuple[Any, str]] = {
    "a stream": (iter([]), "expected a data set with a length"),
    "several splits": ({"train": []}, "Give one split"),
    "an unknown name": ("dev", "`dev` is none of the Trainer's evaluation sets"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_sets_that_cannot_be_read_are_refused(name: str, tmp_path: Path) -> None:
    held, message = FINDINGS[name]
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[RepresentationProbes(held)])
    with pytest.raises(PreflightError, match=message):
        attach(trainer)


def test_what_is_refused_besides(tmp_path: Path) -> None:
    two = [RepresentationProbes("eval"), RepresentationProbes("eval")]
    with pytest.raises(PreflightError, match="several RepresentationProbes"):
        attach(tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=two))
    model = tiny.bert()
    model.config._name_or_path = "run/checkpoint-40"
    with pytest.raises(PreflightError, match="would take the features of `run/checkpoint-40`"):
        attach(tiny.trainer(model, tiny.arguments(tmp_path), callbacks=two[:1]))
    with pytest.raises(RuntimeError, match="Call attach"):
        tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[RepresentationProbes("eval")]).train()
    with pytest.raises(ValueError, match="`max_rows` is 3"):
        RepresentationProbes("eval", max_rows=3)
    with pytest.raises(ValueError, match="`pooling` is 'max'"):
        RepresentationProbes("eval", pooling="max")  # type: ignore[arg-type]


def test_packed_rows_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "position_ids": [0, 1, 2, 0, 1, 2, 3, 4]} for row in tiny.texts(16)]
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[RepresentationProbes(rows)])
    with pytest.raises(ValueError, match="several samples each"):
        attach(trainer)


def test_a_random_twin_has_the_shapes_and_none_of_the_weights() -> None:
    state = torch.get_rng_state()
    for model in (tiny.bert(), tiny.resnet(), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))):
        twin, same = random_twin(model, 1), random_twin(model, 1)
        pairs = list(zip(model.named_parameters(), twin.named_parameters(), same.named_parameters(), strict=True))
        for (name, one), (other_name, other), (_, again) in pairs:
            assert name == other_name
            assert one.shape == other.shape
            assert torch.equal(other, again)
            assert one.ndim < 2 or not torch.equal(one, other)
        before = tiny.state(model)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert tiny.moved(before, tiny.state(model)) == set()
    assert not torch.equal(torch.get_rng_state(), state), "tiny.bert seeds; the twins restore what they found"


def test_the_card_draws_what_was_logged(usual: Trainer) -> None:
    found = measures(usual.state.log_history)
    assert {"probe", "probe_se", "probe_random_init", "cka", "procrustes", "drift", "effective_rank"} <= set(found)
    assert list(found["cka"]) == list(NAMES)
    assert [step for step, _ in found["probe"]["encoder.layer.0"]] == [0, 2, 4]
    drawn = pictures(RunFacts(4, 4, "BertForSequenceClassification", measures=found))
    assert {"probe.png", "cka.png", "drift.png"} <= set(drawn)


def test_similarities_of_one_product_are_those_of_the_functions_alone() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 100
    y = x + 0.5 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    products: dict[str, torch.Tensor] = {}
    for _ in range(2):  # the second time from what was kept of the reference
        found = measure({"layer": x}, reference={"layer": y}, products=products)
        assert found["cka"]["layer"] == pytest.approx(linear_cka(x, y), abs=1e-12)
        assert found["procrustes"]["layer"] == pytest.approx(procrustes(x, y), abs=1e-9)
        shape = geometry(Moments.of(x))
        assert found["effective_rank"]["layer"] == pytest.approx(shape.effective_rank, rel=1e-12)
        assert found["anisotropy"]["layer"] == pytest.approx(shape.mean_cosine, rel=1e-12)
    assert list(products) == ["layer"]


def test_wide_groups_are_measured_in_a_projection() -> None:
    x = torch.randn(60, 1100, generator=torch.Generator().manual_seed(0))
    y = x + 0.3 * torch.randn(60, 1100, generator=torch.Generator().manual_seed(1))
    found = measure({"layer": x}, None, {"layer": y})
    assert found["cka"]["layer"] == pytest.approx(linear_cka(x, y), abs=0.1)
    assert measure({"layer": x}, None, {"layer": x})["cka"]["layer"] == pytest.approx(1.0)
