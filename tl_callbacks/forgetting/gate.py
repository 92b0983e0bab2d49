"""Which checkpoints may be the best: those that have kept enough."""

import functools
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


def too_little(retention: float, least: float, state: TrainerState) -> str:
    """Return what to say of a training that ends with less than was asked for, and what to do.

    Args:
        retention: of the weights that it ends with.
        least: what was asked for.
        state: at the end.

    Example:
        >>> too_little(0.9, 0.95, TrainerState(best_metric=0.5, best_global_step=4)).partition(". ")[2]
        'The weights of step 4 kept it. Load them, or set load_best_model_at_end=True.'
    """
    text = f"ForgettingMonitor: the training ends with a retention of {retention:.4f}, below min_retention={least}."
    if state.best_global_step:
        step = state.best_global_step
        return f"{text} The weights of step {step} kept it. Load them, or set load_best_model_at_end=True."
    return (
        f"{text} No checkpoint that was evaluated kept it and could be the best. Anchor the weights, lower the rate, "
        "or train fewer of them."
    )
