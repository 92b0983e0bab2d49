"""What all of them train: one model, one set of rows, one schedule of openings; and the record of what a rank saw."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import tiny

# The classifier first, then the pooler and the blocks, then the embeddings; one phase an epoch.
PHASES = (("classifier",), ("bert.pooler", "bert.encoder"), ("bert.embeddings",))
STEPS_PER_EPOCH = 4
BATCH = 4  # rows a rank
RANKS = 2
RATE = 1e-3  # AdamW, constant, without weight decay


def make_model(seed: int) -> Any:
    """A BERT classifier of two blocks in float32, without dropout: only the rows differ from rank to rank."""
    return tiny.bert(layers=2, dropout=0.0, seed=seed)


def rows(seed: int) -> list[dict[str, Any]]:
    """The rows of an epoch, of both ranks together; nobody shuffles them."""
    return tiny.texts(STEPS_PER_EPOCH * BATCH * RANKS, seed=seed + 1)


def in_phase(name: str, phase: int) -> bool:
    """Whether a parameter of the model opens with that phase."""
    return name.startswith(PHASES[phase])


class Record:
    """What one rank saw: the values after each optimizer step, and which parameters had been open in it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start = self._values()
        self.steps: list[dict[str, torch.Tensor]] = []
        self.open: list[list[str]] = []

    def step(self) -> None:
        """To be called after each optimizer step."""
        self.steps.append(self._values())
        self.open.append([name for name, parameter in self.model.named_parameters() if parameter.requires_grad])

    def write(self, path: Path, error: str | None) -> None:
        """Write it to a file."""
        torch.save({"start": self.start, "steps": self.steps, "open": self.open, "error": error}, path)

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
