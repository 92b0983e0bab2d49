"""What the timed benchmarks share: a model of 22.7 M parameters, segments of a few steps, and intervals of ratios."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

ROWS = 8  # of a batch, 32 tokens each


class Stopwatch(TrainerCallback):
    """Times each step from before the first hook of on_step_begin to after the last of on_step_end.

    `steps` holds what passed on the clock, `processor` what this process computed: what others do on the machine moves
    the latter less, and waiting for another rank does not count.
    """

    def __init__(self) -> None:
        self.started = (0.0, 0.0)
        self.steps: list[float] = []
        self.processor: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = (time.perf_counter(), time.process_time())


class Stop(TrainerCallback):
    """The other end of a `Stopwatch`: last in the order of callbacks."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.steps.append(time.perf_counter() - self.watch.started[0])
        self.watch.processor.append(time.process_time() - self.watch.started[1])


def bert(**config: Any) -> BertForSequenceClassification:
    """A classifier of 6 blocks of 384 units, with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, **config)
    )


def rows(count: int) -> list[dict[str, Any]]:
    """Random rows of 32 tokens."""
    ids = torch.randint(0, 30000, (count, 32), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": number % 2} for number, row in enumerate(ids)]


def arguments(folder: str, steps: int) -> TrainingArguments:
    """Training arguments for a segment of so many steps."""
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=ROWS, logging_steps=1000, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def segment(trainer: Trainer, watch: Stopwatch, warm_up: int) -> float:
    """Train `max_steps` steps and return the median of all but the first `warm_up`, in seconds."""
    watch.steps.clear()
    watch.processor.clear()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.train()
    return statistics.median(watch.steps[warm_up:])


def interval(values: Sequence[float]) -> list[float]:
    """The 95 % bootstrap interval of the mean: 10 000 resamples, seed 0."""
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(axis=1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def mean_and_interval(values: Sequence[float]) -> dict[str, Any]:
    """For JSON."""
    return {"mean": statistics.mean(values), "95 % interval": interval(values)}


def ratios_in_short(ratios: Sequence[float]) -> dict[str, Any]:
    """For JSON, the geometric mean too: on a busy machine the mean of noisy ratios is above 1 even between equals."""
    logs = [math.log(ratio) for ratio in ratios]
    geometric = {
        "geometric mean": math.exp(statistics.mean(logs)),
        "its 95 % interval": [math.exp(bound) for bound in interval(logs)],
    }
    return {**mean_and_interval(ratios), **geometric}
