"""Which checkpoints may be the best: those that have kept enough."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments


def guard_best(trainer: Trainer, allowed: Callable[[], bool]) -> None:
    """Wrap this trainer's choice of the best checkpoint, so that nothing is the best while `allowed()` is false.

    The Trainer chooses right after an evaluation. What it leaves out does not become `best_metric` either, so a later
    checkpoint is compared with those alone that were allowed, and `save_strategy="best"` does not save it.

    Args:
        trainer: the Trainer.
        allowed: asked after each evaluation.
    """
    determine = trainer._determine_best_metric

    @functools.wraps(determine)
    def guarded(metrics: dict[str, float], trial: Any) -> bool:
        return allowed() and determine(metrics=metrics, trial=trial)

    trainer._determine_best_metric = guarded  # type: ignore[method-assign]


def step_at_the_end(args: TrainingArguments, state: TrainerState) -> int:
    """Return the step that the weights are of when a training has ended: the last one, or that of the best checkpoint.

    Args:
        args: the Trainer's.
        state: at `on_train_end`, when the best checkpoint has been loaded.

    Example:
        >>> import tempfile
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> step_at_the_end(args, TrainerState(global_step=7, best_model_checkpoint="run/checkpoint-4"))
        7
    """
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    match = re.search(r"checkpoint-(\d+)/?$", best or "")
    return int(match[1]) if match else state.global_step


def too_little(retention: float, least: float, args: TrainingArguments, state: TrainerState) -> str:
    """Return what to say of a training that ends with less than was asked for, and what to do.

    Args:
        retention: of the weights that it ends with.
        least: what was asked for.
        args: the Trainer's.
        state: at the end.

    Example:
        >>> import tempfile
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> too_little(0.9, 0.95, args, TrainerState(best_model_checkpoint="run/checkpoint-4")).partition(". ")[2]
        'The weights in `run/checkpoint-4` kept it. Load them, or set load_best_model_at_end=True.'
    """
    how = "that is no number" if math.isnan(retention) else f"of {retention:.4f}, below min_retention={least}"
    text = f"ForgettingMonitor: the training ends with a retention {how}."
    if path := state.best_model_checkpoint:
        if not args.load_best_model_at_end:
            return f"{text} The weights in `{path}` kept it. Load them, or set load_best_model_at_end=True."
        return (
            f"{text} `{path}`, which was loaded, kept it when it was evaluated. A callback has changed the weights "
            "since, or the run began with a lower min_retention."
        )
    if state.best_global_step:
        return (
            f"{text} The weights of step {state.best_global_step} kept it and were not saved. Save at each evaluation "
            "(save_steps equal to eval_steps)."
        )
    return (
        f"{text} No checkpoint that was evaluated kept it and could be the best. Anchor the weights, lower the rate, "
        "or train fewer of them."
    )
