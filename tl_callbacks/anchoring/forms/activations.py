"""What the forms have in common that keep what the model computes, not its weights.

They run the reference on each micro-batch, once, without gradient, and add a term to its loss.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerState

from tl_callbacks.anchoring.forms.form import Form, Opening
from tl_callbacks.anchoring.forms.loss_term import LossTerm
from tl_callbacks.anchoring.forms.observing import Observed, Observer
from tl_callbacks.anchoring.reference.beside import as_given, as_reference, floating_buffers, saved
from tl_callbacks.fingerprints import base_model, changes_base
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import is_peft
from tl_callbacks.reading.adapters import without_adapters
from tl_callbacks.reading.points import ReadPoint, Stream
from tl_callbacks.reading.pooling import fitting, rows_first
from tl_callbacks.sharding import sharding


class Activations(Form):
    """A term of the loss that compares a training forward with the reference's on the same inputs."""

    below_one = False

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[str, Tensor] = {}
        self._observer: Observer | None = None
        self._term: LossTerm | None = None
        self._sums: dict[str, Tensor] = {}
        self._switches_off = False  # whether the reference is the model without its adapters

    def take(self, model: nn.Module, names: list[str], given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Keep the buffers that training moves, such as BatchNorm's statistics."""
        self._switches_off = given is None and is_peft(model) and not changes_base(model)
        self._buffers = as_given(floating_buffers(model), given)
        return saved(model, self._buffers)

    def findings(self, trainer: Trainer) -> list[str]:
        """Return why the reference could not run beside the model."""
        text = (
            f"WeightAnchoring with form={self.name!r} runs the model with the pretrained weights in its "
            'place, which it cannot under FSDP 2. Train with DDP, or choose form="decoupled" or "penalty".'
        )
        return [text] if sharding(trainer) == "fsdp2" else []

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Watch the groups and enter the trainer's loss; the observer has hooks of its own.

        Raises:
            RuntimeError: the callback was not attached.
            ValueError: a group has no place where it can be read.
        """
        trainer = self._trainer()
        self._observer = Observer(opening.model, self.points(opening.model))
        self._term = LossTerm(trainer, self._observer.listen, self._of_micro_batch)
        self._term.enter()
        return []

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Begin to measure anew."""
        self._sums = {}

    def close(self) -> None:
        """Leave the model and the trainer as they were. Safe to call twice."""
        super().close()
        if self._term is not None and self._observer is not None:
            self._term.leave()
            self._observer.close()
        self._term = self._observer = None

    def measured(self) -> dict[str, float]:
        """Return the means over the rows of the last step, by what they are of. Call it on all ranks."""
        trainer, names = self._trainer(), self.measures()
        device = trainer.args.device
        values = torch.zeros(2, len(names), device=device)  # the sum over micro-batches, and whether there was one
        for place, name in enumerate(names):
            if name in self._sums:
                values[:, place] = torch.stack([self._sums[name].float(), values.new_ones(())])
        if trainer.args.world_size > 1:
            values = trainer.accelerator.reduce(values, "sum")
        sums, seen = values.tolist()
        return {name: value for name, value, found in zip(names, sums, seen, strict=True) if found}

    def points(self, model: nn.Module) -> dict[str, ReadPoint]:
        """Return where the model is read, by group name."""
        raise NotImplementedError

    def measures(self) -> list[str]:
        """Return the names of what is measured."""
        raise NotImplementedError

    def is_open(self, seen: Observed) -> bool:
        """Return whether a forward has anything to compare that has a gradient."""
        raise NotImplementedError

    def terms(self, seen: Observed, reference: Observed) -> dict[str, tuple[float, Tensor]]:
        """Return strength and mean over the rows of each part of the term, by the name it is measured under."""
        raise NotImplementedError

    def _trainer(self) -> Trainer:
        if self.opening.trainer is None:
            raise RuntimeError(
                f"WeightAnchoring with form={self.name!r} adds a term to the Trainer's loss and needs the "
                "trainer. Call attach(trainer) before trainer.train()."
            )
        return self.opening.trainer

    def _of_micro_batch(self, share: float) -> Tensor | None:
        assert self._observer is not None
        calls = self._observer.heard()
        if not calls:
            raise RuntimeError(
                f"the loss was computed without a call of {type(self.opening.model).__name__} that records a "
                "gradient, so there is nothing to compare with the reference. Compute it from the model's own forward, "
                'or choose form="decoupled" or "penalty".'
            )
        parts: list[Tensor] = []
        for seen in calls:  # a loss may call the model several times, as on the two texts of a pair
            if self.is_open(seen):
                for name, (strength, value) in self.terms(seen, self._reference(seen)).items():
                    parts.append(strength * value / len(calls))
                    self._sums[name] = self._sums.get(name, 0) + value.detach() * (share / len(calls))
        return torch.stack([part.to(parts[0]) for part in parts]).sum() if parts else None

    def _reference(self, seen: Observed) -> Observed:
        """Return what the reference computes from the inputs of a forward."""
        assert self._observer is not None
        model = self.opening.model
        self._observer.listen(graphs=False)
        base = without_adapters(model) if self._switches_off else nullcontext()
        with base, as_reference(model, self.opening.reference, self._buffers):
            model(*seen.args, **without_labels(model, seen.kwargs))
        return self._observer.heard()[-1]

    def _side_by_side(
        self, ours: Tensor, theirs: Tensor, seen: Observed, stream: Stream
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return activations of both forwards with the rows first, and the mask of their places.

        Without adapters no prompt stands before the inputs, and its places have nothing to be compared with.
        """
        ours, _ = self._placed(ours, seen, stream)
        theirs, mask = self._placed(theirs, seen, stream)
        if self._switches_off and ours.ndim == theirs.ndim == 3:
            ours = ours[:, -theirs.shape[1] :]
        return ours, theirs, mask

    def _placed(self, values: Tensor, seen: Observed, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """Return activations with the rows first, and the mask of their places."""
        if seen.call is None:
            return values, None
        mask = seen.call.mask(stream, values)
        values = rows_first(values, seen.call.rows, mask, seen.call.segments)
        return values, fitting(mask, values, prompted=is_peft(self.opening.model)) if values.ndim == 3 else None


def head_parameters(groups: LayerGroups) -> set[str]:
    """Return the names of the head's parameters; none of a model without head."""
    return set() if groups.head is None else set(groups[groups.head].parameters)


def without_labels(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is called with, without the labels, where it can do without: their loss is not needed.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2))
        >>> list(without_labels(model, {"input_ids": 0, "labels": 0}))
        ['input_ids']
    """
    base = base_model(model)
    labels = inspect.signature(base.forward).parameters.get("labels")
    needed = labels is not None and labels.default is not None
    makes_inputs = getattr(getattr(base, "config", None), "is_encoder_decoder", False)  # the decoder's, of the labels
    return {name: value for name, value in kwargs.items() if needed or makes_inputs or name != "labels"}
