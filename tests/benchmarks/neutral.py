"""What our callbacks cost when they change nothing, beside the plain Trainer in the same run.

Two Trainers on a 22.7 M-parameter BERT at batch 8 x 32 tokens train in turn, a few steps each, in alternating order.
Returns the share of a step that is spent inside our hooks, and the ratio of whole steps over the pairs with a bootstrap
interval. One thread.
"""

import statistics
import tempfile
import time
import warnings
from typing import Any

from transformers import Trainer, TrainerCallback

from tests.benchmarks.timing import ROWS, Stop, Stopwatch, arguments, bert, interval, rows, segment
from tl_callbacks import GradualUnfreezing, NoEffectWarning, WeightAnchoring, at_steps, attach, group_layers
from tl_callbacks.preflight import our_callbacks

STEPS = 4  # per segment; the first is a warm-up and not counted


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
    model = bert()
    watch, meter = Stopwatch(), Meter()
    callbacks: list[TrainerCallback] = [watch]
    if ours:
        groups = group_layers(model)
        callbacks += [GradualUnfreezing(groups, at_steps([0] * (len(groups) - 1))), WeightAnchoring(0.0)]
    trainer = Trainer(model, arguments(folder, STEPS), train_dataset=rows(ROWS * STEPS), callbacks=callbacks)
    if ours:
        attach(trainer)
        for callback in our_callbacks(trainer):
            meter.watch(callback)
    trainer.add_callback(Stop(watch))
    return trainer, watch, meter


def neutral(pairs: int) -> dict[str, Any]:
    """Return the cost of neutral callbacks over `pairs` interleaved pairs of segments."""
    warnings.simplefilter("ignore", NoEffectWarning)
    with tempfile.TemporaryDirectory() as folder:
        plain, plain_watch, _ = make(f"{folder}/plain", ours=False)
        ours, ours_watch, meter = make(f"{folder}/ours", ours=True)
        segment(plain, plain_watch, 1)
        segment(ours, ours_watch, 1)
        meter.seconds, inside, total, ratios = 0.0, 0.0, 0.0, []
        for pair in range(pairs):
            if pair % 2:
                b, a = segment(ours, ours_watch, 1), segment(plain, plain_watch, 1)
            else:
                a, b = segment(plain, plain_watch, 1), segment(ours, ours_watch, 1)
            ratios.append(b / a)
            total += sum(ours_watch.steps)
        inside = meter.seconds
    return {
        "share of a step inside our hooks": inside / total,
        "step time, ours over plain: mean": statistics.mean(ratios),
        "95 % interval": interval(ratios),
        "pairs": pairs,
        "seconds a step": total / (pairs * STEPS),
    }
