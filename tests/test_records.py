"""What `recipe.json` says of the model, the data, the command and the costs, and that it asks no network for it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import huggingface_hub
import jsonschema
import peft
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import BertForSequenceClassification, BertModel, Trainer

from tests import tiny
from tests.test_attach import SCHEMA, recipe
from tl_callbacks import adapt, attach
from tl_callbacks.fingerprints import fingerprint
from tl_callbacks.invocation import command, commit, masked

SHA, OTHER = "0123456789" * 4, "f" * 40


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.bert(id2label={0: "red", 1: "green", 2: "blue"}).save_pretrained(folder)
    return folder


def load(folder: Path | str) -> BertForSequenceClassification:
    model = BertForSequenceClassification.from_pretrained(folder)
    model.accepts_loss_kwargs = False
    return model


def train(model: Any, folder: Path, strategy: str = "full", base_revision: str | None = None, **fields: Any) -> Trainer:
    resume = fields.pop("resume", None)
    args = tiny.arguments(folder, **fields)
    trainer = Trainer(args=args, train_dataset=tiny.texts(), **adapt(model, args, strategy))
    attach(trainer, base_revision=base_revision)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("strategy", ["full", "head", "gradual", "lora"])
def test_a_pretrained_model_is_recorded_with_its_fingerprint(strategy: str, pretrained: Path, tmp_path: Path) -> None:
    trainer = train(load(pretrained), tmp_path, strategy)
    found = recipe(tmp_path)
    jsonschema.validate(found, SCHEMA)
    model = found["model"]
    head = frozenset({"classifier.weight", "classifier.bias"})
    base = fingerprint(load(pretrained), head)
    assert base is not None
    assert model["fingerprint"]["digest"] == base["digest"]
    assert (model["fingerprint"] == base) is (strategy != "head"), "a head that was initialised anew is told apart"
    trained = fingerprint(trainer.model, head)  # type: ignore[arg-type]
    assert (trained["digest"] == base["digest"]) is (strategy in ("lora", "head")), "what was trained is another"  # type: ignore[index]
    assert model["base_class"] == "BertForSequenceClassification"
    assert model["class"] == ("PeftModelForSequenceClassification" if strategy == "lora" else model["base_class"])
    assert (model["name_or_path"], model["local"], model["revision"]) == (str(pretrained), True, None)
    assert model["dtype"] == "float32"
    assert (model["num_labels"], model["id2label"]) == (3, {"0": "red", "1": "green", "2": "blue"})
    assert model["problem_type"] == "single_label_classification"


def test_random_weights_and_models_without_labels_say_nothing_of_them(pretrained: Path, tmp_path: Path) -> None:
    train(load(pretrained), tmp_path / "scratch", "scratch", base_revision=SHA)
    model = recipe(tmp_path / "scratch")["model"]
    assert (model["fingerprint"], model["name_or_path"], model["revision"], model["local"]) == (None, None, None, False)

    class Regression(BertModel):
        def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> Any:
            return {"loss": super().forward(input_ids).last_hidden_state.pow(2).mean()}

    train(Regression.from_pretrained(pretrained), tmp_path / "other")
    found = recipe(tmp_path / "other")
    jsonschema.validate(found, SCHEMA)
    assert "id2label" not in found["model"]
    assert found["model"]["fingerprint"] is not None


def test_a_run_that_goes_on_tells_the_truth_of_where_it_began(pretrained: Path, tmp_path: Path) -> None:
    train(load(pretrained), tmp_path, save_strategy="steps", save_steps=8)
    first = recipe(tmp_path)
    assert first["training"]["cost"]["from_step"] == 0
    shutil.rmtree(tmp_path / "checkpoint-12")
    trainer = train(load(pretrained), tmp_path, resume=True)
    again = recipe(tmp_path)
    assert again["training"]["cost"]["from_step"] == 8
    assert again["training"]["global_step"] == 12
    assert again["model"]["fingerprint"] == first["model"]["fingerprint"]
    trainer.train()
    assert recipe(tmp_path)["model"]["fingerprint"] == first["model"]["fingerprint"], "not of what was trained since"
    trainer.state.global_step = 0  # as no script should do it, to pass the check
    attach(trainer)
    trainer.train()
    assert recipe(tmp_path)["model"]["fingerprint"] == first["model"]["fingerprint"]


def test_a_model_made_for_each_training_is_the_one_recorded(pretrained: Path, tmp_path: Path) -> None:
    made = []

    def model_init() -> Any:
        made.append(load(pretrained))
        with torch.no_grad():
            made[-1].bert.embeddings.word_embeddings.weight[0] = len(made)
        return made[-1]

    trainer = Trainer(model_init=model_init, args=tiny.arguments(tmp_path, max_steps=2), train_dataset=tiny.texts())
    attach(trainer)
    trainer.train()
    assert len(made) == 2
    expected = []
    for number in (1, 2):
        model = load(pretrained)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[0] = number
        expected.append(fingerprint(model)["tensors"])  # type: ignore[index]
    assert expected[0] != recipe(tmp_path)["model"]["fingerprint"]["tensors"] == expected[1]


def test_the_costs_are_measured(pretrained: Path, tmp_path: Path) -> None:
    train(load(pretrained), tmp_path)
    cost = recipe(tmp_path)["training"]["cost"]
    assert 0 < cost["seconds"] < 60
    assert 0 < cost["cpu_seconds"] < 60
    assert 50e6 < cost["peak_memory_bytes"] < 200e9, "bytes"
    assert (cost["processes"], cost["device"]) == (1, "cpu")
    assert cost["accelerator_seconds"] is cost["peak_accelerator_memory_bytes"] is None


@pytest.mark.gpu
def test_the_costs_of_an_accelerator_are_measured(pretrained: Path, tmp_path: Path) -> None:
    train(load(pretrained), tmp_path, use_cpu=False)
    found = recipe(tmp_path)
    jsonschema.validate(found, SCHEMA)
    cost = found["training"]["cost"]
    assert cost["accelerator_seconds"] == cost["seconds"] > 0
    assert cost["peak_accelerator_memory_bytes"] > 10_000
    assert cost["device"] not in ("cpu", "cuda")
    base = fingerprint(load(pretrained), frozenset({"classifier.weight", "classifier.bias"}))
    assert found["model"]["fingerprint"] == base, "the same as of weights on the CPU"


def test_the_data_of_the_trainer_are_recorded(tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny.texts(16))
    rows.set_format("torch")
    args = tiny.arguments(tmp_path, max_steps=1)
    held = {"near": rows.select(range(4)), "far": tiny.texts(2)}
    trainer = Trainer(tiny.bert(), args, train_dataset=rows.to_iterable_dataset(), eval_dataset=held)
    attach(trainer)
    trainer.train()
    found = recipe(tmp_path)
    jsonschema.validate(found, SCHEMA)
    assert found["datasets"] == {
        "train": {"rows": None, "fingerprint": None},
        "eval_near": {"rows": 4, "fingerprint": held["near"]._fingerprint},
        "eval_far": {"rows": 2, "fingerprint": None},
    }


# --- the revision --------------------------------------------------------------------------------


def snapshot(cache: Path, sha: str, *, weights: bool = True) -> None:
    folder = cache / "models--org--tiny" / "snapshots" / sha
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    if weights:
        (folder / "model.safetensors").touch()


def named(pretrained: Path, name: str = "org/tiny") -> BertForSequenceClassification:
    model = load(pretrained)
    model.config._name_or_path = model.name_or_path = name  # as a model that came from the Hub has it
    return model


@pytest.mark.parametrize(
    ("snapshots", "expected"),
    [({SHA: True}, SHA), ({SHA: True, OTHER: True}, None), ({SHA: False}, None), ({}, None), ({"main": True}, None)],
)
def test_the_revision_is_that_of_the_only_snapshot(
    snapshots: dict[str, bool], expected: str | None, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for sha, weights in snapshots.items():
        snapshot(tmp_path / "cache", sha, weights=weights)
    train(named(pretrained), tmp_path / "run", max_steps=1)
    model = recipe(tmp_path / "run")["model"]
    assert (model["name_or_path"], model["local"], model["revision"]) == ("org/tiny", False, expected)
    train(named(pretrained, "a/name/of/no repository"), tmp_path / "odd", max_steps=1)
    assert recipe(tmp_path / "odd")["model"]["revision"] is None


def test_the_revision_that_the_script_knows_goes_into_file_and_adapters(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot(tmp_path / "cache", OTHER)
    train(named(pretrained), tmp_path / "full", base_revision=SHA, max_steps=1)
    assert recipe(tmp_path / "full")["model"]["revision"] == SHA
    trainer = train(named(pretrained), tmp_path / "lora", "lora", base_revision=SHA, max_steps=1)
    model = recipe(tmp_path / "lora")["model"]
    assert model["revision"] == model["adapters"]["default"]["revision"] == SHA
    trainer.model.peft_config["default"].save_pretrained(tmp_path / "lora")  # type: ignore[union-attr, operator]
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("org/tiny", SHA)

    def adapted(revision: str | None) -> Any:
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], revision=revision)
        return peft.get_peft_model(named(pretrained), config)

    trainer = tiny.trainer(adapted(SHA), tiny.arguments(tmp_path / "own", max_steps=1))
    attach(trainer)
    trainer.train()
    assert recipe(tmp_path / "own")["model"]["revision"] == SHA, "the adapter's, before the cache's"
    with pytest.raises(ValueError, match=f"adapter `default` names revision {SHA} of its base, `base_revision` is fff"):
        attach(tiny.trainer(adapted(SHA), tiny.arguments(tmp_path)), base_revision=OTHER)
    with pytest.raises(ValueError, match=r"`base_revision` is `main`; expected the sha .*resolve_revision"):
        attach(tiny.trainer(adapted(None), tiny.arguments(tmp_path)), base_revision="main")


def test_nothing_asks_the_network(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for strategy in ("full", "lora"):
        train(named(pretrained), tmp_path / strategy, strategy, max_steps=1)
    assert not asked
    with pytest.raises(huggingface_hub.errors.RevisionResolutionError):
        huggingface_hub.resolve_revision("org/tiny")
    assert asked, "the control"


# --- the command and the commit ------------------------------------------------------------------


def run_as(monkeypatch: pytest.MonkeyPatch, file: Path | None, *arguments: str, module: str | None = None) -> None:
    main = types.ModuleType("__main__")
    main.__spec__ = ModuleSpec(module, None) if module else None
    if file is not None:
        main.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [str(file) if file else "-c", *arguments])


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    call = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


def test_the_command_line_is_as_it_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scripts" / "x.py"
    script.parent.mkdir()
    script.touch()
    monkeypatch.chdir(tmp_path)
    run_as(monkeypatch, script, "--lr", "1", "--hub_token", "hf_x")
    assert command() == ["python", "scripts/x.py", "--lr", "1", "--hub_token", "<MASKED>"]
    monkeypatch.chdir(script.parent.parent.parent)
    assert command()[1] == f"{tmp_path.name}/scripts/x.py"  # type: ignore[index]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command()[1] == str(script)  # type: ignore[index]
    run_as(monkeypatch, script, "--a=b", module="pkg.mod.__main__")
    assert command() == ["python", "-m", "pkg.mod", "--a=b"]
    run_as(monkeypatch, None, "--a=b")
    assert command() is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--hub_token a --lr 1", "--hub_token <MASKED> --lr 1"),
        ("--hub_token a b --lr=1", "--hub_token <MASKED> <MASKED> --lr=1"),
        ("--hub-token=a", "--hub-token=<MASKED>"),
        ("--hub_token a==", "--hub_token <MASKED>"),
        ("--hub_token x --lr=1", "--hub_token <MASKED> --lr=1"),
        ("-token a -x b", "-token <MASKED> -x b"),
        ("--API_KEY a --db.password b", "--API_KEY <MASKED> --db.password <MASKED>"),
        ("client_secret=a", "client_secret=<MASKED>"),
        ("--note hf_abcdefghijklmnop", "--note <MASKED>"),
        ("--url https://me:pw@example.org/x", "--url https://<MASKED>@example.org/x"),
        ("--tokenizer_name a --label b", "--tokenizer_name a --label b"),
    ],
)
def test_secrets_are_masked(given: str, expected: str) -> None:
    assert masked(given.split()) == expected.split()


def test_the_commit_is_that_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "x.py"
    script.write_text("1\n")
    run_as(monkeypatch, script)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None, "no repository"
    git(tmp_path, "init", "--quiet")
    assert commit() is None, "no commit"
    (tmp_path / "readme").touch()
    git(tmp_path, "add", "readme")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    assert commit() is None, "a script that the repository does not hold"
    git(tmp_path, "add", "x.py")
    git(tmp_path, "commit", "--quiet", "-m", "second")
    sha = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "runs").touch()
    assert commit() == {"sha": sha, "dirty": False}
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert commit() == {"sha": sha, "dirty": False}, "whatever a git hook sets"
    script.write_text("2\n")
    assert commit() == {"sha": sha, "dirty": True}
    run_as(monkeypatch, None)
    assert commit() is None
    installed = tmp_path / "site-packages" / "y.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.delenv("GIT_DIR")
    git(tmp_path, "add", str(installed))
    run_as(monkeypatch, installed)
    assert commit() is None
    run_as(monkeypatch, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None, "no git"


def test_a_script_that_is_run_is_recorded(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    lines = [
        "import json",
        "from tl_callbacks.invocation import command, commit",
        "print(json.dumps([command(), commit()]))",
    ]
    script.write_text("\n".join(lines))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "x.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    call = [sys.executable, "x.py", "--token", "a"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    said = subprocess.run(call, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    expected = {"sha": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert json.loads(said.stdout) == [["python", "x.py", "--token", "<MASKED>"], expected]
