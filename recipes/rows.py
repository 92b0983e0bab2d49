"""The rows of a comparison: one way of adapting each, run once for some labelled texts and a seed."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from fingerprints import split_facts
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from tl_callbacks import ForgettingMonitor, Retrieval, adapt, add_to_recipe, attach, ignores_item_count

# Strategy and its options, peak rate, batch size, and optimizer steps for fewer than 200 labels and for more. Random
# weights need many small steps to fit the training texts.
SETTINGS: dict[str, tuple[str, dict[str, Any], float, int, tuple[int, int]]] = {
    "random_probe": ("probe", {}, 5e-2, 16, (32, 48)),
    "scratch": ("scratch", {}, 3e-4, 8, (140, 350)),
    "probe": ("probe", {}, 5e-2, 16, (32, 48)),
    "full": ("full", {}, 3e-4, 16, (32, 48)),
    "discriminative": ("discriminative", {"decay": 0.8}, 5e-4, 16, (32, 48)),
    "gradual": ("gradual", {"decay": 0.8}, 5e-4, 16, (32, 48)),
    "anchored": ("anchored", {"strength": 0.01}, 3e-4, 16, (32, 48)),
    "lora": ("lora", {"r": 8, "lora_alpha": 16}, 3e-3, 16, (32, 48)),
}
CONVERGED = 0.1
RANDOM = ("random_probe", "scratch")  # there is nothing of the pretrained model to retain


class TimedRetrieval(Retrieval):
    """Retrieval that keeps which queries found their document at each reading, and the CPU-seconds that it takes."""

    def __init__(self, pairs: Any, **options: Any) -> None:
        super().__init__(pairs, **options)
        self.hits: list[list[float]] = []
        self.seconds = 0.0

    def prepare(self, trainer: Trainer) -> None:
        """Tokenise the texts."""
        with self._timed():
            super().prepare(trainer)

    def read(self, *args: Any, **kwargs: Any) -> Any:
        """Return the features of the texts."""
        with self._timed():
            return super().read(*args, **kwargs)

    def score(self, part: Any) -> dict[str, Any]:
        """Return the recall."""
        with self._timed():
            found = super().score(part)
        self.hits.append(found[self.name].sums.tolist())
        return found

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds += time.process_time() - started


def bag_of_words(train: Dataset, test: Dataset, seed: int) -> dict[str, Any]:
    """Return the facts of TF-IDF and logistic regression, the baseline without pretraining."""
    started = time.process_time()
    pipeline = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
    )
    correct = pipeline.fit(train["text"], train["label"]).predict(test["text"]) == np.array(test["label"])
    return _facts(correct, time.process_time() - started)


def fine_tune(
    row: str,
    train: Dataset,
    test: Dataset,
    seed: int,
    model: str,
    revision: str | None,
    folder: str,
    max_length: int,
    *,
    pairs: Dataset | None = None,
    save: bool = False,
) -> dict[str, Any]:
    """Adapt the model by the row's strategy and return its facts; the run's files stay in `folder`.

    With `pairs` (see `pairs.load_pairs`) retention is measured where the row starts from the pretrained weights, and
    the CPU-seconds are those without the measuring.
    """
    strategy, options, rate, batch_size, steps = SETTINGS[row]
    names = train.features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision or "main")

    def tokenized(rows: Dataset) -> Dataset:
        encoded = rows.map(
            lambda batch: {
                **tokenizer(batch["text"], truncation=True, max_length=max_length),
                "labels": batch["label"],
            },
            batched=True,
            remove_columns=rows.column_names,
        )
        return encoded

    # Texts of one length a batch: hardly any padding. Predictions are put back in the order of `test`.
    lengths = np.argsort([len(text) for text in test["text"]], kind="stable")
    started = time.process_time()
    args = TrainingArguments(
        folder,
        max_steps=steps[train.num_rows >= 200],
        learning_rate=rate,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
    )
    set_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        model,
        revision=revision or "main",
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    if ignores_item_count(network):
        network.accepts_loss_kwargs = False  # as recipes/text_classification.py says; before adapters
    if row == "random_probe":
        network = adapt(network, args, "scratch")["model"]
    keywords = adapt(network, args, strategy, **options)
    retrieval = None
    if pairs is not None and row not in RANDOM and not network.config.is_encoder_decoder:
        ordered = sorted(pairs, key=lambda pair: len(pair["document"]))  # hardly any padding
        retrieval = TimedRetrieval(ordered, max_length=max_length)
        # Behind the others: they may change the weights when training ends.
        keywords["callbacks"] = [*keywords["callbacks"], ForgettingMonitor(retrieval)]
    trainer = Trainer(args=args, train_dataset=tokenized(train), processing_class=tokenizer, **keywords)
    attach(trainer, base_revision=revision)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.train()
        # Only random weights must have fitted the training texts for the comparison to be fair.
        loss = trainer.evaluate(tokenized(train))["eval_loss"] if strategy == "scratch" else None
        predictions = trainer.predict(tokenized(test.select(lengths))).predictions.argmax(-1)
    correct = np.empty(test.num_rows, dtype=bool)
    correct[lengths] = predictions == np.array(test["label"])[lengths]
    trainer.save_state()
    if save:
        trainer.save_model()
    facts = _facts(
        correct,
        time.process_time() - started - (retrieval.seconds if retrieval is not None else 0.0),
        share=_trainable_share(trainer),
        steps=trainer.state.global_step,
        loss=loss,
        folder=folder,
        hits={"before": retrieval.hits[0], "after": retrieval.hits[-1]} if retrieval is not None else None,
    )
    columns = {"text": "text", "label": "label"}
    parts = {name: split_facts(rows, columns, name) for name, rows in (("train", train), ("test", test))}
    add_to_recipe(
        folder,
        task="text-classification",
        language="en",
        data={"name": "docstrings", "local": True, "labels": names, "columns": columns, "splits": parts},
        preprocessing={"max_length": max_length},
        results={"test": {"accuracy": facts["accuracy"]}},
    )
    return facts


def _trainable_share(trainer: Trainer) -> float:
    """Return the share of the parameters that were trained at any time, in [0, 1]."""
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    opened = [
        event["trainable_parameters"] for event in trainer.state.log_history if event.get("tl/event") == "opening"
    ]
    return (opened[-1] if opened else sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)) / total


def _facts(
    correct: np.ndarray,
    seconds: float,
    *,
    share: float | None = None,
    steps: int | None = None,
    loss: float | None = None,
    folder: str | None = None,
    hits: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """Return what the report needs of a run."""
    return {
        "correct": [int(right) for right in correct],
        "accuracy": float(np.mean(correct)),
        "trainable_share": share,
        "cpu_seconds": seconds,
        "steps": steps,
        "train_loss": loss,
        "converged": None if loss is None else loss < CONVERGED,
        "recipe": folder,
        "hits": hits,
    }
