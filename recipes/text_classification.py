"""Fine-tune a pretrained model to classify texts, by a named strategy.

    accelerate launch recipes/text_classification.py --config recipes/configs/text_classification/gradual.yaml \
        --train_file train.csv --validation_file validation.csv

Any option, of the recipe or of `TrainingArguments`, overrides the file. `--dry_run` prints what would be trained when,
and at which rates, and stops. `--resume_from_checkpoint last` goes on from the last whole checkpoint of `output_dir`.
`--push_to_hub --hub_model_id owner/name` publishes the run in the end, privately unless `--hub_private_repo false`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from arguments import parse
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from fingerprints import split_facts
from revisions import resolved
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hub_cards import publish
from tl_callbacks import adapt, add_to_recipe, attach, closest, ignores_item_count, preview

METRICS = Path(__file__).parent / "metrics"
# What the Trainer reports beside the metrics.
RUNTIME = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class Recipe:
    """What is trained on what, and how."""

    model_name_or_path: str = field(default="", metadata={"help": "Hub id or local folder of the pretrained model"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of a Hub model"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id of a data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub data set"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "its configuration"})
    train_file: str | None = field(default=None, metadata={"help": "CSV, TSV, JSON, JSON Lines or Parquet file"})
    validation_file: str | None = field(default=None, metadata={"help": "the same for evaluation"})
    validation_split_percentage: int = field(default=10, metadata={"help": "of train, where there is no validation"})
    text_column_name: str = field(default="text", metadata={"help": "column of the texts"})
    label_column_name: str = field(default="label", metadata={"help": "column of the labels: numbers or names"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens a text; longer ones are cut"})
    max_train_samples: int | None = field(default=None, metadata={"help": "train on that many texts at the most"})
    strategy: str = field(default="gradual", metadata={"help": "a strategy of tl_callbacks.adapt"})
    strategy_options: dict | str | None = field(default=None, metadata={"help": "its options, as JSON"})  # type: ignore[type-arg]
    language: str | None = field(default=None, metadata={"help": "of the texts, as an ISO 639 code; for the card"})
    license: str | None = field(default=None, metadata={"help": "of what --push_to_hub publishes, as the Hub names it"})
    merge_adapter: bool = field(default=False, metadata={"help": "publish adapters merged into their base"})
    dry_run: bool = field(default=False, metadata={"help": "print groups, phases and rates, and stop"})

    def __post_init__(self) -> None:
        if isinstance(self.strategy_options, str):
            self.strategy_options = json.loads(self.strategy_options)
        if not self.model_name_or_path:
            raise ValueError("`model_name_or_path` is missing; expected a Hub id or the folder of a pretrained model.")
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("expected either `dataset_name` or `train_file`; give one of the two.")


def main(recipe: Recipe, args: TrainingArguments) -> None:
    """Train, evaluate, and leave model, `trainer_state.json` and `recipe.json` in `args.output_dir`."""
    set_seed(args.seed)
    # The Trainer would upload every file of the folder, pickles too, with a card of its own.
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    if push_to_hub and "/" not in (args.hub_model_id or ""):
        raise ValueError(f"`hub_model_id` is {args.hub_model_id!r}; --push_to_hub needs owner/name, before training.")
    # Once, so that tokenizer, configuration and weights are of one commit, and the data of one.
    revision = resolved(recipe.model_name_or_path, recipe.model_revision)
    recipe.model_revision = revision or recipe.model_revision
    if recipe.dataset_name is not None:
        recipe.dataset_revision = resolved(recipe.dataset_name, recipe.dataset_revision, repo_type="dataset")
    splits = load_splits(recipe, args.seed)
    names = splits["train"].features[recipe.label_column_name].names
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path, revision=recipe.model_revision)
    with args.main_process_first(desc="tokenizing"):
        tokenized = splits.map(tokenize(tokenizer, recipe), batched=True, remove_columns=splits["train"].column_names)
    model = load_model(recipe, names)
    trainer = Trainer(
        args=args,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics(),
        **adapt(model, args, recipe.strategy, **(recipe.strategy_options or {})),
    )
    attach(trainer, base_revision=revision)
    if recipe.dry_run:
        if trainer.is_world_process_zero():
            print(preview(trainer))
        return
    resume = {"last": True, "true": True, "": None}.get(str(args.resume_from_checkpoint or "").lower())
    trainer.train(resume_from_checkpoint=resume or args.resume_from_checkpoint)
    results = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        add_to_recipe(
            args.output_dir,
            task="text-classification",
            language=recipe.language,
            data=data_facts(splits, recipe, names),
            preprocessing=preprocessing_facts(splits, recipe, args.seed),
            results={"validation": metrics_of(results)},
        )
    if push_to_hub:
        published = publish(
            args.output_dir,
            str(args.hub_model_id),
            private=args.hub_private_repo is not False,
            license=recipe.license,
            merge=recipe.merge_adapter,
            token=args.hub_token,
        )
        print(published.url)


def load_splits(recipe: Recipe, seed: int) -> DatasetDict:
    """Return the splits `train` and `validation` with text and label columns, labels as ClassLabel."""
    if recipe.train_file is not None:
        files = {"train": recipe.train_file}
        if recipe.validation_file is not None:
            files["validation"] = recipe.validation_file
        suffix = Path(recipe.train_file).suffix.lower()
        if suffix not in READERS:
            raise ValueError(f"`train_file` ends in `{suffix}`; expected one of {', '.join(READERS)}.")
        kwargs = {"sep": "\t"} if suffix == ".tsv" else {}
        splits = load_dataset(READERS[suffix], data_files=files, **kwargs)
    else:
        splits = load_dataset(recipe.dataset_name, recipe.dataset_config_name, revision=recipe.dataset_revision)
    for column in (recipe.text_column_name, recipe.label_column_name):
        if column not in splits["train"].column_names:
            near = closest(column, splits["train"].column_names)
            raise ValueError(f"the training data have no column `{column}`. Closest names: {near}. Set its name.")
    if "validation" not in splits:
        held = recipe.validation_split_percentage / 100
        parts = splits["train"].train_test_split(test_size=held, seed=seed)
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    splits = encode_labels(
        DatasetDict(train=splits["train"], validation=splits["validation"]), recipe.label_column_name
    )
    if recipe.max_train_samples is not None:
        train = splits["train"].shuffle(seed=seed)
        splits["train"] = train.select(range(min(recipe.max_train_samples, train.num_rows)))
    return splits


def encode_labels(splits: DatasetDict, column: str) -> DatasetDict:
    """Return the splits with the label column as a ClassLabel over the classes of the training split."""
    for split, rows in splits.items():
        if rows.num_rows == 0:
            raise ValueError(f"the {split} data are empty; expected at least one row. Check the file.")
        if any(label is None for label in rows[column]):
            raise ValueError(f"column `{column}` of the {split} data has empty labels; remove or fill those rows.")
    feature = splits["train"].features[column]
    named = feature.names if isinstance(feature, ClassLabel) else None
    names = named or [str(label) for label in sorted(set(splits["train"][column]))]
    if len(set(splits["train"][column])) < 2:
        raise ValueError(f"column `{column}` of the training data has one class only; expected at least two.")
    if named:
        return splits
    unknown = {str(label) for label in splits["validation"][column]} - set(names)
    if unknown:
        raise ValueError(f"the validation data have labels that the training data lack: {', '.join(sorted(unknown))}.")

    def encode(rows: Dataset) -> Dataset:
        return rows.map(lambda row: {column: str(row[column])}).cast_column(column, ClassLabel(names=names))

    return DatasetDict({split: encode(rows) for split, rows in splits.items()})


def tokenize(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function that turns a batch of rows into model inputs."""

    def apply(rows: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(rows[recipe.text_column_name], truncation=True, max_length=recipe.max_seq_length)
        return {**encoded, "labels": rows[recipe.label_column_name]}

    return apply


def load_model(recipe: Recipe, names: list[str]) -> Any:
    """Return the pretrained model with a new head for the classes `names`."""
    config = AutoConfig.from_pretrained(
        recipe.model_name_or_path,
        revision=recipe.model_revision,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        recipe.model_name_or_path, revision=recipe.model_revision, config=config, ignore_mismatched_sizes=True
    )
    # Such a head takes the mean over its batch, and the Trainer would multiply its gradient by accumulation steps x
    # world size (https://github.com/huggingface/transformers/issues/47688).
    if ignores_item_count(model):
        model.accepts_loss_kwargs = False
    return model


def compute_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that computes accuracy and macro F1, from metrics that need no network."""
    metrics = [evaluate.load(str(METRICS / name)) for name in ("accuracy", "f1")]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions = np.argmax(prediction.predictions, axis=-1)
        found: dict[str, float] = {}
        for metric in metrics:
            found |= metric.compute(predictions=predictions, references=prediction.label_ids)
        return found

    return compute


def metrics_of(results: Mapping[str, float]) -> dict[str, float]:
    """Return the finite metrics of an evaluation by name, without the figures of its speed."""
    named = {name.removeprefix("eval_"): float(value) for name, value in results.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in RUNTIME and math.isfinite(value)}


def data_facts(splits: DatasetDict, recipe: Recipe, names: list[str]) -> dict[str, Any]:
    """Return what `recipe.json` says of the data."""
    columns = {"text": recipe.text_column_name, "label": recipe.label_column_name}
    local = recipe.dataset_name is None or Path(recipe.dataset_name).exists()
    return {
        "name": Path(str(recipe.train_file or recipe.dataset_name)).name if local else recipe.dataset_name,
        "config": recipe.dataset_config_name,
        "local": local,
        "revision": recipe.dataset_revision,
        "labels": names,
        "columns": columns,
        "splits": {name: split_facts(rows, columns, str(rows.split)) for name, rows in splits.items()},
    }


def preprocessing_facts(splits: DatasetDict, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what an evaluation on the same rows needs besides the data."""
    facts: dict[str, Any] = {"max_length": recipe.max_seq_length}
    if str(splits["validation"].split) == "train":  # held out, see `load_splits`
        facts |= {"validation_split_percentage": recipe.validation_split_percentage, "split_seed": seed}
    return facts


if __name__ == "__main__":
    main(*parse((Recipe, TrainingArguments)))
