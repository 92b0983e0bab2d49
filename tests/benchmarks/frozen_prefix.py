"""A step of DDP over a frozen prefix that our unfreezing reached, beside one that was frozen before DDP wrapped it.

Two ranks over gloo, one thread each. Both models, of 22.7 M parameters with the embeddings and the lower four of six
blocks frozen, live in the same two processes and train in turn, a few steps each. Ours opens the top two blocks at step
1 of every segment, so each is timed on a reducer that was rebuilt in place. No dropout: ours would not compute it in
what is frozen, and only the reducer is to be compared. With every fourth pair a third model is timed that is frozen in
`on_train_begin` and stays in the reducer with all its parameters: what rebuilding saves, and proof that the measurement
sees a difference.
"""

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

from tests.benchmarks.timing import ROWS, Stop, Stopwatch, arguments, bert, ratios_in_short, rows, segment
from tests.launching import launch
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
        groups = group_layers(model)
        schedule = staged([(0, 1), (1, OPEN)])
        callbacks.append(GradualUnfreezing(groups, schedule, keep_frozen=groups.names[:-OPEN]))
    else:
        callbacks.append(FreezeLater())
    data = rows(ROWS * STEPS * RANKS)
    trainer = Trainer(model, arguments(folder, STEPS), train_dataset=data, callbacks=callbacks)
    if way == WAYS[1]:
        attach(trainer, verify_ranks=0)  # its comparisons are timed by rank_check
    trainer.add_callback(Stop(watch))
    return trainer, watch


def measure(pairs: int) -> dict[str, Any]:
    """Time the ways in turn on this rank, the first two in alternating order."""
    with tempfile.TemporaryDirectory() as folder:
        made = {way: make(f"{folder}/{number}", way) for number, way in enumerate(WAYS)}
        for trainer, watch in made.values():
            segment(trainer, watch, WARM_UP)
            assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        rounds, computed = [], []
        for pair in range(pairs):
            order = WAYS[1::-1] if pair % 2 else WAYS[:2]
            timed = order if pair % 4 else (*order, WAYS[2])
            rounds.append({way: segment(*made[way], WARM_UP) for way in timed})
            computed.append({way: statistics.median(made[way][1].processor[WARM_UP:]) for way in timed})
    return {"pairs": pairs, "step time": compared(rounds), "processor time of a step": compared(computed)}


def compared(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """The ways beside the first one, from the seconds of a step in each round."""
    found: dict[str, Any] = {"median, in seconds": {}}
    for way in WAYS:
        having = [seconds for seconds in rounds if way in seconds]
        found["median, in seconds"][way] = statistics.median(seconds[way] for seconds in having)
        if way != WAYS[0]:
            ratios = [seconds[way] / seconds[WAYS[0]] for seconds in having]
            found[f"{way}, over {WAYS[0]}"] = ratios_in_short(ratios)
    return found


def frozen_prefix(pairs: int) -> dict[str, Any]:
    """Launch the two ranks and return what the first one measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status = launch(
            "-m", __name__, str(pairs), str(folder / "found"), ranks=2, log=folder / "log", seconds=300 + 30 * pairs
        )
        if status:
            raise RuntimeError(f"the ranks ended with status {status}:\n{(folder / 'log').read_text()[-4000:]}")
        return json.loads((folder / "found").read_text())


if __name__ == "__main__":
    found = measure(int(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
