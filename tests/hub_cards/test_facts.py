"""Reading a run's files: what is read, what is refused, and that no local path gets through."""

import json
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest

from hub_cards import read_facts
from hub_cards.history import Phase
from hub_cards.paths import is_repo_id, without_paths
from tests.hub_cards import runs


def test_what_was_trained_when_is_read_from_what_happened(tmp_path: Path) -> None:
    facts = read_facts(runs.write(tmp_path))
    assert facts.phases == (
        Phase(0, 4, ("head",), ("head",), 100),
        Phase(4, 10, ("encoder.layer.0",), ("encoder.layer.0", "head"), 400),
    )
    assert list(facts.rates) == ["embeddings", "encoder.layer.0", "head"]
    assert facts.rates["head"] == ((5, 0.01), (10, 0.001))
    assert list(facts.curves) == ["loss", "grad_norm", "eval_loss", "eval_accuracy"]
    assert facts.measures == {}
    assert [(r.split, r.metric, r.value) for r in facts.results] == [("test", "accuracy", 0.75), ("test", "loss", 0.5)]
    assert facts.data is not None
    assert facts.data.splits["train"].rows == 64


def test_what_methods_measured_is_kept_by_method_and_group(tmp_path: Path) -> None:
    log = [*runs.STATE["log_history"], {"tl/probe/head": 0.5, "step": 10}, {"tl/probe/head": float("nan"), "step": 20}]
    facts = read_facts(runs.write(tmp_path, None, runs.state(log_history=log)))
    assert list(facts.measures) == ["probe"]
    assert facts.measures["probe"]["head"][0] == (10, 0.5)
    assert len(facts.measures["probe"]["head"]) == 2


def test_the_value_is_frozen(tmp_path: Path) -> None:
    facts = read_facts(runs.write(tmp_path))
    with pytest.raises(FrozenInstanceError):
        facts.global_step = 3  # type: ignore[misc]


def test_a_run_without_a_recipes_facts_says_none_and_not_zero(tmp_path: Path) -> None:
    found = runs.recipe()
    for key in ("data", "results", "command", "commit", "task", "preprocessing"):
        del found[key]
    del found["training"]["cost"]
    for key in ("base_class", "local", "fingerprint", "dtype", "num_labels", "id2label", "problem_type"):
        del found["model"][key]
    facts = read_facts(runs.write(tmp_path, found, runs.state(log_history=[])))
    assert (facts.data, facts.results, facts.cost, facts.commit) == (None, (), None, None)
    assert facts.phases[0].open == ("embeddings", "encoder.layer.0", "head")  # all trained from the first step on


def test_without_results_those_of_the_last_evaluation_are_read(tmp_path: Path) -> None:
    found = runs.recipe()
    del found["results"]
    facts = read_facts(runs.write(tmp_path, found))
    assert [(r.split, r.metric, r.value) for r in facts.results] == [("eval", "loss", 0.5), ("eval", "accuracy", 0.75)]


def test_no_local_path_is_read(tmp_path: Path) -> None:
    local = {"model__name_or_path": "/scratch/jo/models/bert", "model__local": True, "data__local": True}
    found = runs.recipe(**local, data__name="/scratch/jo/mails.csv")
    found["model"]["adapters"] = {"default": {"base_model_name_or_path": "/scratch/jo/models/bert"}}
    facts = read_facts(runs.write(tmp_path, found))
    assert (facts.base.name, facts.base.folder) == (None, "bert")
    assert facts.command == ("python", "train.py", "--train_file", "train.csv")
    assert "scratch" not in json.dumps(asdict(facts))


def test_local_data_without_that_mark_never_become_an_id(tmp_path: Path) -> None:
    found = runs.recipe()
    del found["data"]["local"]
    facts = read_facts(runs.write(tmp_path, found))
    assert facts.data is not None
    assert facts.data.local


@pytest.mark.parametrize("name", ["recipe.json", "trainer_state.json"])
def test_a_missing_file_says_what_writes_it(tmp_path: Path, name: str) -> None:
    (runs.write(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {name}; expected .*(attach|save_state)"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "half"}, "does not fit the schema at `status`: 'half' is not one of"),
        ({"model__revision": 3}, "at `model.revision`: 3 is not of type"),
        ({"model__fingerprint": {"digest": "x", "tensors": {}}}, "at `model.fingerprint"),
        ({"results": {"test": {"accuracy": "high"}}}, "at `results.test.accuracy`: 'high' is not of type 'number'"),
        ({"schema_version": 2}, "has schema_version 2, expected 1; upgrade tl-callbacks"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_the_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_facts(runs.write(tmp_path, runs.recipe(**change)))


def test_a_history_that_does_not_fit_is_refused_with_the_place(tmp_path: Path) -> None:
    broken = runs.state(log_history=[{"tl/event": "opening", "step": 3}])
    with pytest.raises(ValueError, match=r"trainer_state.json in .* at `log_history.0`: 'groups' is a required"):
        read_facts(runs.write(tmp_path, None, broken))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe"])
def test_a_cut_file_is_refused(tmp_path: Path, text: str) -> None:
    (runs.write(tmp_path) / "recipe.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe.json in .* (is no JSON|does not fit the schema)"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/home/jo/x", "x"), ("/home/Jo Doe/run", "run"), ("~/models/x", "x"), ("~jo/x", "x"), (r"C:\Users\jo\x", "x"),
        ("c:/Users/jo/x", "x"), (r"\\host\share\x", "x"), ("file:///home/jo/x", "x"),
        ("--data=/home/jo/a.csv", "--data=a.csv"),
        ("see /home/jo/a.csv, and /b/c", "see a.csv, and c"), ("'/home/jo/x'", "'x'"),
        ("https://hf.co/a/b", "https://hf.co/a/b"), ("org/name", "org/name"), ("and/or", "and/or"), ("1/2/3", "1/2/3"),
        ("../up/x", "../up/x"), ("runs/a/b", "runs/a/b"), ("s3://bucket/a/b", "s3://bucket/a/b"), ("/", "/"),
    ],
)  # fmt: skip
def test_paths_are_cut_and_nothing_else(text: str, found: str) -> None:
    assert without_paths({text: [text]}) == {found: [found]}


@pytest.mark.parametrize("name", ["bert", "jo/bert-base", "a/b.c_d", "gpt2"])
def test_repo_ids(name: str) -> None:
    assert is_repo_id(name)


@pytest.mark.parametrize("name", ["", "./bert", "/bert", "a/b/c", "a--b", "a..b", "jo/", r"C:\x", "-a/b", "a b"])
def test_no_repo_ids(name: str) -> None:
    assert not is_repo_id(name)


@pytest.mark.parametrize(
    ("name", "task"),
    [("BertForSequenceClassification", "text-classification"), ("LlamaForCausalLM", "text-generation"),
     ("ViTForImageClassification", "image-classification"), ("BartForConditionalGeneration", None), ("Net", None)],
)  # fmt: skip
def test_a_class_that_leaves_no_doubt_names_the_task(tmp_path: Path, name: str, task: str | None) -> None:
    found = runs.recipe(model__base_class=name)
    assert read_facts(runs.write(tmp_path, found)).task == "text-classification"  # as the recipe says
    del found["task"]
    assert read_facts(runs.write(tmp_path, found)).task == task
