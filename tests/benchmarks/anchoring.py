"""What an anchor costs: a step with it beside the plain Trainer's, and the memory that it takes.

A BERT classifier of the base's size (12 blocks of 768 units, 109 M parameters in float32), loaded from a folder, at
batch 8 x 64 tokens on one thread. Four Trainers train in turn, a few steps each, in an order that rotates: plain,
decoupled with the reference in memory, decoupled with it mapped from the checkpoint's file, and the penalty. Returns
the ratios of a step's time to the plain one's in the same round, on the clock and of the processor. One Trainer more
pulls at every other step: a step with the pull over the mean of those before and after it, which are a plain Trainer's,
is the sharper figure where the machine's speed wanders.

Memory is that of the process which no file backs (RssAnon), over that of the plain run, as multiples of the anchored
parameters' bytes, each way in a process of its own: at the end of a step, and the most that was seen every 5 ms while
steps ran. Freed memory is given back at once there, so that what is kept for reuse does not count. What the anchor adds
for a moment, such as when it compares its reference with the parameters, is in neither if training takes more.
"""

import itertools
import json
import statistics
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainerCallback
from transformers.utils import logging

from tests.benchmarks.timing import ROWS, Stop, Stopwatch, arguments, ratios_in_short, segment
from tests.launching import launch
from tl_callbacks import WeightAnchoring, attach
from tl_callbacks.anchoring import Decoupled
from tl_callbacks.anchoring.forms.form import Opening

STEPS, WARM_UP = 3, 1  # per segment
TOKENS = 64
STRENGTH = 0.01
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc gives back what is freed
PLAIN = "plain"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "decoupled": {},
    "decoupled, mapped": {"reference": "checkpoint"},
    "penalty": {"form": "penalty"},
}


def pretrained(folder: str) -> None:
    """Save a body with random weights."""
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)


class EveryOther(Decoupled):
    """The decoupled pull at the second step, the fourth, and so on."""

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Pull before every other step of the optimizer."""
        count = itertools.count()

        def pull(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if next(count) % 2:
                self._pull(optimizer, args, kwargs)

        return [opening.optimizer.register_step_pre_hook(pull)]


def make(pretrained: str, folder: str, anchor: WeightAnchoring | None, steps: int = STEPS) -> tuple[Trainer, Stopwatch]:
    """Return a trainer on a freshly loaded model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30000, (ROWS * STEPS, TOKENS), generator=generator)
    data = [{"input_ids": row, "labels": number % 2} for number, row in enumerate(ids)]
    watch = Stopwatch()
    callbacks: list[TrainerCallback] = [watch, *([anchor] if anchor is not None else [])]
    model = BertForSequenceClassification.from_pretrained(pretrained)
    trainer = Trainer(model, arguments(folder, steps), train_dataset=data, callbacks=callbacks)
    if anchor is not None:
        attach(trainer)
    trainer.add_callback(Stop(watch))
    return trainer, watch


def anchored(way: str) -> WeightAnchoring | None:
    """Return the anchor of a way."""
    return WeightAnchoring(STRENGTH, **WAYS[way]) if way != PLAIN else None


def times(folder: str, rounds: int) -> dict[str, Any]:
    """Return the time of a step over the plain one's, from rounds of a segment each."""
    made = {way: make(f"{folder}/pretrained", f"{folder}/runs", anchored(way)) for way in WAYS}
    for trainer, watch in made.values():
        segment(trainer, watch, WARM_UP)
    clock: list[dict[str, float]] = []
    processor: list[dict[str, float]] = []
    names = list(WAYS)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        clock.append({way: segment(*made[way], WARM_UP) for way in turned})
        processor.append({way: statistics.median(made[way][1].processor[WARM_UP:]) for way in turned})
    return {
        "rounds": rounds,
        "steps counted in a segment": STEPS - WARM_UP,
        "plain step, in seconds of the processor": statistics.median(one[PLAIN] for one in processor),
        **{
            f"{way}, over plain": {
                "clock": ratios_in_short([one[way] / one[PLAIN] for one in clock]),
                "processor": ratios_in_short([one[way] / one[PLAIN] for one in processor]),
            }
            for way in names[1:]
        },
    }


def alternating(folder: str, pairs: int) -> dict[str, Any]:
    """Return the time of a step with the pull over that of its neighbours without, in one training."""
    anchor = WeightAnchoring(STRENGTH, form=EveryOther())
    trainer, watch = make(f"{folder}/pretrained", f"{folder}/runs", anchor, steps=2 * pairs + 3)
    segment(trainer, watch, WARM_UP)
    found = {}
    for name, seconds in (("clock", watch.steps[2:]), ("processor", watch.processor[2:])):  # without, with, without ...
        plain, pulled = seconds[::2], seconds[1::2]
        found[name] = ratios_in_short([2 * one / sum(near) for one, near in zip(pulled, pairwise(plain), strict=True)])
    return {"steps with the pull": pairs, **found}


def anonymous() -> int:
    """Return the bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Sampler(TrainerCallback):
    """Reads the process's memory at the end of each step, and every 5 ms while steps run."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, anonymous())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._thread.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(anonymous())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended.set()
        self._thread.join()


def memory(pretrained: str, folder: str, way: str) -> dict[str, int]:
    """Train one way in this process; return what its memory was, and the size of what is anchored."""
    anchor = anchored(way)
    trainer, watch = make(pretrained, folder, anchor)
    sampler = Sampler()
    trainer.add_callback(sampler)
    segment(trainer, watch, 0)
    held = anchor._taken.tensors if anchor is not None and anchor._taken is not None else None
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values()) if held else 0
    return {"end of a step": statistics.median_low(sampler.ends), "most": sampler.most, "size": size}


def anchoring(pairs: int) -> dict[str, Any]:
    """Return the costs: times over a quarter as many rounds as pairs, then memory, a process a way."""
    with tempfile.TemporaryDirectory() as folder:
        pretrained(f"{folder}/pretrained")
        found = {}
        for way in WAYS:
            log, result = Path(folder, "log"), Path(folder, "found")
            command = ("-m", __name__, f"{folder}/pretrained", folder, way, str(result))
            status = launch(*command, ranks=None, log=log, environment=AT_ONCE)
            if status:
                raise RuntimeError(f"`{way}` ended with status {status}:\n{log.read_text()[-4000:]}")
            found[way] = json.loads(result.read_text())
        timed = times(folder, max(2, pairs // 4))
        every_other = alternating(folder, pairs)
    size = found["decoupled"]["size"]
    over = {
        way: {key: (one[key] - found[PLAIN][key]) / size for key in ("end of a step", "most")}
        for way, one in found.items()
        if way != PLAIN
    }
    return {
        "model": f"BERT, 12 x 768, float32, batch {ROWS} x {TOKENS} tokens, one thread",
        "time of a step": timed,
        "decoupled at every other step, over its neighbours": every_other,
        "anonymous memory over plain, in multiples of what is anchored": over,
        "what is anchored, in bytes": size,
        "plain, in bytes at the end of a step": found[PLAIN]["end of a step"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    Path(sys.argv[4]).write_text(json.dumps(memory(*sys.argv[1:4])))
