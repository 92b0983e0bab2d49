"""attach(trainer): what it installs, what it writes, and what it takes back."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import Trainer, TrainerCallback

import tl_callbacks
from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    PreflightError,
    Recorder,
    WeightAnchoring,
    adapt,
    add_to_recipe,
    at_steps,
    attach,
    group_layers,
    last_complete_checkpoint,
    preview,
)

SCHEMA = json.loads((Path(__file__).parent.parent / "hub_cards" / "run.schema.json").read_text())


def recipe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recipe.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", sorted(tl_callbacks.STRATEGIES))
def test_the_recipe_of_every_strategy_fits_the_schema(strategy: str, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    keywords = adapt(tiny.bert(), args, strategy)
    trainer = Trainer(args=args, train_dataset=tiny.texts(), **keywords)
    attach(trainer)
    trainer.train()
    found = recipe(tmp_path)
    jsonschema.validate(found, SCHEMA)
    assert found["status"] == "finished"
    assert found["methods"]["Strategy"]["name"] == strategy
    assert found["methods"]["LayerwiseOptimizer"]["learning_rate"] == 1e-2
    assert (found["training"]["global_step"], found["training"]["max_steps"]) == (12, 12)
    add_to_recipe(tmp_path, task="text-classification", results={"test": {"accuracy": 0.5}})
    jsonschema.validate(recipe(tmp_path), SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "status": "half"}, SCHEMA)


def test_the_recipe_is_there_while_training_and_says_so(tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(recipe(tmp_path)["status"])

    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[Look()])
    attach(trainer)
    trainer.train()
    assert set(seen) == {"running"}
    assert recipe(tmp_path)["status"] == "finished"
    assert not list(tmp_path.glob("*.part"))


def test_facts_that_were_added_survive_but_results_of_another_run_do_not(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
        attach(trainer)
        trainer.train()
        assert "results" not in recipe(tmp_path)
        add_to_recipe(tmp_path, owner="us", results={"test": {"accuracy": 1.0}})
    assert recipe(tmp_path)["owner"] == "us"
    with pytest.raises(ValueError, match="`model` is written by the recorder"):
        add_to_recipe(tmp_path, model={})
    with pytest.raises(FileNotFoundError, match=r"recipe\.json is missing in"):
        add_to_recipe(tmp_path / "elsewhere", results={})


def test_attaching_twice_changes_nothing(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))
    attach(trainer)
    attach(trainer)
    assert sum(isinstance(callback, Recorder) for callback in trainer.callback_handler.callbacks) == 1


def test_the_second_of_two_trainers_has_the_callback_to_itself(tmp_path: Path) -> None:
    model = tiny.bert()
    callback = GradualUnfreezing(group_layers(model), at_steps([2, 4, 6, 8]))
    for _ in range(2):
        trainer = tiny.trainer(model, tiny.arguments(tmp_path), callbacks=[callback])
        attach(trainer)
        trainer.train()
        assert callback.trainer is trainer
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                with torch.no_grad():
                    kwargs["model"].classifier.bias.fill_(float("nan"))

    def run(folder: str, attached: bool) -> Trainer:
        trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path / folder), callbacks=[Poison()])
        if attached:
            attach(trainer)
        trainer.train()
        return trainer

    assert run("plain", False).state.global_step == 12, "the control: the plain Trainer trains on"
    with pytest.raises(FloatingPointError, match=r"`(loss|grad_norm)` is nan at step 8.*Lower learning_rate \(0.01\)"):
        run("ours", True)
    assert recipe(tmp_path / "ours")["status"] == "running"


def test_only_a_whole_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, save_strategy="steps", save_steps=4)
    trainer = tiny.trainer(tiny.bert(), args)
    attach(trainer)
    with pytest.raises(ValueError, match=r"no checkpoint in .* was written to its end"):
        trainer.train(resume_from_checkpoint=True)
    trainer = tiny.trainer(tiny.bert(), args)
    attach(trainer)
    trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    random_state = tmp_path / "checkpoint-12" / "rng_state.pth"
    for rank, expected in enumerate(["checkpoint-8", "checkpoint-12"]):
        random_state = random_state.rename(random_state.with_name(f"rng_state_{rank}.pth"))
        if rank:
            random_state.with_name("rng_state_0.pth").write_bytes(random_state.read_bytes())
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / expected), "two ranks write two random states"
    assert last_complete_checkpoint(tmp_path, world_size=4) == str(tmp_path / "checkpoint-8")
    state = tmp_path / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    assert last_complete_checkpoint(tmp_path) is None


def test_deepspeed_keeps_the_optimizer_in_a_folder_that_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    for name in ("rng_state.pth", "scheduler.pt"):
        torch.save({}, folder / name)
    (folder / "model.safetensors").touch()
    (folder / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) is None
    (folder / "latest").write_text("global_step4")
    assert last_complete_checkpoint(tmp_path) is None
    (folder / "global_step4").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(folder)


def test_an_error_lists_what_is_wrong(tmp_path: Path) -> None:
    model = tiny.bert()
    model.bert.pooler.requires_grad_(False)
    with pytest.raises(PreflightError, match="found 1 problem") as caught:
        attach(tiny.trainer(model, tiny.arguments(tmp_path)))
    assert len(caught.value.findings) == 1
    assert isinstance(caught.value, ValueError)


def test_preview_shows_groups_rates_and_phases_without_training(tmp_path: Path) -> None:
    model = tiny.bert()
    start = tiny.state(model)
    args = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    keywords = adapt(model, args, "gradual", decay=0.5, keep_frozen=["embeddings"])
    trainer = Trainer(args=args, train_dataset=tiny.texts(), **keywords)
    attach(trainer)
    text = preview(trainer)
    assert "strategy gradual: opens 3 groups downwards from head" in text
    assert "32 steps, 16 an epoch" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["embeddings"][-1] == "never"
    assert lines["encoder.layer.2"][-2:] == ["0.005", "6"]
    assert lines["head"][-2:] == ["0.01", "0"]
    assert not tiny.moved(start, tiny.state(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_our_rates_and_distances_reach_the_reporters(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        """What an integration such as W&B sees."""

        def __init__(self) -> None:
            self.keys: set[str] = set()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.keys |= set(logs)

    model = tiny.bert()
    reporter = Reporter()
    args = tiny.arguments(tmp_path, eval_strategy="steps", eval_steps=6)
    trainer = tiny.trainer(model, args, callbacks=[reporter, WeightAnchoring(0.1)])
    attach(trainer)
    trainer.train()
    assert {"loss", "eval_loss", "tl/rate/head", "tl/rate/embeddings", "tl/anchor/embeddings"} <= reporter.keys
    records = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in records] == [4, 8, 12]
    assert all({"loss", "grad_norm", "learning_rate"} <= set(entry) for entry in records), "main records undisturbed"


def test_a_frozen_parameter_of_a_model_that_cannot_be_made_anew_is_a_warning(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"`0\.bias` and 0 other parameters of Sequential require no gradient"):
        attach(Trainer(model, tiny.arguments(tmp_path)))


def test_what_is_no_trainer_is_refused(tmp_path: Path) -> None:
    class Outer:
        """What SetFit's trainer is: it has a transformers.Trainer inside."""

        st_trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path))

    with pytest.raises(TypeError, match=r"got tests.test_attach.Outer. .*attach\(trainer.st_trainer\)"):
        attach(Outer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"BertForSequenceClassification. Pass the trainer whose"):
        attach(tiny.bert())  # type: ignore[arg-type]
    attach(Outer.st_trainer)
