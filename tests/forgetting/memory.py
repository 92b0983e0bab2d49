"""Something that a model with random weights can do, so that it can forget it."""

from typing import Any

import torch

from tests import tiny
from tl_callbacks import ForgettingMonitor, SourceTask


def sureness(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The probability of the label."""
    return logits.softmax(1)[torch.arange(len(labels)), labels.clamp(min=0)]


def monitor(rows: Any = None, **options: Any) -> ForgettingMonitor:
    """How sure the model is of the first class, on rows of its own; one class, so that nothing is probed."""
    held = [{**row, "labels": 0} for row in tiny.texts(20, seed=8)] if rows is None else rows
    return ForgettingMonitor(SourceTask(held, score=sureness), **options)
