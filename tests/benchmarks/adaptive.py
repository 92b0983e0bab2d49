"""Schedules and rates that probes decide beside fixed ones: accuracy, CPU-seconds and openings over five seeds.

    python -m tests.benchmarks.adaptive [--seeds 5] [--max-wait 0.5] [schedules | rates]

Nine-way text classification of docstrings with all-MiniLM-L6-v2, 200 labelled texts, as `make demo` has it: its rates,
batch and number of steps (chosen there for the fixed schedule, seed 0). What decides is the loss on 180 further
labelled texts of the training pool, every 4 steps. Nothing was chosen on the test texts; `patience` and
`threshold` are the defaults. Prints JSON.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from tl_callbacks import (
    GradualUnfreezing,
    WeightAnchoring,
    at_fractions,
    attach,
    events,
    group_layers,
    ignores_item_count,
    layerwise_optimizer,
    rates_from_drift,
    schedule_from_probes,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from compare import packaged_model
from docstrings import draw, load_docstrings
from rows import SETTINGS

SEEDS, LABELS, WATCHED, EVERY = 5, 200, 180, 4
_, OPTIONS, RATE, BATCH, (_, STEPS) = SETTINGS["gradual"]
FIXED = "fixed: equal distances up to half of training"
PROBES = "schedule_from_probes, top down"
RGN = "schedule_from_probes, relative gradient norm"
DECAY = "nothing frozen, layer-wise decay"
FOLLOW = "nothing frozen, rates_from_drift, follow"
HOLD = "nothing frozen, rates_from_drift, hold"
BASELINES = {PROBES: FIXED, RGN: FIXED, FOLLOW: DECAY, HOLD: DECAY}
WAYS = {"schedules": (FIXED, PROBES, RGN), "rates": (DECAY, FOLLOW, HOLD)}


def adaptive(ways: tuple[str, ...], seeds: int, max_wait: float) -> dict[str, Any]:
    """Train each way with each seed and return the means, their spread and the paired differences."""
    folder = Path(tempfile.mkdtemp())
    load_docstrings(test_per_class=54).save_to_disk(folder / "data")
    jobs = [(way, seed, str(folder), max_wait) for seed in range(seeds) for way in ways]
    runs = {}
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, facts in zip(jobs, pool.map(_run, jobs), strict=True):
            runs[job[:2]] = facts
            print(json.dumps([*job[:2], facts]), file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for way in ways:
        own = [runs[way, seed] for seed in range(seeds)]
        found[way] = {
            "accuracy": _mean_and_sd([100 * run["accuracy"] for run in own]),
            "accuracies": [round(100 * run["accuracy"], 2) for run in own],
            "cpu_seconds": _mean_and_sd([run["cpu_seconds"] for run in own]),
            "openings": [run["openings"] for run in own],
        }
        if (baseline := BASELINES.get(way)) is not None:
            pairs = [100 * (run["accuracy"] - runs[baseline, seed]["accuracy"]) for seed, run in enumerate(own)]
            found[way]["difference"] = {"to": baseline, "mean, half 95 % interval": _mean_and_interval(pairs)}
    return {"seeds": seeds, "labels": LABELS, "watched": WATCHED, "steps": STEPS, "max_wait": max_wait, "ways": found}


def _run(job: tuple[str, int, str, float]) -> dict[str, Any]:
    way, seed, folder, max_wait = job
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    splits = load_from_disk(f"{folder}/data")
    pool = draw(splits["train"], LABELS + WATCHED, seed)
    train, watched = pool.select(range(LABELS)), pool.select(range(LABELS, LABELS + WATCHED))
    own = f"{folder}/{way}-{seed}"
    if way in (FOLLOW, HOLD):  # the earlier run, whose cost is not counted: full fine-tuning at one rate
        _train("earlier", seed, f"{own}-earlier", train, watched, splits["test"], max_wait)
    return _train(way, seed, own, train, watched, splits["test"], max_wait)


def _train(
    way: str, seed: int, folder: str, train: Dataset, watched: Dataset, test: Dataset, max_wait: float
) -> dict[str, Any]:
    model = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenized(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: {**tokenizer(batch["text"], truncation=True, max_length=64), "labels": batch["label"]},
            batched=True,
            remove_columns=rows.column_names,
        )

    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        learning_rate=SETTINGS["full"][2] if way == "earlier" else RATE,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=10,
        eval_strategy="steps" if way in (PROBES, RGN) else "no",
        eval_steps=EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
    )
    set_seed(seed)
    names = train.features["label"].names
    network = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(names), ignore_mismatched_sizes=True
    )
    if ignores_item_count(network):
        network.accepts_loss_kwargs = False
    groups = group_layers(network)
    below = len(groups) - 1
    schedules: dict[str, Any] = {
        FIXED: at_fractions([round(0.5 * (place + 1) / below, 6) for place in range(below)]),
        PROBES: schedule_from_probes(max_wait=max_wait),
        RGN: schedule_from_probes(order="relative_gradient_norm", max_wait=max_wait),
    }
    factors = None
    if way in (FOLLOW, HOLD):
        direction: Any = "follow" if way == FOLLOW else "hold"
        factors = rates_from_drift(f"{folder}-earlier", groups, measure="anchor", direction=direction)
    callbacks: list[Any] = []
    if way in schedules:
        callbacks.append(GradualUnfreezing(groups, schedules[way], rates="own"))
    if way == "earlier":
        callbacks.append(WeightAnchoring(1e-12))  # as good as none: it logs the distances
    decay = 1.0 if way == "earlier" else OPTIONS["decay"]
    trainer = Trainer(
        network,
        args,
        train_dataset=tokenized(train),
        eval_dataset=tokenized(watched),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=decay, factors=factors),
        callbacks=callbacks,
    )
    attach(trainer)
    started = time.process_time()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.train()
        seconds = time.process_time() - started
        trainer.save_state()
        predictions = trainer.predict(tokenized(test)).predictions.argmax(-1)
    openings = events.read(trainer.state.log_history, "opening")
    return {
        "accuracy": float(np.mean(predictions == np.array(test["label"]))),
        "cpu_seconds": seconds,
        "openings": [[event["step"], *event["groups"]] for event in openings],
    }


def _mean_and_sd(values: list[float]) -> list[float]:
    return [round(statistics.mean(values), 2), round(statistics.stdev(values), 2)]


def _mean_and_interval(values: list[float]) -> list[float]:
    """The mean and half of its 95 % interval by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return [round(statistics.mean(values), 2), round(float(half), 2)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=WAYS, help="default: both")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at least 2")
    parser.add_argument("--max-wait", type=float, default=0.5, help="of schedule_from_probes, a fraction")
    options = parser.parse_args()
    chosen = WAYS[options.what] if options.what else tuple(way for ways in WAYS.values() for way in ways)
    print(json.dumps(adaptive(chosen, options.seeds, options.max_wait), indent=2))
