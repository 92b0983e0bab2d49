"""`make bench`: what our callbacks cost when they change nothing, beside the plain Trainer in the same run.

Two Trainers on a 22.7 M-parameter BERT at batch 8 x 32 tokens train in turn, a few steps each, in alternating order.
Prints the share of a step that is spent inside our hooks, and the ratio of whole steps over the pairs with a bootstrap
interval. One thread. Nothing is asserted: machines differ, ratios measured side by side differ least.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from tl_callbacks import GradualUnfreezing, NoEffectWarning, WeightAnchoring, at_steps, attach, group_layers
from tl_callbacks.preflight import our_callbacks

STEPS = 4  # per segment; the first is a warm-up and not counted


class Stopwatch(TrainerCallback):
    """Times each step from before the first hook of on_step_begin to after the last of on_step_end."""

    def __init__(self) -> None:
        self.started = 0.0
        self.steps: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()


class Stop(TrainerCallback):
    """The other end of a `Stopwatch`: last in the order of callbacks."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.steps.append(time.perf_counter() - self.watch.started)


class Meter:
    """Sums the time inside the per-step hooks of callbacks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, callback: TrainerCallback) -> None:
        for name in ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def make(folder: str, *, ours: bool) -> tuple[Trainer, Stopwatch, Meter]:
    """Return a trainer on a fresh model, plain or with our callbacks attached but neutral."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30000, (8 * STEPS, 32), generator=generator)
    data = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(ids)]
    watch, meter = Stopwatch(), Meter()
    callbacks: list[TrainerCallback] = [watch]
    if ours:
        groups = group_layers(model)
        callbacks += [GradualUnfreezing(groups, at_steps([0] * (len(groups) - 1))), WeightAnchoring(0.0)]
    args = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, logging_steps=1000, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    if ours:
        attach(trainer)
        for callback in our_callbacks(trainer):
            meter.watch(callback)
    trainer.add_callback(Stop(watch))
    return trainer, watch, meter


def segment(trainer: Trainer, watch: Stopwatch) -> float:
    """Train `STEPS` steps and return the median of all but the first, in seconds."""
    watch.steps.clear()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.train()
    return statistics.median(watch.steps[1:])


def neutral(pairs: int) -> dict[str, Any]:
    """Return the cost of neutral callbacks over `pairs` interleaved pairs of segments."""
    with tempfile.TemporaryDirectory() as folder:
        plain, plain_watch, _ = make(f"{folder}/plain", ours=False)
        ours, ours_watch, meter = make(f"{folder}/ours", ours=True)
        segment(plain, plain_watch)
        segment(ours, ours_watch)
        meter.seconds, inside, total, ratios = 0.0, 0.0, 0.0, []
        for pair in range(pairs):
            if pair % 2:
                b, a = segment(ours, ours_watch), segment(plain, plain_watch)
            else:
                a, b = segment(plain, plain_watch), segment(ours, ours_watch)
            ratios.append(b / a)
            total += sum(ours_watch.steps)
        inside = meter.seconds
    means = np.random.default_rng(0).choice(ratios, (10_000, pairs)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "share of a step inside our hooks": inside / total,
        "step time, ours over plain: mean": statistics.mean(ratios),
        "95 % interval": [float(low), float(high)],
        "pairs": pairs,
        "seconds a step": total / (pairs * STEPS),
    }


def main() -> None:
    """Run the benchmarks and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="interleaved pairs of segments, at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", NoEffectWarning)
    found = {"neutral callbacks": neutral(options.pairs)}
    print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), **found}, indent=2))


if __name__ == "__main__":
    main()
