"""How far a fine-tuned all-MiniLM-L6-v2 moves, by layer, on texts of the task and on others; what its layers know.

    PYTHONPATH=recipes python -m tests.benchmarks.drift --seeds 3

Fine-tunes the model on 200 docstrings (full fine-tuning as in `recipes/rows.py`), with `RepresentationProbes` on the
486 test docstrings and, as the reference set, on 486 sentences of the Python language's reference. Prints a table: the
mean over the seeds and, in brackets, the smallest and the largest value.
"""

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from compare import packaged_model
from datasets import Dataset, disable_progress_bars
from docstrings import draw, load_docstrings
from rows import SETTINGS
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from tl_callbacks import RepresentationProbes, attach
from tl_callbacks.tables import table

ROWS = 486
COLUMNS = {
    "probe": "tl/probe/",
    "CKA, task": "tl/cka/",
    "CKA, other text": "tl/cka_reference/",
    "angle, task": "tl/procrustes/",
    "angle, other text": "tl/procrustes_reference/",
    "weights moved": "tl/drift/",
}
CONTROLS = {
    "probe, pretrained": "tl/probe/",
    "random network": "tl/probe_random_init/",
    "shuffled": "tl/probe_shuffled/",
}


def sentences(count: int) -> Dataset:
    """Return sentences of the language reference, which no docstring of the task holds."""
    text = " ".join(topics[name] for name in sorted(topics))
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.])\s+(?=[A-Z])", text)]
    kept = [part for part in found if 40 <= len(part) <= 200 and part[0].isalpha()]
    return Dataset.from_dict({"text": kept[: count * 2 : 2]})


def run(seed: int, folder: str) -> list[dict[str, Any]]:
    """Return what was logged: the first entries are of the pretrained model, the last of the fine-tuned one."""
    model = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    splits = load_docstrings(test_per_class=54)

    def tokenized(rows: Dataset) -> Dataset:
        labels = {"labels": rows["label"]} if "label" in rows.column_names else {}
        return Dataset.from_dict({**tokenizer(rows["text"][:], truncation=True, max_length=64), **labels})

    _, _, rate, batch_size, steps = SETTINGS["full"]
    args = TrainingArguments(
        folder, max_steps=steps[1], learning_rate=rate, per_device_train_batch_size=batch_size, warmup_steps=0.1,
        per_device_eval_batch_size=64, weight_decay=0.01, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, seed=seed, dataloader_pin_memory=False,
    )  # fmt: skip
    set_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=9, ignore_mismatched_sizes=True)
    network.accepts_loss_kwargs = False
    test = tokenized(splits["test"])
    probes = RepresentationProbes(test, reference_set=tokenized(sentences(ROWS)), seed=seed)
    trainer = Trainer(
        network, args, train_dataset=tokenized(draw(splits["train"], 200, seed)), eval_dataset=test,
        processing_class=tokenizer, callbacks=[probes],
    )  # fmt: skip
    attach(trainer)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.train()
    return trainer.state.log_history


def values(history: Sequence[dict[str, Any]], prefix: str, place: int) -> dict[str, float]:
    """Return the first or the last value of each group."""
    found: dict[str, list[float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key.startswith(prefix):
                found.setdefault(key.removeprefix(prefix), []).append(value)
    return {group: series[place] for group, series in found.items()}


def main() -> None:
    """Run the seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        histories = [run(seed, f"{folder}/{seed}") for seed in range(options.seeds)]
    for columns, place in ((CONTROLS, 0), (COLUMNS, -1)):
        found = {name: [values(history, prefix, place) for history in histories] for name, prefix in columns.items()}
        groups = list(found[next(iter(columns))][0])
        rows: list[Sequence[str]] = [["group", *columns]]
        for group in groups:
            cells = [[one[group] for one in found[name] if group in one] for name in columns]
            rows.append([group, *(f"{fmean(c):.3f} [{min(c):.3f}, {max(c):.3f}]" if c else "-" for c in cells)])
        print(table(rows), end="\n\n")


if __name__ == "__main__":
    main()
