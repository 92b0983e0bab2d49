"""A step of DDP over a frozen prefix that our unfreezing reached, beside one that was frozen before DDP wrapped it.

Two ranks over gloo, one thread each. Both models, of 22.7 M parameters with the embeddings and the lower four of six
blocks frozen, live in the same two processes and train in turn, a few steps each. Ours opens the top two blocks at step
1 of every segment, so each is timed on a reducer that was rebuilt in place. No dropout: ours would not compute it in
what is frozen, and only the reducer is to be compared. A third model is frozen in `on_train_begin` and stays in the
reducer with all its parameters: what rebuilding saves, and proof that the measurement sees a difference.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from tests.benchmarks.launching import two_ranks
from tests.benchmarks.timing import ROWS, Stop, Stopwatch, arguments, bert, mean_and_interval, rows, segment
from tl_callbacks import GradualUnfreezing, attach, group_layers, staged

STEPS, WARM_UP = 7, 3  # per segment: ours opens at step 1, and DDP sets its buckets anew in the step after
OPEN = 3  # groups: the head and two blocks
WAYS = ("frozen before wrapping", "ours", "frozen later, kept in the reducer")
RANKS = 2


def freeze(model: nn.Module) -> None:
    """Freeze by hand what ours keeps frozen."""
    parameters = dict(model.named_parameters())
    for group in group_layers(model)[:-OPEN]:
        for name in group.parameters:
            parameters[name].requires_grad = False


class FreezeLater(TrainerCallback):
    """Freezes when the wrapper is there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        freeze(model)


def make(folder: str, way: str) -> tuple[Trainer, Stopwatch]:
    """Return a trainer on a fresh model that is frozen in one of the ways."""
    model, watch = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), Stopwatch()
    callbacks: list[TrainerCallback] = [watch]
    if way == WAYS[0]:
        freeze(model)
    elif way == WAYS[1]:
        callbacks.append(GradualUnfreezing(group_layers(model), staged([(0, 1), (1, OPEN)])))
    else:
        callbacks.append(FreezeLater())
    data = rows(ROWS * STEPS * RANKS)
    trainer = Trainer(model, arguments(folder, STEPS), train_dataset=data, callbacks=callbacks)
    if way == WAYS[1]:
        attach(trainer)
    trainer.add_callback(Stop(watch))
    return trainer, watch


def measure(pairs: int) -> dict[str, Any]:
    """Time the ways in turn on this rank, in changing order."""
    with tempfile.TemporaryDirectory() as folder:
        made = {way: make(f"{folder}/{number}", way) for number, way in enumerate(WAYS)}
        for trainer, watch in made.values():
            segment(trainer, watch, WARM_UP)
            assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _, order in zip(range(pairs), itertools.cycle(itertools.permutations(WAYS)), strict=False):
            for way in order:
                seconds[way].append(segment(*made[way], WARM_UP))
    ratios = {
        f"step time, {way} over {WAYS[0]}": [b / a for a, b in zip(seconds[WAYS[0]], seconds[way], strict=True)]
        for way in WAYS[1:]
    }
    return {
        **{name: mean_and_interval(values) for name, values in ratios.items()},
        "seconds a step": {way: statistics.median(values) for way, values in seconds.items()},
        "pairs": pairs,
    }


def frozen_prefix(pairs: int) -> dict[str, Any]:
    """Launch the two ranks and return what the first one measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status = two_ranks(__name__, str(pairs), str(folder / "found"), log=folder / "log", seconds=60 + 30 * pairs)
        if status:
            raise RuntimeError(f"the ranks ended with status {status}:\n{(folder / 'log').read_text()[-4000:]}")
        return json.loads((folder / "found").read_text())


if __name__ == "__main__":
    found = measure(int(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
