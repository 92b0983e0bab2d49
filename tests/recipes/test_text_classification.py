"""The text-classification recipe: its arguments, its data errors, and a run by the command line."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from arguments import parse
from datasets import Dataset
from huggingface_hub import constants
from text_classification import Recipe, encode_labels, load_splits, main, metrics_of
from transformers import BertTokenizerFast, TrainingArguments

from hub_cards import content_fingerprint
from tests import tiny
from tests.test_attach import SCHEMA
from tl_callbacks import STRATEGIES

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "recipes").rglob("configs/**/*.yaml"))
WORDS = ["the", "a", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "eats", "now"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tiny.bert().save_pretrained(folder)
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, Any]]:
    colours = ["red", "green", "blue"]
    return [{"text": f"the {colours[n % 3]} {WORDS[5 + n % 3]} runs", "label": colours[n % 3]} for n in range(count)]


def write(path: Path, data: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(data[0]) if data else ["text", "label"])
        writer.writeheader()
        writer.writerows(data)
    return path


def options(model: Path | str, folder: Path, **overrides: Any) -> list[str]:
    values = {
        "model_name_or_path": model,
        "train_file": write(folder / "train.csv", rows(24)),
        "validation_file": write(folder / "validation.csv", rows(9)),
        "output_dir": folder / "run",
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
        **overrides,
    }
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def test_there_is_a_configuration_for_every_strategy() -> None:
    assert {path.stem for path in CONFIGS if path.parent.name == "text_classification"} == set(STRATEGIES)
    assert len(CONFIGS) == len(STRATEGIES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs(path: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = path.read_text().splitlines()[:2]
    assert head[0].startswith(f"# accelerate launch recipes/text_classification.py --config {path.relative_to(ROOT)}")
    recipe, args = parse(
        (Recipe, TrainingArguments), ["--config", str(path), *options(model, tmp_path, learning_rate=1e-3)]
    )
    assert recipe.strategy == path.stem
    assert args.learning_rate == 1e-3, "the command line wins"
    assert args.weight_decay == yaml.safe_load(path.read_text())["weight_decay"], "the file wins over the default"
    main(recipe, args)
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["methods"]["Strategy"]["name"] == path.stem
    assert found["data"]["labels"] == ["blue", "green", "red"]
    assert set(found["results"]["validation"]) == {"accuracy", "f1", "loss"}
    assert 0 <= found["results"]["validation"]["accuracy"] <= 1
    assert found["preprocessing"] == {"max_length": 128}
    data = found["data"]
    assert (data["name"], data["local"], data["revision"]) == ("train.csv", True, None)
    assert data["columns"] == {"text": "text", "label": "label"}
    assert {name: (split["rows"], split["split"]) for name, split in data["splits"].items()} == {
        "train": (24, "train"),
        "validation": (9, "validation"),
    }
    assert data["splits"]["validation"]["fingerprint"] == content_fingerprint(
        Dataset.from_list(rows(9)), {"text": "text", "label": "label"}
    )
    assert {split: facts["rows"] for split, facts in found["datasets"].items()} == {"train": 24, "eval": 9}
    assert (found["model"]["fingerprint"] is None) is (path.stem == "scratch")
    assert (tmp_path / "run" / "trainer_state.json").is_file()


def test_a_held_out_part_of_train_can_be_drawn_again(model: Path, tmp_path: Path) -> None:
    arguments = options(model, tmp_path, validation_file=None, strategy="probe", validation_split_percentage=25, seed=3)
    main(*parse((Recipe, TrainingArguments), arguments))
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert found["preprocessing"] == {"max_length": 128, "validation_split_percentage": 25, "split_seed": 3}
    split = found["data"]["splits"]["validation"]
    assert (split["rows"], split["split"]) == (6, "train")
    again = Dataset.from_list(rows(24)).train_test_split(test_size=0.25, seed=3)["test"]
    assert split["fingerprint"] == content_fingerprint(again, found["data"]["columns"])


SHA, OTHER = "0123456789" * 4, "f" * 40


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/tiny:UserWarning")  # PEFT, without a network
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_model_of_the_hub_is_loaded_from_one_commit(
    strategy: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from a cache that holds two commits: `main` is not the only one, so the cache alone cannot tell."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models--org--tiny"
    for sha in (SHA, OTHER):
        shutil.copytree(model, folder / "snapshots" / sha)
    tiny.bert(seed=1).save_pretrained(folder / "snapshots" / OTHER)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    main(*parse((Recipe, TrainingArguments), options("org/tiny", tmp_path, strategy=strategy)))
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert (found["model"]["name_or_path"], found["model"]["local"]) == ("org/tiny", False)
    assert found["model"]["revision"] == SHA
    if strategy == "lora":
        assert found["model"]["adapters"]["default"]["revision"] == SHA
        assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["revision"] == SHA
    (folder / "refs" / "main").write_text(OTHER)
    first = found["model"]["fingerprint"]["digest"]
    main(*parse((Recipe, TrainingArguments), options("org/tiny", tmp_path, strategy=strategy)))
    found = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert found["model"]["revision"] == OTHER
    assert found["model"]["fingerprint"]["digest"] != first


def test_only_finite_metrics_are_kept() -> None:
    results = {"eval_loss": 1.5, "eval_f1": float("nan"), "eval_runtime": 2.0, "epoch": 1.0, "eval_x_per_second": 1.0}
    assert metrics_of(results) == {"loss": 1.5, "x_per_second": 1.0}


def test_dry_run_prints_the_plan_and_trains_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(model, tmp_path, strategy="gradual", strategy_options='{"decay": 0.5}', dry_run=True)
    main(*parse((Recipe, TrainingArguments), arguments))
    out = capsys.readouterr().out
    for text in ("strategy gradual", "peak rate", "opens at step", "encoder.layer.1", "rate factor"):
        assert text in out
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--lerning_rate", "1"], "unknown key `lerning_rate` in the command line. Closest names: `learning_rate`"),
        (["stray"], "`stray` on the command line belongs to no option"),
    ],
)
def test_unknown_options_are_refused(arguments: list[str], match: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        parse((Recipe, TrainingArguments), [*options(model, tmp_path), *arguments])


def test_unknown_keys_of_the_file_are_refused(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("stratgy: full\n")
    with pytest.raises(ValueError, match=r"unknown key `stratgy` in .*config.yaml. Closest names: `strategy`"):
        parse((Recipe, TrainingArguments), ["--config", str(config), *options(model, tmp_path)])


def load(
    folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None, **fields: Any
) -> Any:
    files = {"train_file": str(write(folder / "t.csv", train))}
    if validation is not None:
        files["validation_file"] = str(write(folder / "v.csv", validation))
    return load_splits(Recipe(model_name_or_path="m", **files, **fields), seed=0)


@pytest.mark.parametrize(
    ("train", "validation", "fields", "match"),
    [
        (rows(9), rows(9), {"label_column_name": "lable"}, "no column `lable`. Closest names: `label`"),
        (rows(9), rows(9), {"text_column_name": "sentence"}, "no column `sentence`"),
        (rows(1) * 6, rows(1), {}, "has one class only; expected at least two"),
        (rows(9), [{"text": "x", "label": "mauve"}], {}, "labels that the training data lack: mauve"),
        ([*rows(9), {"text": "x", "label": None}], rows(9), {}, "has empty labels"),
    ],
)
def test_bad_data_are_refused(train: Any, validation: Any, fields: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load(tmp_path, train, validation, **fields)


def test_empty_data_are_refused() -> None:
    from datasets import Dataset, DatasetDict

    full, empty = Dataset.from_list(rows(9)), Dataset.from_list(rows(9)).select([])
    with pytest.raises(ValueError, match="the train data are empty"):
        encode_labels(DatasetDict(train=empty, validation=full), "label")
    with pytest.raises(ValueError, match="the validation data are empty"):
        encode_labels(DatasetDict(train=full, validation=empty), "label")


def test_a_sample_keeps_all_classes(tmp_path: Path) -> None:
    splits = load(tmp_path, rows(12), rows(9), max_train_samples=2)
    assert splits["train"].num_rows == 2
    assert splits["train"].features["label"].names == ["blue", "green", "red"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`train_file` ends in `.txt`; expected one of .csv"):
        load_splits(Recipe(model_name_or_path="m", train_file="a.txt"), 0)
    with pytest.raises(ValueError, match="`model_name_or_path` is missing"):
        Recipe(train_file="a.csv")
    with pytest.raises(ValueError, match="either `dataset_name` or `train_file`"):
        Recipe(model_name_or_path="m")


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_local_files_of_each_kind(suffix: str, tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"text": row["text"], "label": n % 2} for n, row in enumerate(rows(20))])
    path = tmp_path / f"train.{suffix}"
    getattr(data, f"to_{suffix}")(str(path))
    splits = load_splits(Recipe(model_name_or_path="m", train_file=str(path), validation_split_percentage=25), 0)
    assert (splits["train"].num_rows, splits["validation"].num_rows) == (15, 5)
    assert splits["train"].features["label"].names == ["0", "1"]


def test_metrics_load_without_a_network() -> None:
    import evaluate

    accuracy = evaluate.load(str(ROOT / "recipes/metrics/accuracy"))
    f1 = evaluate.load(str(ROOT / "recipes/metrics/f1"))
    predictions, references = [0, 0, 1, 2], [0, 1, 1, 2]
    assert accuracy.compute(predictions=predictions, references=references) == {"accuracy": 0.75}
    # Per class: precision 1/2, 1, 1 and recall 1, 1/2, 1, so F1 is 2/3, 2/3, 1.
    assert f1.compute(predictions=predictions, references=references)["f1"] == pytest.approx(7 / 9)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cpu", "cpu2", "torchrun"])
def test_the_command_line_trains_stops_and_resumes(launcher: str, model: Path, tmp_path: Path) -> None:
    config = ROOT / "recipes/configs/text_classification/gradual.yaml"
    if launcher == "torchrun":
        start = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29713"]
    else:
        file = str(ROOT / f"recipes/accelerate/{launcher}.yaml")
        start = ["accelerate.commands.launch", "--config_file", file, "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", *start, str(ROOT / "recipes/text_classification.py"), "--config", str(config)]
        command += options(model, tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
        subprocess.run([*command, *more], check=True, env=environment, cwd=tmp_path, timeout=300)
        return json.loads((tmp_path / "run" / "recipe.json").read_text())  # type: ignore[no-any-return]

    first = run()
    assert first["training"]["global_step"] == 6
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    for path in (tmp_path / "run" / "checkpoint-6").iterdir():
        path.unlink()
    again = run("--resume_from_checkpoint", "last")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert again["results"] == first["results"]
