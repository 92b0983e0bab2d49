"""The adapter: when a Trainer's model is looked into, and what is logged of it."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.checkpoints import loaded_checkpoint
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.evaluation import around_evaluation, resolved, source_of
from tl_callbacks.probing.observer import Observer
from tl_callbacks.probing.rows import Source
from tl_callbacks.reading.pooling import Pooling
from tl_callbacks.sharding import sharding, zero_stage

_EVENT = "probing"
_PROBE, _REFERENCE = "", "_reference"  # what the names of a set's measures end in


class RepresentationProbes(TransferCallback):
    """Measures at each evaluation what every layer group knows of the task and how far it is from the pretrained model.

    Logged by group: `tl/probe`, the held-out accuracy of a linear (ridge) probe, and `tl/probe_se`, its standard error;
    `tl/cka` (debiased, 1: unchanged) and `tl/procrustes` (angle, 0: unchanged) to the pretrained features of the same
    rows; `tl/drift`, the distance of the weights; `tl/effective_rank` and `tl/anisotropy`. At step 0 the same of the
    pretrained model, with the controls: `tl/probe_random_init` of the same network with random weights,
    `tl/probe_shuffled` of shuffled labels, and `tl/probe_chance`. What is measured on `reference_set` ends in
    `_reference`. Groups are read at their output, the head at its input (`Capture`).

    Where a set is the Trainer's `eval_dataset` or one of them, the features come from the Trainer's own evaluation
    pass; otherwise, and before training and after it where no evaluation came last, from a pass of their own, which
    changes no random state. Labels are those of the batches: one a row, or several of floating point, each with a probe
    of its own, of which the means are logged; where there is no probe, the run says why as it begins. Rows with equal
    features in every layer are copies: they share a fold, and the standard error counts them as one.

    The reference is taken by `attach`, with adapters off, before a resumed run loads its checkpoint; nothing of it is
    saved, and a resumed run checks that it started from the same weights.

    Args:
        probe_set: rows of the task, with labels or without; the name of one of the Trainer's evaluation sets will do.
        groups: the layer groups; None: `group_layers(model)`.
        reference_set: rows of another domain, such as general text, to tell drift from adaptation.
        pooling: "mean", "first" or "last" of the places that the attention mask keeps.
        max_rows: rows of a set that are kept, drawn at random; their pooled features stay in memory.
        controls: whether the random network is measured once, which costs one more pass.
        weights: whether a copy of the pretrained weights is kept on the CPU, for `tl/drift`.
        seed: of the rows, folds, shuffled labels and random weights.

    Raises:
        ValueError: `max_rows` is below 10 or `pooling` is unknown.

    Example:
        >>> RepresentationProbes([{"input_ids": [1], "labels": 0}])
        RepresentationProbes(rows=1, reference_rows=0, pooling='mean')

    References:
        Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
        https://arxiv.org/abs/1610.01644
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019.
        https://arxiv.org/abs/1905.00414
        Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks", EMNLP 2019.
        https://arxiv.org/abs/1909.03368
    """

    def __init__(
        self,
        probe_set: Any,
        groups: LayerGroups | None = None,
        *,
        reference_set: Any = None,
        pooling: Pooling = "mean",
        max_rows: int = 2000,
        controls: bool = True,
        weights: bool = True,
        seed: int = 0,
    ) -> None:
        if max_rows < 10:
            raise ValueError(f"`max_rows` is {max_rows}; expected 10 or more, as probes are scored by 5 folds.")
        if pooling not in ("mean", "first", "last"):
            raise ValueError(f'`pooling` is {pooling!r}; expected "mean", "first" or "last".')
        self.sets = {_PROBE: probe_set, **({} if reference_set is None else {_REFERENCE: reference_set})}
        self.pooling = pooling
        self.max_rows = max_rows
        self.seed = seed
        self._observer = Observer(groups, pooling=pooling, controls=controls, weights=weights, seed=seed)

    def __repr__(self) -> str:
        rows = {end: "?" if isinstance(held, str) else str(len(held)) for end, held in self.sets.items()}
        return (
            f"RepresentationProbes(rows={rows[_PROBE]}, reference_rows={rows.get(_REFERENCE, 0)}, "
            f"pooling={self.pooling!r})"
        )

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: a set that cannot be read twice, a checkpoint taken for the pretrained model."""
        found = []
        if sum(isinstance(other, RepresentationProbes) for other in trainer.callback_handler.callbacks) > 1:
            found.append("the Trainer has several RepresentationProbes, which would log under one name; keep one.")
        if path := loaded_checkpoint(trainer.model):
            found.append(
                f"RepresentationProbes would take the features of `{path}` for the pretrained ones. Load the "
                "pretrained model and pass resume_from_checkpoint to train()."
            )
        if sharding(trainer) == "fsdp1" or zero_stage(trainer) == 3:
            found.append("RepresentationProbes reads no model that FSDP 1 or ZeRO-3 has cut. Train with DDP or FSDP 2.")
        try:
            self._sources(trainer)
        except (TypeError, ValueError) as error:
            found.append(f"RepresentationProbes: {error}")
        return found

    def on_attach(self, trainer: Trainer) -> None:
        """Take the reference, and a place around each evaluation."""
        super().on_attach(trainer)
        assert trainer.model is not None
        self._observer.attach(trainer, self._sources(trainer))
        around_evaluation(trainer, self._observer.listening)
        self._observer.take(trainer.model)

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Take the reference anew where `model_init` made another model for a fresh training."""
        if state.global_step == 0 and self.trainer is not None and self.trainer.model_init is not None:
            self._observer.take(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the pretrained model and the controls, or check that a resumed run began with the same weights."""
        if self.trainer is None:
            raise RuntimeError("RepresentationProbes needs the trainer. Call attach(trainer) before trainer.train().")
        if began := events.read(state.log_history, _EVENT):
            self._compare(began[0]["start"])
        else:
            events.emit(state.log_history, _EVENT, step=state.global_step, **self._observer.description())
            self.log(_flat(self._observer.baseline), state)
            announce(f"{self!r} looks into {self._observer.summary()}", state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the set that was evaluated, and those that need a pass of their own, once a step."""
        for name in self._observer.due():
            self._measure(name, kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the final model, where no evaluation has."""
        for name in self.sets:
            self._measure(name, kwargs["model"], state)
        self.restore(kwargs["model"])

    def restore(self, model: nn.Module) -> None:
        """Remove all hooks. Safe to call twice."""
        self._observer.stop_listening()

    def facts(self) -> Mapping[str, Any]:
        """Return rows, how they were read, and what that took in seconds beside the Trainer's own work."""
        return {"pooling": self.pooling, "seed": self.seed, **self._observer.facts()}

    def _sources(self, trainer: Trainer) -> dict[str, Source]:
        """Return how each set is read, by what the names of its measures end in."""
        return {
            name: source_of(trainer, resolved(trainer, held), self.max_rows, self.seed)
            for name, held in self.sets.items()
        }

    def _measure(self, name: str, model: nn.Module, state: TrainerState) -> None:
        here = [entry for entry in state.log_history if entry.get("step") == state.global_step]
        if any(key.startswith(f"tl/effective_rank{name}/") for entry in here for key in entry):
            self._observer.stop_listening()
        else:
            self.log(_flat(self._observer.measured(name, model)), state)

    def _compare(self, start: str) -> None:
        if start != self._observer.start:
            warnings.warn(
                "RepresentationProbes: this run began with other weights than those that the trainer was made with, "
                "so drift from here on is measured from another start. Make the model as it was made at first, under "
                "the same seed if weights outside the head are new.",
                UserWarning,
                stacklevel=3,
            )


def _flat(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the names under which measures are logged: `tl/<measure>/<group>`."""
    return {f"tl/{kind}/{group}": value for kind, values in found.items() for group, value in values.items()}
