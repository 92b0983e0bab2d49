"""What every measure of forgetting has: a name, rows, and a way to read them in a model."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import nn
from transformers import Trainer

from tl_callbacks.fingerprints import tensor_hash
from tl_callbacks.forgetting.readings import Reading
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.passes import Part
from tl_callbacks.probing.rows import Source
from tl_callbacks.reading.quiet import random_states_kept


class Measure:
    """One thing that the pretrained model could do.

    A measure reads its rows in a model, each rank a share of them, and scores what all ranks have read together.

    Args:
        name: under which its values are logged.
        max_rows: rows that are kept, drawn at random.
        seed: of what is drawn.

    Raises:
        ValueError: the name is empty or has a slash, or `max_rows` is below 2.

    Example:
        >>> Measure("language", max_rows=10, seed=0).name
        'language'
    """

    kept: Any = None
    """What `read` of the pretrained model keeps for later, beside what it returns."""

    _source: Source | None = None

    def __init__(self, name: str, *, max_rows: int, seed: int) -> None:
        if not name or "/" in name:
            raise ValueError(f"`name` is {name!r}; expected a word without a slash, as it is part of what is logged.")
        if max_rows < 2:
            raise ValueError(f"`max_rows` is {max_rows}; expected 2 or more.")
        self.name = name
        self.max_rows = max_rows
        self.seed = seed

    @property
    def definitions(self) -> dict[str, str]:
        """What each value is that it may give, and what retention of it means, by name."""
        return {self.name: ""}

    @property
    def unmeasured(self) -> dict[str, str]:
        """Why it gives none of a value that it might have given, in words, by name; known once it has scored."""
        return {}

    @property
    def rows(self) -> int:
        """How many rows it reads; 0 before it is prepared."""
        return len(self._source.places) if self._source is not None else 0

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with the rows that are read, once prepared.

        Of values that are neither text nor numbers the type alone counts.
        """
        assert self._source is not None
        found = hashlib.sha256()
        with random_states_kept(torch.device("cpu"), self.seed):
            for place in self._source.places.tolist():
                row = json.dumps(self._source.dataset[place], default=_in_short, skipkeys=True)
                found.update(f"{row}\n".encode())
        return found.hexdigest()[:16]

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong with this trainer, one text a finding; empty if nothing."""
        try:
            self.prepare(trainer)
        except (TypeError, ValueError) as error:
            return [f"{self.name}: {error}"]
        return []

    def prepare(self, trainer: Trainer) -> None:
        """Take the rows as the model will be given them.

        Raises:
            TypeError: the data set has no length or no rows by number.
            ValueError: the model or the rows do not suit.
        """
        raise NotImplementedError

    def read(self, model: nn.Module, groups: LayerGroups, *, base: bool, rank: int, ranks: int) -> Part:
        """Return this rank's share of the rows, as the model sees them.

        Args:
            model: the model without a wrapper.
            groups: its layer groups.
            base: whether it is the pretrained one, to which later ones are compared.
            rank: number of this process.
            ranks: how many share the rows.
        """
        raise NotImplementedError

    def score(self, part: Part) -> dict[str, Reading]:
        """Return what the rows of all ranks say, by name."""
        raise NotImplementedError


def _in_short(value: Any) -> Any:
    """Return what JSON can hold of a value that it cannot hold."""
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist() if value.dtype.kind in "OSU" else hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, torch.Tensor):
        return tensor_hash(value)
    return dict(value) if isinstance(value, Mapping) else type(value).__name__
