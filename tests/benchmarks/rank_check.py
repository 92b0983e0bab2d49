"""What it costs to compare a checksum of all parameters across ranks, beside the steps between two comparisons.

Two ranks over gloo, one thread each, 22.7 M parameters in float32, batch 8 x 32 tokens a rank. Each round trains a
segment with all parameters open and one with a frozen prefix, where steps are short and the share is largest, and times
the comparison in between: that of `VerifyRanks`, or any function of the model, named `module:function`.
"""

import json
import os
import pkgutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
from torch import nn
from transformers import Trainer

from tests.benchmarks.frozen_prefix import RANKS, freeze
from tests.benchmarks.timing import ROWS, Stop, Stopwatch, arguments, bert, mean_and_interval, rows, segment
from tests.launching import launch
from tl_callbacks.ranks import checksums, differences

STEPS, WARM_UP = 4, 1  # per segment
CHECKS = 3  # a round
INTERVAL = 100  # steps between two comparisons, the default of `VerifyRanks`


def compare(model: nn.Module) -> None:
    """What `VerifyRanks` does each time."""
    mine = checksums(model.parameters())
    gathered = mine.new_empty((RANKS, *mine.shape))
    torch.distributed.all_gather_into_tensor(gathered.view(-1, mine.shape[-1]), mine)
    if found := differences(gathered):
        raise RuntimeError(f"the ranks differ: {found}")


def make(folder: str, *, frozen: bool) -> tuple[Trainer, Stopwatch]:
    """Return a plain trainer, of which all parameters train or the head and two blocks."""
    model, watch = bert(), Stopwatch()
    if frozen:
        freeze(model)
    trainer = Trainer(
        model, arguments(folder, STEPS), train_dataset=rows(ROWS * STEPS * RANKS), callbacks=[watch, Stop(watch)]
    )
    return trainer, watch


def timed(check: Callable[[nn.Module], object], model: nn.Module) -> float:
    """Seconds that one comparison takes when both ranks come to it at once."""
    torch.distributed.barrier()
    started = time.perf_counter()
    check(model)
    return time.perf_counter() - started


def measure(check: Callable[[nn.Module], object], rounds: int) -> dict[str, Any]:
    """Time comparisons and steps in turn on this rank."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "all open": make(f"{folder}/open", frozen=False),
            "frozen prefix": make(f"{folder}/frozen", frozen=True),
        }
        for trainer, watch in trainers.values():
            segment(trainer, watch, WARM_UP)
        steps: dict[str, list[float]] = {name: [] for name in trainers}
        checks = []
        for _ in range(rounds):
            for name, (trainer, watch) in trainers.items():
                steps[name].append(segment(trainer, watch, WARM_UP))
            model = trainers["all open"][0].model
            assert model is not None
            checks.append(statistics.median(timed(check, model) for _ in range(CHECKS)))
    shares = {
        f"share of training, {name}": [c / (INTERVAL * s + c) for c, s in zip(checks, seconds, strict=True)]
        for name, seconds in steps.items()
    }
    return {
        **{name: mean_and_interval(values) for name, values in shares.items()},
        "seconds a comparison": statistics.median(checks),
        "seconds a step": {name: statistics.median(seconds) for name, seconds in steps.items()},
        "steps between comparisons": INTERVAL,
        "rounds": rounds,
    }


def rank_check(rounds: int, check: str = f"{__name__}:compare") -> dict[str, Any]:
    """Launch the two ranks and return what the first one measured. `check`: a function of the model, by its name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = folder / "found"
        status = launch(
            "-m", __name__, check, str(rounds), str(found), ranks=2, log=folder / "log", seconds=300 + 30 * rounds
        )
        if status:
            raise RuntimeError(f"the ranks ended with status {status}:\n{(folder / 'log').read_text()[-4000:]}")
        return json.loads(found.read_text())


if __name__ == "__main__":
    measured = measure(pkgutil.resolve_name(sys.argv[1]), int(sys.argv[2]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_text(json.dumps(measured))
