"""An evaluation with all probes of all layers, in the Trainer's own pass, beside a plain evaluation.

Two Trainers on a 22.7 M-parameter BERT (6 blocks of 384 units) evaluate 2000 rows of 32 tokens in 8 classes in turn, in
alternating order. Ours measures probe accuracy with its error, CKA and Procrustes to the reference, the distance of the
weights, effective rank and anisotropy of 8 groups. One thread. Returns the ratios of the time on the clock and of what
the process computed, and what taking the reference with all controls took, once a training.
"""

import contextlib
import os
import tempfile
import time
from typing import Any

from transformers import Trainer

from tests.benchmarks.timing import arguments, bert, ratios_in_short, rows
from tl_callbacks import RepresentationProbes, attach

ROWS = 2000
CLASSES = 8


def make(folder: str, *, ours: bool) -> tuple[Trainer, RepresentationProbes]:
    """Return a trainer that evaluates, with probes or plain."""
    data = [{**row, "labels": number % CLASSES} for number, row in enumerate(rows(ROWS))]
    probes = RepresentationProbes("eval")
    args = arguments(folder, 1)
    args.per_device_eval_batch_size = 32
    model = bert(num_labels=CLASSES)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[probes] if ours else [])
    if ours:
        attach(trainer)
    return trainer, probes


def evaluation(trainer: Trainer) -> tuple[float, float]:
    """Evaluate once; return the seconds on the clock and those of the processor."""
    trainer.state.log_history.clear()  # probes measure once a step
    clock, processor = time.perf_counter(), time.process_time()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trainer.evaluate()
    return time.perf_counter() - clock, time.process_time() - processor


def probes(pairs: int) -> dict[str, Any]:
    """Return the cost of probes over interleaved pairs of evaluations, a tenth as many as of steps."""
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = make(f"{folder}/plain", ours=False)
        begun = time.process_time()
        ours, callback = make(f"{folder}/ours", ours=True)
        reference = time.process_time() - begun
        found = []
        for pair in range(max(2, pairs // 10)):
            order = (plain, ours) if pair % 2 else (ours, plain)
            seconds = {id(trainer): evaluation(trainer) for trainer in order}
            found.append((seconds[id(plain)], seconds[id(ours)]))
        passes = callback.facts()["passes"]
    return {
        "read in": passes["probe"],
        "plain evaluation, in processor seconds": sum(one[1] for one, _ in found) / len(found),
        "clock, with probes over plain": ratios_in_short([other[0] / one[0] for one, other in found]),
        "processor, with probes over plain": ratios_in_short([other[1] / one[1] for one, other in found]),
        "measures alone, in seconds of the clock, all evaluations and the controls": callback.facts()["seconds"],
        "reference and controls, in processor seconds, once": reference,
    }
