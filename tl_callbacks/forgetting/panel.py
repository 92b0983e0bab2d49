"""All measures of one training: what the pretrained model scored, and what the model scores now."""

import math
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import Trainer

from tl_callbacks.discovery import group_layers
from tl_callbacks.dtensors import reshard
from tl_callbacks.fingerprints import changes_base, fingerprint
from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.readings import Change, Reading, compare
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.probing.reference import digest, first_ranks, same_on_all_ranks
from tl_callbacks.reading.adapters import without_adapters


class Panel:
    """Reads all measures, each rank a share of the rows, and compares them with the pretrained model.

    Args:
        measures: each with names of its own.
        groups: the layer groups; None: `group_layers(model)`.

    Example:
        >>> Panel([], None).values
        {}
    """

    def __init__(self, measures: Sequence[Measure], groups: LayerGroups | None) -> None:
        self.measures = tuple(measures)
        self.groups = groups
        self.start: str | None = None
        """Fingerprint of the pretrained weights outside the head; None where there is none to take."""
        self.rows: dict[str, str] = {}
        """Digest of each measure's rows."""
        self.seconds = {"baseline": 0.0, "evaluations": 0.0}
        self._base: dict[str, Reading] = {}
        self._held: LayerGroups | None = None
        self._trainer: Trainer | None = None
        self._model: Callable[[], nn.Module | None] = lambda: None

    @property
    def values(self) -> dict[str, float]:
        """What the pretrained model scored, by name; without divergences, which are 0."""
        return {name: reading.value for name, reading in self._base.items() if reading.kind != "divergence"}

    @property
    def retained(self) -> list[str]:
        """The names of the values that have a retention: no divergences, and no scores that began at 0."""
        return [name for name, base in self._base.items() if math.isfinite(compare(base, base).retention)]

    @property
    def errors(self) -> dict[str, float]:
        """The standard errors of these values."""
        return {name: self._base[name].error for name in self.values}

    def take(self, trainer: Trainer, model: nn.Module) -> None:
        """Read the pretrained model, once a model. Call it on all ranks, before anything is loaded or trained.

        Of a model with adapters that is the model without them; where they have rewritten the weights below when they
        were made (PiSSA and others), it is the model with them, which is what then equals the pretrained one.
        """
        if self._model() is model:
            return
        begun = time.perf_counter()
        self._trainer = trainer
        self._held = self.groups or group_layers(model)  # while all that trains is open, and adapters are on
        alike = same_on_all_ranks(digest({**parameters_by_name(model)})) if self._ranks > 1 else True
        with nullcontext() if changes_base(model) else without_adapters(model):
            self._base = self._read(model, base=True, alike=alike)
        if empty := [name for name, reading in self._base.items() if not math.isfinite(reading.value)]:
            raise ValueError(
                f"`{empty[0]}` is {self._base[empty[0]].value} in the pretrained model: nothing in its rows counts, or "
                "a weight is no number. Expected rows with labels or with two tokens and more."
            )
        self.start = self._shared(self._fingerprint(model) if self._rank == 0 else None)
        self.rows = self._shared({m.name: m.digest() for m in self.measures} if self._rank == 0 else None)
        self._model = weakref.ref(model)
        self.seconds["baseline"] += time.perf_counter() - begun
        self._warn_of_chance()

    def changes(self, model: nn.Module, recorded: Mapping[str, float]) -> dict[str, Change]:
        """Return what became of each value. Call it on all ranks, which get the same numbers.

        Args:
            model: the model as it is now.
            recorded: what the run recorded of the pretrained model.
        """
        begun = time.perf_counter()
        now = self._read(model, base=False, alike=True)
        reshard(model)
        found = {name: compare(now[name], base, recorded.get(name)) for name, base in self._base.items()}
        found = dict(self._shared(found))
        self.seconds["evaluations"] += time.perf_counter() - begun
        return found

    def _read(self, model: nn.Module, *, base: bool, alike: bool) -> dict[str, Reading]:
        assert self._trainer is not None
        device, found = self._trainer.args.device, {}
        for measure in self.measures:
            if alike:
                part = measure.read(model, self._groups, base=base, rank=self._rank, ranks=self._ranks)
                part = part.gathered(device, self._ranks)
            else:  # the first rank's weights count, as DDP and FSDP2 will give them to all
                own = measure.read(model, self._groups, base=base, rank=0, ranks=1) if self._rank == 0 else None
                part, measure.kept = first_ranks((None if own is None else own.sorted(), measure.kept))
            found.update(measure.score(part))
        return found

    def _fingerprint(self, model: nn.Module) -> str | None:
        head = frozenset(n for group in self._groups if group.name == self._groups.head for n in group.parameters)
        found = fingerprint(model, head)
        return None if found is None else str(found["digest"])

    def _warn_of_chance(self) -> None:
        for name, reading in self._base.items():
            if reading.kind == "score" and not reading.value > reading.lucky and self._rank == 0:
                warnings.warn(
                    f"`{name}` is {reading.value:.3f} in the pretrained model, no better than chance "
                    f"({reading.chance:.3f}) by two standard errors, so its retention says nothing. Give rows that the "
                    "pretrained model can do, and its own head as `head=`.",
                    UserWarning,
                    stacklevel=5,
                )

    @property
    def _groups(self) -> LayerGroups:
        assert self._held is not None
        return self._held

    def _shared(self, value: Any) -> Any:
        return first_ranks(value) if self._ranks > 1 else value

    @property
    def _rank(self) -> int:
        assert self._trainer is not None
        return int(self._trainer.args.process_index)

    @property
    def _ranks(self) -> int:
        assert self._trainer is not None
        return int(self._trainer.args.world_size)
