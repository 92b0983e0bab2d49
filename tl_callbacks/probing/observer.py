"""What is kept of a training's probe sets, and what is read of them: at first, and at each evaluation."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer

from tl_callbacks.callbacks import announce
from tl_callbacks.discovery import group_layers
from tl_callbacks.dtensors import reshard
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.probing.capture import Capture
from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.evaluation import read_in_order, why_not_listen
from tl_callbacks.probing.measures import Measures, measure
from tl_callbacks.probing.passes import Listener, Part, read_rows
from tl_callbacks.probing.reference import (
    body,
    compact,
    digest,
    distances,
    first_ranks,
    random_twin,
    same_on_all_ranks,
    weights_now,
)
from tl_callbacks.probing.rows import Source
from tl_callbacks.probing.targets import why_no_probe
from tl_callbacks.reading.adapters import without_adapters
from tl_callbacks.reading.pooling import Pooling


class _Hearing(NamedTuple):
    name: str
    listener: Listener
    capture: Capture


class Observer:
    """Reads the probe sets of one trainer, in its own evaluation pass where that shows them, and measures.

    Args:
        groups: the layer groups; None: `group_layers(model)`.
        pooling: as in `Capture`.
        controls: whether the network with random weights is measured.
        weights: whether the pretrained weights are kept.
        seed: of all that is drawn.

    Example:
        >>> Observer(None, pooling="mean", controls=True, weights=True, seed=0).facts()
        {'rows': {}, 'passes': {}, 'seconds': {}}
    """

    def __init__(
        self, groups: LayerGroups | None, *, pooling: Pooling, controls: bool, weights: bool, seed: int
    ) -> None:
        self.groups = groups
        self.pooling = pooling
        self.controls = controls
        self.weights = weights
        self.seed = seed
        self.start = ""
        """Digest of the weights outside the head that the run starts from."""
        self.baseline: Measures = {}
        """The measures of the pretrained model and of the controls."""
        self._trainer: Trainer | None = None
        self._sources: dict[str, Source] = {}
        self._own: dict[str, str] = {}  # why a set is read by a pass of our own
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._held: LayerGroups | None = None
        self._reference: dict[str, Part] = {}
        self._products: dict[str, dict[str, Tensor]] = {}
        self._copies: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._hearing: _Hearing | None = None
        self._seconds: dict[str, float] = {}

    def attach(self, trainer: Trainer, sources: Mapping[str, Source]) -> None:
        """Take the trainer and the sets, by what the names of their measures end in."""
        self._trainer = trainer
        self._sources = dict(sources)
        reasons = {name: why_not_listen(trainer, source.dataset) for name, source in sources.items()}
        self._own = {name: reason for name, reason in reasons.items() if reason is not None}

    def take(self, model: nn.Module) -> None:
        """Take the reference of a model that nothing has trained yet; once a model. Call it on all ranks."""
        if self._model() is model:
            return
        with self._timed("reference"):
            groups = self._held = self.groups or group_layers(model)
            self._weights = weights_now(model, body(groups))
            alike = same_on_all_ranks(digest({**parameters_by_name(model)}) if self._ranks > 1 else "")
            if not alike:  # the first rank's count, as DDP and FSDP2 will give them to all
                self._weights = first_ranks(self._weights)
            self.start = digest(self._weights)
            with without_adapters(model):
                self._reference = {name: self._read(model, name, alike=alike) for name in self._sources}
            self._products = {name: {} for name in self._sources}
            self._copies = {name: copies(part.features) for name, part in self._reference.items()}
            self.baseline = self._controls(model)
            for part in self._reference.values():
                part.features = compact(part.features)
            if not self.weights:
                self._weights = {}
        self._model = weakref.ref(model)

    @contextmanager
    def listening(self, dataset: Any) -> Iterator[None]:
        """Listen to the Trainer's evaluation of a data set, if it is one of the sets."""
        assert self._trainer is not None
        assert self._trainer.model is not None
        for name, source in self._sources.items():
            if source.dataset is dataset and name not in self._own:
                listener = Listener(len(dataset), source.places, self._rank, self._ranks)
                capture = Capture(self._trainer.model, self._groups, listener.add, pooling=self.pooling)
                self._hearing = _Hearing(name, listener, capture)
                capture.open()
        try:
            yield
        finally:
            self.stop_listening()

    def stop_listening(self) -> None:
        """Remove all hooks and forget what was heard. Safe to call twice."""
        if self._hearing is not None:
            self._hearing.capture.close()
            self._hearing = None

    def due(self) -> list[str]:
        """Return the sets to measure at the end of an evaluation: the one it was of, and those it cannot be of."""
        heard = self._hearing.name if self._hearing is not None else None
        return [name for name in self._sources if name == heard or name in self._own]

    def measured(self, name: str, model: nn.Module) -> Measures:
        """Return the measures of a set in the model as it is now. Call it on all ranks."""
        part = self._heard(name)
        if part is None:
            with self._timed("passes"):
                part = self._read(model, name)
                reshard(model)
        with self._timed("measures"):
            found = self._measure(part, name, against=self._reference[name].features)
            if name == "" and self._weights:
                reshard(model)
                found["drift"] = distances(model, self._groups, self._weights)
        return found

    def description(self) -> dict[str, Any]:
        """Return what the event of a run's begin says, without times."""
        return {"start": self.start, "pooling": self.pooling, "seed": self.seed, **self._rows()}

    def summary(self) -> str:
        """Return in words what is read and how."""
        groups = next(iter(self._reference.values())).features
        own = [f"{self._title(name)} in a pass of its own ({reason})" for name, reason in self._own.items()]
        without = [f"no probe of the {title} set: {reason}" for title, reason in self._unprobed().items()]
        return f"{len(groups)} of {len(self._groups)} groups" + "".join(f"; {text}" for text in own + without)

    def facts(self) -> dict[str, Any]:
        """Return rows, how they were read, and the seconds that took."""
        passes = {self._title(name): self._own.get(name, "the Trainer's evaluation") for name in self._sources}
        unprobed = {"without_probe": found} if (found := self._unprobed()) else {}
        seconds = {kind: round(value, 3) for kind, value in self._seconds.items()}
        return {**self._rows(), **unprobed, "passes": passes, "seconds": seconds}

    def _unprobed(self) -> dict[str, str]:
        """Return in words why sets have no probe."""
        found = {
            self._title(name): why_no_probe(part.labels, part.unlabelled) for name, part in self._reference.items()
        }
        return {title: reason for title, reason in found.items() if reason}

    def _rows(self) -> dict[str, Any]:
        return {"rows": {self._title(name): len(source.places) for name, source in self._sources.items()}}

    @staticmethod
    def _title(name: str) -> str:
        return name.removeprefix("_") or "probe"

    @property
    def _groups(self) -> LayerGroups:
        assert self._held is not None
        return self._held

    @property
    def _rank(self) -> int:
        assert self._trainer is not None
        return int(self._trainer.args.process_index)

    @property
    def _ranks(self) -> int:
        assert self._trainer is not None
        return int(self._trainer.args.world_size)

    def _read(self, model: nn.Module, name: str, *, alike: bool = True) -> Part:
        """Return a set's rows by a forward pass of our own, shared among ranks that hold the same model."""
        assert self._trainer is not None

        def read(rank: int, ranks: int) -> Part:
            return read_rows(
                model, self._groups, self._sources[name], pooling=self.pooling, seed=self.seed, rank=rank, ranks=ranks
            )

        if alike:
            return read(self._rank, self._ranks).gathered(self._trainer.args.device, self._ranks)
        part: Part = first_ranks(read(0, 1).gathered(torch.device("cpu"), 1) if self._rank == 0 else None)
        return part

    def _heard(self, name: str) -> Part | None:
        """Return a set's rows as the Trainer's evaluation showed them; None where it did not, on all ranks alike."""
        hearing = self._hearing
        if hearing is None or hearing.name != name:
            return None
        assert self._trainer is not None
        self.stop_listening()
        mine = hearing.listener.part() if read_in_order(self._trainer) else None
        if all(gather_object([mine is not None])):
            assert mine is not None
            part = mine.gathered(self._trainer.args.device, self._ranks)
            if torch.equal(part.places, self._sources[name].places):
                return part
        self._own[name] = "the evaluation's forwards were not one pass over the rows in their order"
        announce(
            f"RepresentationProbes reads the {self._title(name)} set itself: {self._own[name]}", self._trainer.state
        )
        return None

    def _measure(self, part: Part, name: str, against: dict[str, Tensor] | None, **options: Any) -> Measures:
        found = measure(
            part.features, self._reference[name].labels, against, products=self._products[name], seed=self.seed,
            copies=self._copies[name], rank=self._rank, ranks=self._ranks, **options,
        )  # fmt: skip
        return {f"{kind}{name}": values for kind, values in found.items()}

    def _controls(self, model: nn.Module) -> Measures:
        """Return the measures of the pretrained model, of shuffled labels, and of the network with random weights."""
        found: Measures = {}
        for name, part in self._reference.items():
            found |= self._measure(part, name, None, shuffled=True)
            if self.controls and f"probe{name}" in found:
                twin = random_twin(model, self.seed)
                drawn = self._measure(self._read(twin, name), name, None)
                found[f"probe_random_init{name}"] = drawn[f"probe{name}"]
                del twin
        return found

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return _timed(self._seconds, what)


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - begun
